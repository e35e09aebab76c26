"""No rank waits for ever: heartbeats, the report of the first failure, and how a job stops on request.

Import the modules by their names: `deca status` needs heartbeats.py without torch.
"""
