"""A run: its start, inner steps, evaluation, metrics, checkpoints, and the trained shards at the end."""
