#!/usr/bin/env bash
# xar-scale under torchrun, the same command on every node: launchers/torchrun.sh train --recipe digits
#   NODES          number of nodes; default: 1
#   MASTER_ADDR    rendezvous node, reachable from all nodes; default: this one, if NODES is 1
#   MASTER_PORT    default: a free port; on several nodes 29500
#   JOB            rendezvous id, the same on all nodes; default: xar
#   PROCESSES      ranks on this node; default: its GPUs, or 2 CPU processes if it has none
#   RESTARTS       restarts in a row without a newer checkpoint, after a rank was killed or a similar failure; default: 0
#   PAUSE          seconds before a restart, so that processes on other nodes can exit; default: 10
set -euo pipefail
# shellcheck source=launchers/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

an_environment
whole_numbers 1 NODES PROCESSES MASTER_PORT
whole_numbers 0 RESTARTS PAUSE
gpus=$(gpus_here)
count=$(tr ',' '\n' <<<"$gpus" | grep -c . || true)
enough_gpus "$gpus" "$count"
if [ "$count" -eq 0 ]; then export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi
[ "$count" -gt 0 ] || count=2
NODES="${NODES:-1}" PROCESSES="${PROCESSES:-$count}" JOB="${JOB:-xar}" RESTARTS="${RESTARTS:-0}" PAUSE="${PAUSE:-10}"
if [ "$NODES" -eq 1 ]; then port=$(free_port); else port=29500; fi
[ "$NODES" -eq 1 ] || [ -n "${MASTER_ADDR-}" ] || refuse "MASTER_ADDR is not set: NODES above 1 needs the address of a node that all can reach"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-$port}"
RUN=$(run_folder "$@")

echo "torchrun: NODES=$NODES PROCESSES=$PROCESSES MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT JOB=$JOB RESTARTS=$RESTARTS PAUSE=$PAUSE, GPUs: ${gpus:-none}"
network_settings
launch torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --rdzv-backend c10d --rdzv-id "$JOB" \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" -m xar_scale "$@"
