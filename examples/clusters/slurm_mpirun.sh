#!/bin/bash
# One rank per GPU on two nodes, started by Open MPI's mpirun, which asks Slurm for the nodes. The clients exchange
# messages over MPI.
#
#   sbatch examples/clusters/slurm_mpirun.sh my_run.yaml optimizer.lr=2e-5
#
# Slurm sends SIGUSR1 to this script two minutes before the time limit. mpirun hands it on, the ranks save a checkpoint
# and stop, and the job goes back into the queue until the run is done. For what a signal cannot announce, set
# checkpoint.every in my_run.yaml.
#SBATCH --job-name=my_run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

output=runs/$SLURM_JOB_NAME

mpirun -n "$SLURM_NTASKS" --map-by "ppr:$SLURM_NTASKS_PER_NODE:node" --bind-to none \
    deca train --config "$@" run.threads="$SLURM_CPUS_PER_TASK" run.output="$output" run.resume=auto &
job=$!
trap 'kill -USR1 "$job"' USR1
code=0
wait "$job" || code=$?
while kill -0 "$job" 2> /dev/null; do # the signal has ended `wait`, but not mpirun
    code=0
    wait "$job" || code=$?
done
[ "$code" -eq 0 ] || exit "$code"

if [ -e "$output/STOPPED" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
