"""The commands: train, plan, report, status and supervise."""
