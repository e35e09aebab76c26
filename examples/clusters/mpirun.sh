#!/bin/bash
# One rank per GPU with Open MPI's mpirun over ssh, on the hosts of a hostfile such as examples/hosts:
#
#   examples/clusters/mpirun.sh examples/hosts my_run.yaml checkpoint.every=500
#
# A job that ends before the run does is started again. SIGTERM or Ctrl-C has it save a checkpoint and stop; the same
# command continues from it. mpirun starts as many ranks as the hostfile has slots.
set -euo pipefail

exec deca supervise mpirun --hostfile "$1" \
    deca train --config "${@:2}" run.resume=auto
