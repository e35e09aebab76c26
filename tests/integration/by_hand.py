"""Start ranks one by one, as by hand on their hosts: by_hand.py RANKS PORT COMMAND... Their exit codes are printed."""

import os
import subprocess
import sys

ranks, port, *command = sys.argv[1:]
started = []
for rank in range(int(ranks)):
    environment = {"RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_RANK": str(rank), "LOCAL_SIZE": ranks}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started.append(subprocess.Popen([sys.executable, *command], env=os.environ | environment))
print("exit codes:", [process.wait() for process in started])
