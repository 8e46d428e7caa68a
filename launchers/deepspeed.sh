#!/usr/bin/env bash
# xar-scale under DeepSpeed's launcher: launchers/deepspeed.sh train --recipe digits
#   PROCESSES             ranks on this machine; default: its GPUs (the largest power of two), or 2 CPU processes if it has none
#   CUDA_VISIBLE_DEVICES  the GPUs to use, by number; default: all
#   HOSTFILE              several machines, one per line (launchers/hostfile.example), reached by pdsh and ssh without a password
#   NODE_RANK             with HOSTFILE, without ssh: this machine's line, from 0; start the command on each machine
#   MASTER_ADDR           with NODE_RANK: the first machine's address
#   MASTER_PORT           default: a free port; with HOSTFILE 29500
#   RESTARTS              restarts in a row without a newer checkpoint, after a rank was killed or a similar failure; default: 0
#   PAUSE                 seconds before a restart, so that processes on other machines can exit; default: 10
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
    # without the file DeepSpeed would silently use this machine alone
    [ -f "$HOSTFILE" ] || refuse "HOSTFILE=$HOSTFILE: no such file"
    ranks=(--hostfile "$HOSTFILE")
    port=29500
    if [ -n "${NODE_RANK-}" ]; then
        [ -n "${MASTER_ADDR-}" ] || refuse "MASTER_ADDR is not set: NODE_RANK needs the address of the first machine"
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
        unset CUDA_VISIBLE_DEVICES # --include selects the GPUs
    fi
fi
MASTER_PORT="${MASTER_PORT:-$port}" RESTARTS="${RESTARTS:-0}" PAUSE="${PAUSE:-10}"
RUN=$(run_folder "$@")

echo "deepspeed: ${ranks[*]} MASTER_PORT=$MASTER_PORT RESTARTS=$RESTARTS PAUSE=$PAUSE, GPUs: ${gpus:-none}"
network_settings
launch deepspeed --quiet "${ranks[@]}" --master_port "$MASTER_PORT" --no_local_rank --module xar_scale "$@"
