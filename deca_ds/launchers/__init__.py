"""train.py, the file that launchers start on every rank, and the command that prints where it is."""
