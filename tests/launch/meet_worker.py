"""A rank whose launcher was given something else than this test's. Started like launchers/train.py.

Environment: GIVEN, the arguments of Given in JSON.
"""

import json
import os
import sys
from pathlib import Path

from deca_ds.launch import meet
from deca_ds.launch.given import Given
from deca_ds.tools import train

hostfile, hosts, by_deepspeed = json.loads(os.environ["GIVEN"])
given = Given(hostfile and Path(hostfile), tuple(hosts), by_deepspeed)
meet.given = train.given = lambda: given
sys.exit(train.main())
