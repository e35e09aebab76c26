"""Many clients in one process: the same rules, schedule, gossip weights and data, without MPI and DeepSpeed.

command.py is `deca simulate`.
"""
