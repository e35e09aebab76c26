"""A run: its start, inner steps, evaluation, metrics, checkpoints, and the trained shards at the end.

Its modules are imported by their names: planning, the simulator and commands that need no torch use some of them.
"""
