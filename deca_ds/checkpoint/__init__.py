"""The trained model on disk: sharded state as the ranks write it, and its export as a Hugging Face directory.

Its modules are imported by their names: commands that only look at a run's folder need done.py, and no torch.
"""
