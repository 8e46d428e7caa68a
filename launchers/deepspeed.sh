#!/usr/bin/env bash
# xar-scale under DeepSpeed's launcher, on this machine: launchers/deepspeed.sh train --recipe digits
#   PROCESSES    ranks; default: the GPUs here (the largest power of two), or 2 CPU processes without one
#   MASTER_PORT  default: a free one
set -euo pipefail

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    default=2
else
    default=1
    while [ $((default * 2)) -le "$gpus" ]; do default=$((default * 2)); done
fi
processes="${PROCESSES:-$default}"
port="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"

echo "launching $processes processes (gpus here: $gpus), master port $port"
exec deepspeed --quiet --num_gpus "$processes" --master_port "$port" --no_local_rank --module xar_scale "$@"
