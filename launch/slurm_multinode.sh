#!/usr/bin/env bash
# One run on several machines under SLURM, one task per GPU. Submit it from the repository's folder:
#   sbatch launch/slurm_multinode.sh --data-dir DIR --model resnet50 ... --experiment mine
# sbatch's own flags, put before the script, win over those below (sbatch --nodes 4 ...). --experiment is needed: the
# run goes on in its folder (which all machines have to share) each time that it is requeued. Two minutes before the
# time limit SLURM sends SIGUSR1; the run saves and exits with status 75, and is put back into the queue. A fault
# (status 1 or 2) is not requeued.
# SLURM starts the tasks itself, without a launcher in each machine's way: it would die of SIGUSR1, and hide the status.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
if [ -z "${SLURM_JOB_ID:-}" ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo 'slurm_multinode.sh: error: not within a SLURM job: submit it with sbatch, or use launch/multinode.sh' >&2
    exit 2
fi
requeue=1
trap 'requeue=' TERM # SLURM tells the tasks too; wait for them. A job that is cancelled is not requeued

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# SC2016: the tasks are to expand it. --wait: a task that died takes the others along after a minute.
# shellcheck disable=SC2016
# srun does not take --cpus-per-task over from sbatch since Slurm 22.05.
srun --wait=60 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train_ssl.py "$@"
' task "$@" --resume auto
status=$?
[ "$status" -eq 75 ] && [ -n "$requeue" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
