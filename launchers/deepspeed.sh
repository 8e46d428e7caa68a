#!/usr/bin/env bash
# xar-scale under DeepSpeed's launcher, on this machine: launchers/deepspeed.sh train --recipe digits
#   PROCESSES             ranks; default: the GPUs here (the largest power of two), or 2 CPU processes without one
#   CUDA_VISIBLE_DEVICES  the GPUs to use, by number; default: all
#   MASTER_PORT           default: a free one
set -euo pipefail

gpus="${CUDA_VISIBLE_DEVICES-$( (nvidia-smi --list-gpus 2>/dev/null || true) | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd, -)}"
count=$(tr ',' '\n' <<<"$gpus" | grep -c . || true)
if [ "$count" -eq 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    ranks=(--num_gpus "${PROCESSES:-2}")
else
    default=1
    while [ $((default * 2)) -le "$count" ]; do default=$((default * 2)); done
    ranks=(--include "localhost:$(cut -d, -f "1-${PROCESSES:-$default}" <<<"$gpus")")
fi
port="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"

echo "launching ${ranks[*]}, GPUs: ${gpus:-none}, master port $port"
unset CUDA_VISIBLE_DEVICES # said by --include
exec deepspeed --quiet "${ranks[@]}" --master_port "$port" --no_local_rank --module xar_scale "$@"
