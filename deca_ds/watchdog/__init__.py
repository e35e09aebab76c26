"""Nobody waits for ever: heartbeats, the first failure, and how a job is told to stop.

Its modules are imported by their names: `deca status` needs heartbeats.py, and no torch.
"""
