"""Train with DECA. Started on every rank by `deepspeed`, mpirun or python; see docs/launching.md."""

import gc
import os
import signal
import sys

# of torch: tensors of 2 MB and more lie in huge pages, where the kernel has them (docs/memory.md)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# of torch: its warnings about names that it cannot look up and connections that have ended are for its developers
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Ctrl-C while modules are imported ends the rank as it ends other programs, without their traceback
interrupted = signal.getsignal(signal.SIGINT)
if interrupted is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
gc.disable()  # until all is imported: looking for garbage among what modules make takes a second of each rank

from deca_ds.training.terminal import own_streams  # noqa: E402

own_streams()  # before any library takes hold of them

from deca_ds.tools.train import main  # noqa: E402

signal.signal(signal.SIGINT, interrupted)

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
