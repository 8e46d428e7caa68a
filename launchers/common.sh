# shellcheck shell=bash
# Sourced by the launchers: what they share. Commands run from the checkout, where ds_configs/ is.

refuse() { # WHY
    echo "xar-scale: $*" >&2
    exit 64
}

an_environment() {
    command -v python >/dev/null || refuse "there is no python here: activate the environment that holds xar_scale (. .venv/bin/activate)"
}

# Of the variables that are set: whole numbers, and no less than LEAST
whole_numbers() { # LEAST NAME...
    local least=$1 name
    shift
    for name in "$@"; do
        [ -n "${!name-}" ] || continue
        if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]] || [ "${!name}" -lt "$least" ]; then
            refuse "$name=${!name} is no whole number from $least on"
        fi
    done
}

# What ranks find each other and exchange data over. What is set stays; each is printed at the start.
network_settings() {
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                                          # INFO: which interfaces and plugins NCCL takes
    export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"                        # flight recorder: how many of the last collectives
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"               # written when one times out
    export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}" # after which a stuck NCCL thread ends its process
    local name
    # interfaces: NCCL and gloo each take the first one that is up, on some clusters the wrong one; NCCL_IB_HCA names InfiniBand adapters
    for name in NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG TORCH_FR_BUFFER_SIZE \
        TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC; do
        echo "  $name=${!name-}"
    done
}

# The GPUs of this machine by number, with commas; of them, those that CUDA_VISIBLE_DEVICES allows
gpus_here() {
    local here="${CUDA_VISIBLE_DEVICES-$( (nvidia-smi --list-gpus 2>/dev/null || true) | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd, -)}"
    [ "$here" = -1 ] || echo "$here" # CUDA's word for none
}

# As many GPUs as PROCESSES, unless what is wanted is a CPU
enough_gpus() { # GPUS COUNT
    [ "${DS_ACCELERATOR-}" = cpu ] || [ "$2" -eq 0 ] || [ "${PROCESSES:-1}" -le "$2" ] ||
        refuse "PROCESSES=$PROCESSES, but there are GPUs $1"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# The run's folder, of the arguments of `xar-scale train`
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

# Set code to what the ranks ended with. torchrun says 1 whatever it was, srun the largest of them: they write it down as well, in
# a file that a job's launchers share, and that whoever made it removes. No subshell: a signal to all processes would end it.
take_exit_code() {
    local said=''
    { read -r said <"$XAR_SCALE_EXIT_FILE"; } 2>/dev/null || true # read fails where no newline is; a rank may be writing, or none can
    code=${said:-$code}
}

# Wait for a process, whatever signals come, and set code to its own
wait_for() { # PROCESS
    local interrupted
    while true; do # a trap ends a wait
        wait "$1" && interrupted=0 || interrupted=$?
        kill -0 "$1" 2>/dev/null || break
    done
    wait "$1" && code=0 || code=$?         # once more: not that of a wait that a trap ended
    [ "$code" -ge 0 ] || code=$interrupted # bash 5.2 loses it where a signal comes in the moment that it ends
}

# Whether to start again after CODE: not where the next start would end alike, or somebody asked for the end; and at most
# RESTARTS times in a row without a newer checkpoint.
stuck=0 stuck_at=
start_again() { # RUN CODE
    case $2 in 0 | 64 | 65 | 70 | 76 | 78 | 130) return 1 ;; esac
    local newest
    newest=$(cat "$1/checkpoints/latest" 2>/dev/null || echo none)
    [ "$newest" = "$stuck_at" ] || stuck=0
    stuck_at=$newest stuck=$((stuck + 1))
    if [ "$stuck" -gt "$RESTARTS" ]; then
        [ "$RESTARTS" -eq 0 ] || echo "exit code $2; not started again: $((stuck - 1)) restarts since checkpoint $newest"
        return 1
    fi
    echo "exit code $2; start again, number $stuck since checkpoint $newest (RESTARTS=$RESTARTS)"
}

alive() { # a process that nobody has taken note of is not
    kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.Z' "/proc/$1/status"
}

descendants() {
    local child
    for child in $(pgrep -P "$1"); do echo "$child" && descendants "$child"; done
}

# Run a launcher, again and again as start_again has it, and end with the run's code. Signals that would end this shell go to the
# launcher and to all that it has started: DeepSpeed's leaves them running by itself. The ranks write a checkpoint and leave; they
# are waited for. USR2 ends a launcher: it goes to the ranks alone.
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
        # not of the start before; no rank runs before all launchers do. Ranks do without it where it cannot be written
        { : >"$XAR_SCALE_EXIT_FILE"; } 2>/dev/null || true
        [ -z "$asked" ] || exit 76 # before there was anything to pass it on to
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
        [ -z "$asked" ] || kill $! # asked before it slept
        wait $! || true
        [ -z "$asked" ] || exit "$code"
    done
}
