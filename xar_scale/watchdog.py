"""Ends a job that hangs and names the rank that the others wait for. A hang is a step that takes many times the median.

A thread on each rank watches the step. Ranks exchange their states (where they are, and how many collectives of each group they
have entered) through a TCPStore connection of their own, because collectives are what hangs. The others wait for the rank that
has entered fewer collectives.
"""

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from xar_scale import dist
from xar_scale.config import TrainConfig
from xar_scale.errors import HangError
from xar_scale.files import write_atomically

FOLDER, HEARTBEAT_FILE = "hangs", "heartbeat.json"
POLL_S = 1.0
REPLY_S = 10.0  # within which a running rank answers an alarm
ASLEEP_S = 5.0  # a delay between two polls beyond this means that the whole process was suspended
DATA_FRACTION = 0.8  # of the time limit: the longest wait for data; the rest is for ending the step
STEPS, KEPT = 5, 100  # step times behind a median: the minimum, and the most recent ones kept
PACKAGE = str(Path(__file__).parent)


@dataclass
class RankState:
    """What one rank is doing. The fields are the keys of the JSON in ``RUN/hangs``."""

    rank: int
    host: str
    pid: int
    step: int | None
    where: str  # the innermost call, and the innermost one in this package
    groups: dict[str, int] = field(default_factory=dict)  # number of the last collective entered, by process group
    last: dict[str, str] = field(default_factory=dict)  # that collective, described


class Watchdog:
    """A context manager. A step lasts from ``begin`` to the next ``begin`` or to ``pause``.

    A step that takes more than ``train.hang_after`` medians and more than ``train.hang_seconds`` ends the process with
    HangError's exit code. Rank 0 maintains ``RUN/heartbeat.json``: the current step and when it started.
    """

    def __init__(self, run: Path, settings: TrainConfig) -> None:
        self.run, self.settings = run, settings
        self.seconds = deque[float](maxlen=KEPT)
        self._current: tuple[int, float] | None = None  # a step and its start time
        self._slept = 0.0  # seconds since then during which the whole process was suspended
        self._store = _store()
        self._alarmed, self._ended = threading.Event(), threading.Event()
        # separate threads, because each may block: on the step itself, on rank 0's process, on a disk
        threads = {"watchdog": self._watch, "alarm": self._listen, "heartbeat": self._write_heartbeats}
        self._threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in threads.items()]

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(REPLY_S)

    def begin(self, step: int) -> None:
        """Step ``step`` starts; the previous one has ended."""
        now = time.monotonic()
        if self._current is not None:
            self.seconds.append(max(now - self._current[1] - self._slept, 0.0))
        self._current, self._slept = (step, now), 0.0

    def pause(self) -> None:
        """Stop timing until the next ``begin``: disk access and rollbacks have no time limit."""
        self._current = None

    @property
    def limit(self) -> float | None:
        """The time limit of a step in seconds; None before there is a median."""
        if len(self.seconds) < STEPS:
            return None
        return max(self.settings.hang_seconds, self.settings.hang_after * statistics.median(self.seconds))

    def is_too_late(self, waited: float) -> bool:
        """Whether a step that has waited for data for ``waited`` seconds should be given up, before it counts as a hang."""
        return self.limit is not None and waited > DATA_FRACTION * self.limit

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(POLL_S):
            asleep, looked = time.monotonic() - looked - POLL_S, time.monotonic()
            current, limit = self._current, self.limit
            if asleep > ASLEEP_S:  # the whole process was suspended: ranks that waited for it raise the alarm
                self._slept += asleep
            overdue = current is not None and limit is not None and time.monotonic() - current[1] - self._slept > limit
            if (overdue or self._alarmed.is_set()) and not self._ended.is_set():
                self._end(current)

    def _listen(self) -> None:
        """Wait for an alarm from another rank. If the store fails, rank 0's process is gone, and collectives report that."""
        with contextlib.suppress(Exception):  # the type depends on the torch version
            while self._store is not None and not self._ended.wait(POLL_S):
                if self._store.check(["alarm"]):
                    self._alarmed.set()
                    return

    def _write_heartbeats(self) -> None:
        written = None
        while dist.rank() == 0 and not self._ended.wait(POLL_S):
            if (current := self._current) is not None and current != written:
                begun = time.time() - (time.monotonic() - current[1])
                beat = {"step": current[0], "time": begun, "host": socket.gethostname(), "pid": os.getpid()}
                with contextlib.suppress(OSError):
                    write_atomically(self.run / HEARTBEAT_FILE, json.dumps(beat).encode())
                written = current

    def _end(self, current: tuple[int, float] | None) -> None:
        last_resort = threading.Timer(3 * REPLY_S, os._exit, [HangError.exit_code])  # in case a disk hangs as well
        last_resort.daemon = True
        last_resort.start()
        mine = local_state(current and current[0])
        seen = {mine.rank: mine}
        asking = threading.Thread(target=self._exchange, args=(mine, seen), daemon=True)
        asking.start()
        asking.join(1.5 * REPLY_S)
        folder, seen = self.run / FOLDER, dict(seen)
        reports = mine.rank == min(seen)
        if reports:
            took = (
                f"step {mine.step} has taken {time.monotonic() - current[1]:.0f} s"
                if current
                else "another rank's step takes too long"
            )
            median = f", the median step {statistics.median(self.seconds):.1f} s" if self.seconds else ""
            lines = [f"xar-scale: hang: {took}{median}", *diagnose(seen, dist.world()), f"stacks of all threads: {folder}"]
            print("\n".join(lines), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"step-{mine.step or 0:08d}-rank-{mine.rank}.txt").open("w") as file:
                file.write(json.dumps(vars(mine), indent=1) + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        # the store may live in this process while others still read it, and launchers end all ranks when the first one exits
        if self._store is not None:
            time.sleep(POLL_S if reports else 2 * POLL_S)
        dist.leave(HangError.exit_code)

    def _exchange(self, mine: RankState, seen: dict[int, RankState]) -> None:
        """Add to ``seen`` the states of ranks that answer in time: on the lowest such rank all of them, on the others only the
        lowest one's. If every rank read all states, a thousand ranks would take minutes."""
        store, until = self._store, time.monotonic() + REPLY_S
        with contextlib.suppress(Exception):  # the store is unreachable
            if store is None:
                return
            store.set(f"rank{mine.rank}", json.dumps(vars(mine)))
            store.set("alarm", "1")
            store.add("answers", 1)
            while store.add("answers", 0) < dist.world() and time.monotonic() < until:
                time.sleep(0.1)
            for rank in range(dist.world()):
                if rank != mine.rank and store.check([f"rank{rank}"]):
                    seen[rank] = RankState(**json.loads(store.get(f"rank{rank}")))
                    if rank < mine.rank:
                        return


def local_state(step: int | None) -> RankState:
    """Return the current state of this rank."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    own = [call for call in stack if call.filename.startswith(PACKAGE)]
    where = _named(stack[-1]) + (f", called by {_named(own[-1])}" if own and own[-1] is not stack[-1] else "")
    groups, last = _collectives()
    return RankState(dist.rank(), socket.gethostname(), os.getpid(), step, where, groups, last)


def diagnose(seen: dict[int, RankState], world: int) -> Iterator[str]:
    """Yield which ranks the others wait for, then where the others are: one line per rank."""
    silent = [rank for rank in range(world) if rank not in seen]
    if len(seen) == 1 < world and 0 in silent:  # rank 0's process hosts the store
        yield "rank 0 does not answer: its process is stopped or its node is down; the other ranks' states are unknown"
        silent = [0]
    else:
        for rank in silent:
            yield f"rank {rank} does not answer: its process is stopped or its node is down"
    most = {group: max(of.groups.get(group, 0) for of in seen.values()) for of in seen.values() for group in of.groups}
    late = [of for of in seen.values() if any(count < most[group] for group, count in of.groups.items())]
    for of in late:
        group = next(group for group, count in of.groups.items() if count < most[group])
        waiting = next(other for other in seen.values() if other.groups.get(group) == most[group])
        yield (
            f"rank {of.rank} ({of.host}, process {of.pid}) has not entered {waiting.last[group]}, where other ranks wait: "
            f"it is in {of.where}"
        )
    if not late and not silent:
        yield "all ranks have entered the same collectives: the network or a device is stuck"
    for of in seen.values():
        if of not in late:
            yield f"rank {of.rank} ({of.host}, process {of.pid}) is in {of.where}; its last collective: {_newest(of)}"


def _newest(of: RankState) -> str:
    """Return the rank's last collective in any group: the dictionary is in call order."""
    return [*of.last.values()][-1] if of.last else "none"


def _named(call: traceback.FrameSummary) -> str:
    file = os.fsencode(call.filename).decode(errors="replace")  # a path of any bytes, in a file of JSON
    return f"{call.name} ({file}:{call.lineno})"


def _collectives() -> tuple[dict[str, int], dict[str, str]]:
    """Read PyTorch's flight recorder (torch 2.11 to 2.15): by process group, the last collective's number and description."""
    if not torch_dist.is_initialized():
        return {}, {}
    recorders: Any = torch._C._distributed_c10d
    dump = recorders._dump_nccl_trace_json if torch_dist.get_backend() == "nccl" else recorders._dump_fr_trace_json
    numbers: dict[str, int] = {}
    last: dict[str, str] = {}
    with contextlib.suppress(Exception):  # a report without it is better than no report
        entries: list[dict[str, Any]] = json.loads(dump())["entries"]
        for entry in entries:
            if not entry["is_p2p"]:
                group = " ".join(entry["process_group"])
                numbers[group] = entry["collective_seq_id"]
                last.pop(group, None)  # the newest comes last
                last[group] = f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group}"
    return numbers, last


def _store() -> Any:
    """Open a separate connection to the rendezvous store: the process group's may be blocked in a call."""
    if not torch_dist.is_initialized() or dist.world() == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = torch_dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's own restarts share one store
    return torch_dist.PrefixStore(f"watchdog{start}", client)
