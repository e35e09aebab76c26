"""The job: set up, inner steps, evaluation, metrics, and the trained shards at the end."""
