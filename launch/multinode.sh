#!/usr/bin/env bash
# One run on several hosts without a scheduler. Start it on every host, with the same flags, which go to train_ssl.py:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash launch/multinode.sh --data-dir DIR --experiment mine --resume auto
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 bash launch/multinode.sh --data-dir DIR --experiment mine --resume auto
# MASTER_ADDR is host 0 as the others reach it, MASTER_PORT a free port there (29500), NPROC the processes on each host
# (its GPUs). --output has to lie on a file system that all hosts share.
# SIGTERM or Ctrl-C on one host stops the run on all of them with a checkpoint; the launcher then exits with status 1.
set -euo pipefail
for needed in 'NNODES: the number of hosts' 'NODE_RANK: which of them this is, from 0' 'MASTER_ADDR: that of host 0'; do
    name=${needed%%:*}
    if [ -z "${!name:-}" ]; then
        echo "multinode.sh: error: set $needed" >&2
        exit 2
    fi
done
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${NPROC:-}" ] && ! command -v nvidia-smi > /dev/null; then
    echo "multinode.sh: error: no nvidia-smi to count the GPUs: set NPROC" >&2
    exit 2
fi
nproc=${NPROC:-$(nvidia-smi --list-gpus | wc -l)}
exec accelerate launch --multi_gpu --num_machines "$NNODES" --machine_rank "$NODE_RANK" \
    --num_processes "$((NNODES * nproc))" --main_process_ip "$MASTER_ADDR" \
    --main_process_port "${MASTER_PORT:-29500}" --mixed_precision no --dynamo_backend no \
    "$here/train_ssl.py" "$@"
