"""The trainer, which goes no further than to a step until it is told to stop. Started like launchers/train.py.

Environment: GATE=STEP:FILE. The job stays after STEP inner steps, until its ranks agree on where to stop, or there is a
FILE. So a test that acts upon a step acts before the end, however late that is. That a rank was told to stop is not
enough: the few steps that are left may take less time than the others need to hear of it.
"""

import gc
import os
import sys
import time

gc.disable()  # while importing, as launchers/train.py does

from deca_ds.tools.train import main
from deca_ds.watchdog.stop import StopByStore

step, _, file = os.environ["GATE"].partition(":")
may_pass = StopByStore.may_pass


def at_the_gate(self, done):
    while done >= int(step) and self._last is None and not os.path.exists(file):
        time.sleep(0.02)
    return may_pass(self, done)


StopByStore.may_pass = at_the_gate
sys.exit(main())
