#!/usr/bin/env bash
# Submits any launcher to Slurm as an array job, one task per run of its grid, and a job behind it for the table:
#   SBATCH_ARGS='--partition gpu --gres gpu:1 --cpus-per-task 8 --time 24:00:00' bash launch/slurm.sh \
#       launch/table1_cifar10.sh --amp
# SBATCH_ARGS goes to sbatch (no spaces within one argument); all else is as for the launcher itself: see _common.sh.
# DRY_RUN=1 prints the sbatch commands. Five minutes before its time limit a task gets USR1, stops where it can be
# resumed, and is queued again. Tested with a stand-in for sbatch and scontrol, not on a cluster.
set -euo pipefail

# slurm.sh --task LAUNCHER ARGUMENTS...: what the array's tasks and the table's job run. sbatch copies this file, so the
# launcher has its whole path.
if [ "${1:-}" = --task ]; then
    shift
    ONLY=${SLURM_ARRAY_TASK_ID:-report} bash "$@" &
    requeue='' signalled=''
    trap 'requeue=1 signalled=1; kill -USR1 "$!" || true' USR1
    trap 'signalled=1; kill -TERM "$!" || true' TERM
    while :; do
        status=0 signalled=''
        wait "$!" || status=$?
        if [ -z "$signalled" ]; then break; fi
    done
    # A task by its place in the array: the bare id of the array's job would requeue all tasks.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
    if [ "$status" -eq 75 ] && [ -n "$requeue" ]; then scontrol requeue "${job:-$SLURM_JOB_ID}"; fi
    exit "$status"
fi

if [ ! -f "${1:-}" ]; then
    echo "slurm.sh: error: ${1:-no launcher given}: expected a launcher, such as launch/table1_cifar10.sh" >&2
    exit 2
fi
if [ -z "${DRY_RUN:-}" ] && ! command -v sbatch > /dev/null; then
    echo 'slurm.sh: error: no sbatch here: run it where SLURM is, or the launcher itself without this script' >&2
    exit 2
fi
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
launcher=$(CDPATH='' cd -- "$(dirname -- "$1")" && pwd)/$(basename -- "$1")
shift
runs=$(DRY_RUN='' ONLY='' COUNT=1 bash "$launcher" "$@")
name=$(basename -- "$launcher" .sh)
# shellcheck disable=SC2206
submit=(sbatch --parsable --job-name "$name" --open-mode append ${SBATCH_ARGS:-})
array=("${submit[@]}" --array "1-$runs" --requeue --signal B:USR1@300 "$here/slurm.sh" --task "$launcher" "$@")
# afterany: the table is made of what there is where tasks failed, and names what is missing.
table=("${submit[@]}" --dependency afterany:JOB "$here/slurm.sh" --task "$launcher" "$@")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${array[@]}"
    printf '\n'
    printf '%q ' "${table[@]}"
    printf '\n'
    exit
fi
job=$("${array[@]}")
job=${job%%;*}  # a cluster's name may follow
job=$("${table[@]/#afterany:JOB/afterany:$job}")
echo "$name: $runs runs submitted, and the table as job ${job%%;*}"
