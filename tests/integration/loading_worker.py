"""The trainer, in which rank 1 takes long to load its tokenizer, and never ends to load its model.

Started like launchers/train.py. DECA_TEST_LOADS_S: how long it works, in small pieces, on its tokenizer.
"""

import gc
import os
import sys
import threading
import time

gc.disable()  # while importing, as launchers/train.py does

from deca_ds.launch.launcher import read_launch
from deca_ds.tools.train import main
from deca_ds.training import load

load_tokenizer = load.load_tokenizer


def slow_tokenizer(*arguments):
    """As from a slow disk: now and then a mebibyte comes."""
    until = time.monotonic() + float(os.environ["DECA_TEST_LOADS_S"])
    with open("/dev/zero", "rb") as slow_disk:
        while time.monotonic() < until:
            slow_disk.read(2**20)
            time.sleep(0.5)
    return load_tokenizer(*arguments)


if read_launch().rank == 1:
    load.load_tokenizer = slow_tokenizer
    load.load_model = lambda *_: threading.Event().wait()
sys.exit(main())
