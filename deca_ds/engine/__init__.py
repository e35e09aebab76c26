"""One client's ZeRO-3 world. The only place that knows DeepSpeed.

Its modules are imported by their names: they need different libraries, and some take seconds. `deepspeed` chooses its
accelerator when it is imported, which must be after `deca_ds.launch.world.connect` has set DS_ACCELERATOR. So the
modules here import it inside functions.
"""
