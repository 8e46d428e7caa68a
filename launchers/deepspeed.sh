#!/usr/bin/env bash
# xar-scale under DeepSpeed's launcher: launchers/deepspeed.sh train --recipe digits
#   PROCESSES             ranks on this machine; default: its GPUs (the largest power of two), or 2 CPU processes without one
#   CUDA_VISIBLE_DEVICES  the GPUs to use, by number; default: all
#   HOSTFILE              for several machines: a line a machine (launchers/hostfile.example); reached by pdsh and ssh without a password
#   NODE_RANK             with HOSTFILE, where nothing may be reached by ssh: this machine's line, from 0; the command is started on each
#   MASTER_ADDR           with NODE_RANK: the first machine's address
#   MASTER_PORT           default: a free one, with HOSTFILE 29500
#   RESTARTS              starts in a row, without a newer checkpoint, after a rank was killed or the like; default: 0
#   PAUSE                 seconds before one, for what is left on other machines to end; default: 10
set -euo pipefail
# shellcheck source=launchers/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

an_environment
whole_numbers 1 PROCESSES MASTER_PORT
whole_numbers 0 NODE_RANK RESTARTS PAUSE
gpus=$(gpus_here)
count=$(tr ',' '\n' <<<"$gpus" | grep -c . || true)
if [ "$count" -eq 0 ]; then export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi
if [ -n "${HOSTFILE-}" ]; then
    # DeepSpeed would take this machine alone, and not say so
    [ -f "$HOSTFILE" ] || refuse "HOSTFILE=$HOSTFILE: no such file"
    ranks=(--hostfile "$HOSTFILE")
    port=29500
    if [ -n "${NODE_RANK-}" ]; then
        [ -n "${MASTER_ADDR-}" ] || refuse "MASTER_ADDR is not set: with NODE_RANK, the address of the first machine"
        ranks+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    fi
else
    enough_gpus "$gpus" "$count"
    port=$(free_port)
    if [ "$count" -eq 0 ]; then
        ranks=(--num_gpus "${PROCESSES:-2}")
    else
        default=1
        while [ $((default * 2)) -le "$count" ]; do default=$((default * 2)); done
        ranks=(--include "localhost:$(cut -d, -f "1-${PROCESSES:-$default}" <<<"$gpus")")
        unset CUDA_VISIBLE_DEVICES # said by --include
    fi
fi
MASTER_PORT="${MASTER_PORT:-$port}" RESTARTS="${RESTARTS:-0}" PAUSE="${PAUSE:-10}"
RUN=$(run_folder "$@")

echo "deepspeed: ${ranks[*]} MASTER_PORT=$MASTER_PORT RESTARTS=$RESTARTS PAUSE=$PAUSE, GPUs: ${gpus:-none}"
network_settings
launch deepspeed --quiet "${ranks[@]}" --master_port "$MASTER_PORT" --no_local_rank --module xar_scale "$@"
