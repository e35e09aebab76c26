"""The file that launchers start on every rank, train.py."""
