"""Many clients in one process: the same rules, schedule, gossip weights and data, without MPI and DeepSpeed.

run.py is `deca_ds.simulate`; command.py is `deca simulate`, which prints a table as well.
"""
