# shellcheck shell=bash
# Sourced by the launchers: their shared functions. Commands run from the checkout, where ds_configs/ is.

refuse() { # WHY
    echo "xar-scale: $*" >&2
    exit 64
}

an_environment() {
    command -v python >/dev/null || refuse "python not found: activate the environment with xar_scale (. .venv/bin/activate)"
}

# Refuse variables that are set to anything but a whole number of at least LEAST
whole_numbers() { # LEAST NAME...
    local least=$1 name
    shift
    for name in "$@"; do
        [ -n "${!name-}" ] || continue
        if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]] || [ "${!name}" -lt "$least" ]; then
            refuse "$name=${!name}: must be a whole number of at least $least"
        fi
    done
}

# Defaults for the network between ranks. Variables that are set keep their values; all are printed at the start.
network_settings() {
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                                          # INFO: report the interfaces and plugins that NCCL uses
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"                        # flight recorder: number of recent collectives kept
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"               # write the recorder's dump when a collective times out
    export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}" # until a stuck NCCL thread ends its process
    local name
    # IFNAME: NCCL and gloo each use the first interface that is up, on some clusters the wrong one; IB_HCA: InfiniBand adapters
    for name in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG TORCH_FR_BUFFER_SIZE \
        TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC; do
        echo "  $name=${!name-}"
    done
}

# Print the numbers of this machine's GPUs, comma-separated; only those in CUDA_VISIBLE_DEVICES if it is set
gpus_here() {
    local here="${CUDA_VISIBLE_DEVICES-$( (nvidia-smi --list-gpus 2>/dev/null || true) | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd, -)}"
    [ "$here" = -1 ] || echo "$here" # -1 means none
}

# Refuse more PROCESSES than GPUs, except on a CPU
enough_gpus() { # GPUS COUNT
    [ "${DS_ACCELERATOR-}" = cpu ] || [ "$2" -eq 0 ] || [ "${PROCESSES:-1}" -le "$2" ] ||
        refuse "PROCESSES=$PROCESSES, but only these GPUs are available: $1"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# Print the run folder that the arguments of `xar-scale train` name
run_folder() {
    local recipe=''
    while [ $# -gt 0 ]; do
        case $1 in
        --run-dir) echo "${2-}" && return ;;
        --run-dir=*) echo "${1#*=}" && return ;;
        --recipe) recipe=${2-} ;;
        --recipe=*) recipe=${1#*=} ;;
        esac
        shift
    done
    echo "runs/$recipe"
}

# Set code to the ranks' exit code. torchrun exits with 1 whatever it was, srun with the largest, so ranks also write it to a file.
# All launchers of a job share that file; its creator removes it. No subshell here: a signal to all processes would end it.
take_exit_code() {
    local said=''
    { read -r said <"$XAR_SCALE_EXIT_FILE"; } 2>/dev/null || true # read fails without a newline; a rank may be writing, or unable to
    code=${said:-$code}
}

# Wait for a process, through any signals, and set code to its exit code
wait_for() { # PROCESS
    local interrupted
    while true; do # a trap interrupts wait
        wait "$1" && interrupted=0 || interrupted=$?
        kill -0 "$1" 2>/dev/null || break
    done
    wait "$1" && code=0 || code=$?         # again: the first status may be from an interrupted wait
    [ "$code" -ge 0 ] || code=$interrupted # bash 5.2 loses the status if a signal arrives as the process ends
}

# Whether to restart after CODE: not if the next start would end alike or the stop was requested, and at most RESTARTS times in a
# row without a newer checkpoint.
stuck=0 stuck_at=
start_again() { # RUN CODE
    case $2 in 0 | 64 | 65 | 70 | 76 | 78 | 130) return 1 ;; esac
    local newest
    newest=$(cat "$1/checkpoints/latest" 2>/dev/null || echo none)
    [ "$newest" = "$stuck_at" ] || stuck=0
    stuck_at=$newest stuck=$((stuck + 1))
    if [ "$stuck" -gt "$RESTARTS" ]; then
        [ "$RESTARTS" -eq 0 ] || echo "exit code $2; not restarted: $((stuck - 1)) restarts since checkpoint $newest"
        return 1
    fi
    echo "exit code $2; restart $stuck since checkpoint $newest (RESTARTS=$RESTARTS)"
}

alive() { # a zombie is not
    kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.Z' "/proc/$1/status"
}

descendants() {
    local child
    for child in $(pgrep -P "$1"); do echo "$child" && descendants "$child"; done
}

# Run a launcher, restart it as start_again decides, and exit with the run's code. INT and TERM are forwarded to the launcher and
# all its descendants, because DeepSpeed's launcher would leave them running. The ranks write a checkpoint and exit; this shell
# waits for them. USR2 would end a launcher, so it is forwarded to the ranks only.
launch() {
    local code launcher='' asked='' started=() process
    command -v pgrep >/dev/null || echo "pgrep (procps) is not installed: signals do not reach the ranks"
    [ -n "${XAR_SCALE_EXIT_FILE-}" ] || { XAR_SCALE_EXIT_FILE=$(mktemp) && trap 'rm -f "$XAR_SCALE_EXIT_FILE"' EXIT; }
    export XAR_SCALE_EXIT_FILE
    # shellcheck disable=SC2207
    trap 'asked=1; started=($(descendants $$)); kill -TERM "${started[@]}" 2>/dev/null || true' INT TERM
    # shellcheck disable=SC2046
    trap 'kill -USR2 $(descendants "$launcher") 2>/dev/null || true' USR2
    while true; do
        # clear the previous start's code: no rank runs before all launchers do. Ranks work without the file if it is not writable
        { : >"$XAR_SCALE_EXIT_FILE"; } 2>/dev/null || true
        [ -z "$asked" ] || exit 76 # before there was a process to forward it to
        (trap '' USR2 && exec "$@") &
        launcher=$!
        wait_for "$launcher"
        for process in "${started[@]}"; do
            while alive "$process"; do sleep 0.1; done
        done
        take_exit_code
        [ -z "$asked" ] || exit "$code"
        start_again "$RUN" "$code" || exit "$code"
        sleep "$PAUSE" &
        [ -z "$asked" ] || kill $! # the request came before the sleep
        wait $! || true
        [ -z "$asked" ] || exit "$code"
    done
}
