"""One client's ZeRO-3 world. The only place that knows DeepSpeed.

`deepspeed` chooses its accelerator when it is imported, after `deca_ds.cluster.connect` has set DS_ACCELERATOR; so it
is imported inside functions here.
"""
