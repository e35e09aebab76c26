"""`python tests SCRIPT ARGUMENTS...`: see preloaded.py."""

import os
import sys

from preloaded import ADDRESS, main

main(os.environ.get(ADDRESS), sys.argv[1:])
