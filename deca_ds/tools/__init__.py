"""The commands: train, plan, status and supervise."""
