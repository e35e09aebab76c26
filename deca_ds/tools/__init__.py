"""The commands: train, plan, data, doctor, report, status and supervise."""
