#!/bin/bash
# One rank per GPU on two nodes, started by srun. The clients exchange messages over torch, so no MPI is needed.
#
#   sbatch examples/clusters/slurm_srun.sh my_run.yaml optimizer.lr=2e-5
#
# Slurm sends SIGUSR1 to the ranks two minutes before the time limit. They save a checkpoint and stop, and the job goes
# back into the queue until the run is done. For what a signal cannot announce, set checkpoint.every in my_run.yaml.
#SBATCH --job-name=my_run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

output=runs/$SLURM_JOB_NAME
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    deca train --config "$@" cluster.transport=torch run.output="$output" run.resume=auto

if [ -e "$output/STOPPED" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
