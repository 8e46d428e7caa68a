"""The process group: this process's rank and device, and decisions that all ranks take together."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from xar_scale import slurm
from xar_scale.errors import INTERRUPTED, ConfigError, FileError, ProcessError, XarScaleError
from xar_scale.files import own_temporary_folder

T = TypeVar("T")
# torch 2.14 renamed both
all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
reduce_scatter = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor
PARENT = os.getppid()  # the launcher, which may die at any later moment
NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # in messages: of CUDA, of a CPU's allocator, of cuBLAS
STORE_S = 1.0  # that rank 0 stays after an error
REPORTED = "xar_scale/reported"  # a key of the process group's store
TIMEOUT = timedelta(minutes=30)  # of collectives; the watchdog fires earlier and reports more


def adopt_launcher() -> None:
    """Take the rank variables from SLURM if no launcher has set them: a bare srun uses its own names."""
    if "RANK" not in os.environ:
        variables = slurm.rank_variables(os.environ)
        if variables and torch.cuda.device_count() == 1:  # SLURM may show each task only its own GPU
            variables["LOCAL_RANK"] = "0"
        for name, value in variables.items():
            os.environ.setdefault(name, value)


def die_with_parent(number: signal.Signals, parent: int) -> bool:
    """Have the kernel send this process a signal when its parent dies, for whatever reason. Return whether ``parent`` is still
    its parent: if not, it died before that. Linux only."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def init(device: torch.device) -> None:
    """Join the process group that the launcher's environment describes; without a launcher, a group of one process.

    Returns when all ranks have joined: a rank that exits on a later error would break the rendezvous for ranks still joining.
    """
    if torch_dist.is_initialized():
        return
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    _keep_kernels_on_node()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # number of recent collectives recorded for the watchdog
    # if torchrun is killed, its ranks would keep training
    if "TORCHELASTIC_RUN_ID" in os.environ and not die_with_parent(signal.SIGTERM, PARENT):
        error = ProcessError("the launcher of this rank died before the rank joined the others")
        error.rank = rank()
        raise error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    gather_objects(None)


def _keep_kernels_on_node() -> None:
    """Have Triton compile to a folder of this user on this node. By default it is in the home directory, often on NFS, where
    hundreds of ranks would compile the same kernels into one folder."""
    with contextlib.suppress(OSError):
        os.environ.setdefault("TRITON_CACHE_DIR", str(own_temporary_folder() / "triton"))


def has_joined() -> bool:
    """Whether this process has joined a process group."""
    return torch_dist.is_initialized()


def rank() -> int:
    """This process's rank: from the process group, or from the launcher before there is one."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_world() -> int:
    """Ranks on this node, from the launcher's variable (torchrun's, then DeepSpeed's); the world size if neither is set."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world())


def local_device() -> torch.device:
    """This rank's device: its GPU if there are GPUs, else the CPU. Raises ConfigError if the node has more ranks than GPUs."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= gpus:
            host = socket.gethostname()
            error = ConfigError(f"{host} has {local_world()} ranks and {gpus} GPUs: none for local rank {number}")
            error.rank = rank()
            raise error
        return torch.device("cuda", number)
    return torch.device("cpu")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if torch_dist.is_initialized() and world() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """Rank ``source``'s tensor, on every rank, on the device of collectives. The others give one of its shape and dtype."""
    if not torch_dist.is_initialized() or world() == 1:
        return tensor
    tensor = tensor.to(_device())
    torch_dist.broadcast(tensor, source)
    return tensor


def _device() -> torch.device:
    """The device of collectives."""
    return torch.device("cuda" if torch_dist.get_backend() == "nccl" else "cpu")


def max_over_ranks(value: float) -> float:
    """The maximum over ranks; NaN if any value is NaN."""
    return largest(of_rank for (of_rank,) in gather_floats(value))


def largest(values: Iterable[float]) -> float:
    """The maximum; NaN if any value is NaN."""
    return max(values, key=lambda value: (value != value, value))


def gather_floats(*values: float) -> list[list[float]]:
    """Every rank's ``values``, on every rank. Every rank gives as many. For what is done in training: this is one collective
    and one wait for the device, whereas ``gather_objects`` waits for it several times for every rank."""
    if not torch_dist.is_initialized() or world() == 1:
        return [[*values]]
    gathered = torch.empty(world() * len(values), dtype=torch.float64, device=_device())
    all_gather(gathered, torch.tensor(values, dtype=torch.float64, device=_device()))
    found: list[list[float]] = gathered.view(world(), len(values)).tolist()
    return found


def say(line: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0:
        print(line, flush=True)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    if not torch_dist.is_initialized() or world() == 1:
        return [value]
    values: list[T] = [value] * world()
    torch_dist.all_gather_object(values, value)
    return values


def gather_on_rank_0(value: T) -> list[T]:
    """Every rank's value, on rank 0; an empty list on the others."""
    if not torch_dist.is_initialized() or world() == 1:
        return [value]
    values: list[T | None] | None = [None] * world() if rank() == 0 else None
    torch_dist.gather_object(value, values)
    return values or []  # type: ignore[return-value]


def mine(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of work that any rank can do."""
    return items[rank() :: world()] if torch_dist.is_initialized() else items


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; if it fails on any, every rank raises the error of the lowest such rank.

    So no rank enters a collective that the others never reach. An error is converted as ``known_error`` does. An unexpected one
    on any rank takes precedence over other errors: no rank may handle one of those and continue while that rank exits.
    """
    result: T | None = None
    unexpected: Exception | None = None
    error: XarScaleError | None = None
    try:
        result = work()
    except Exception as caught:
        error = known_error(caught)
        if error is None:
            unexpected = caught
            error = XarScaleError(f"rank {rank()} failed: {type(caught).__name__}: {caught}")
    errors = gather_objects(error)
    if unexpected is not None:
        raise unexpected  # a bug: keep its traceback
    if failed := [(type(raised) is not XarScaleError, at) for at, raised in enumerate(errors) if raised is not None]:
        at = min(failed)[1]
        raised = errors[at]
        assert raised is not None
        raised.rank = at if torch_dist.is_initialized() else None
        raise raised
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """Wrap work in which ranks communicate: an error that not all ranks share ends this process at once. Reporting it in a
    collective, as ``on_all_ranks`` does, would collide with a collective of the work in which the others wait."""
    try:
        yield
    except Exception as error:
        if world() == 1 or isinstance(error, XarScaleError):  # an error of the request, which is the same on every rank
            raise
        known = known_error(error)
        if known is None:
            traceback.print_exc()
            leave(1)
        print(f"xar-scale: {known}", file=sys.stderr)
        leave(known.exit_code)


def on_rank_0(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result, or raise its error, on every rank."""
    return gather_objects(on_all_ranks(lambda: work() if rank() == 0 else None))[0]  # type: ignore[return-value]


def is_lost_rank(error: Exception) -> bool:
    """Whether ``error`` is what a collective raises when another rank is gone: gloo and NCCL show it only in the message text.
    (Usually NCCL's own thread notices first and aborts the process.)"""
    said = str(error)
    return ("gloo" in said and ("peer" in said or "Broken pipe" in said)) or "remote process exited" in said


def known_error(error: Exception) -> XarScaleError | None:
    """The error to exit with: ``error`` itself, a FileError for an OSError, a ProcessError if memory is exhausted; None for any
    other, which is a bug and keeps its traceback."""
    if isinstance(error, XarScaleError):
        return error
    if isinstance(error, OSError):
        return file_error(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)):
        said = str(error).partition("\n")[0] or "no memory left"
        return ProcessError(f"rank {rank()} ({socket.gethostname()}) is out of memory: {said}")
    return None


def file_error(error: OSError) -> FileError:
    """Convert an OSError to a FileError with a one-line message."""
    return FileError(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program that may join a process group, and end the process as ``leave`` does.

    The exit code is ``main``'s; 1 after an unexpected exception and 130 after Ctrl-C, both with a traceback.
    """
    try:
        code = main()
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    except SystemExit as asked:  # what argparse does after its help
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    if not (code and torch_dist.is_initialized()):  # exit handlers may leave the process group: not after a failure
        atexit._run_exitfuncs()
    leave(code)


def reported() -> None:
    """Let ranks that ``await_report`` exit."""
    with contextlib.suppress(Exception):  # the type depends on the torch version
        _get_default_store().set(REPORTED, "")


def await_report(seconds: float) -> None:
    """Wait until the rank that reports an error has done so, at most ``seconds``: launchers end all ranks when the first one
    exits."""
    with contextlib.suppress(Exception):  # its store is gone, or the time is up: there is nothing left to wait for
        _get_default_store().wait([REPORTED], timedelta(seconds=seconds))


def keep_store() -> None:
    """On rank 0, whose process may host the store: let the others finish ``await_report``. If it exits first, each of them
    prints the stack of the call that fails."""
    if torch_dist.is_initialized() and world() > 1 and rank() == 0:
        time.sleep(STORE_S)


def leave(code: int) -> NoReturn:
    """End the process at once. A normal interpreter shutdown may abort because of PyTorch's threads, which would change the
    exit code to SIGABRT's, and may hang if another rank is gone.

    The code is also written to the file that launchers/ read: torchrun exits with 1 whatever the code, srun with the largest.
    """
    if (note := os.environ.get("XAR_SCALE_EXIT_FILE")) and code != 1:
        with contextlib.suppress(OSError):
            descriptor = os.open(note, os.O_WRONLY | os.O_CREAT, 0o666)
            os.write(descriptor, f"{code:<4}\n".encode())  # in place: a rank may be killed after it has emptied the file
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by who started this
            stream.flush()
    os._exit(code)


def close() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
