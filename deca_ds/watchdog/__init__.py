"""Nobody waits for ever: heartbeats, the first failure, and how a job is told to stop."""
