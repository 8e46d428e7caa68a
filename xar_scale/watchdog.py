"""Ends a job that hangs, and says whom it hung on: a step that takes many times its median, on any rank.

A thread of each rank looks on. What the ranks see they exchange through a store of their own, not through collectives, which
are what hangs: stacks, and how many collectives of each group a rank has begun. Who has begun fewer is whom others wait for.
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
REPLY_S = 10.0  # in which a rank that still runs answers an alarm
ASLEEP_S = 5.0  # more than that between two looks is no work of others
STEPS, KEPT = 5, 100  # that a median is made of: at least, and of the last
PACKAGE = str(Path(__file__).parent)


@dataclass
class RankState:
    """What one rank is at."""

    rank: int
    host: str
    pid: int
    step: int | None
    where: str  # the innermost call, and the innermost of ours
    groups: dict[str, int] = field(default_factory=dict)  # collectives begun, by process group
    last: dict[str, str] = field(default_factory=dict)  # the last of each, in words


class Watchdog:
    """A context manager. Steps are from ``begin`` to the next one or ``rest``.

    A step that takes ``train.hang_after`` medians, and ``train.hang_seconds`` at the least, ends the process with HangError's
    code. Rank 0 keeps ``RUN/heartbeat.json``: the step that is under way and when it was begun.
    """

    def __init__(self, run: Path, settings: TrainConfig) -> None:
        self.run, self.settings = run, settings
        self.seconds = deque[float](maxlen=KEPT)
        self._current: tuple[int, float] | None = None  # a step, and when it was begun
        self._slept = 0.0  # seconds since then in which the whole process was stopped
        self._store = _store()
        self._alarmed, self._ended = threading.Event(), threading.Event()
        # apart, because each may be kept waiting: by the step itself, by rank 0's process, by a disk
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
        """Step ``step`` begins, and the one before it has ended."""
        now = time.monotonic()
        if self._current is not None:
            self.seconds.append(max(now - self._current[1] - self._slept, 0.0))
        self._current, self._slept = (step, now), 0.0

    def pause(self) -> None:
        """What comes now takes the time it takes: a disk, another state."""
        self._current = None

    @property
    def limit(self) -> float | None:
        """Seconds; none before there is a median."""
        if len(self.seconds) < STEPS:
            return None
        return max(self.settings.hang_seconds, self.settings.hang_after * statistics.median(self.seconds))

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(POLL_S):
            asleep, looked = time.monotonic() - looked - POLL_S, time.monotonic()
            current, limit = self._current, self.limit
            if asleep > ASLEEP_S:  # the whole process was stopped: others tell, if they had to wait
                self._slept += asleep
            overdue = current is not None and limit is not None and time.monotonic() - current[1] - self._slept > limit
            if (overdue or self._alarmed.is_set()) and not self._ended.is_set():
                self._end(current)

    def _listen(self) -> None:
        """For an alarm of another rank. A store that does not answer has gone with rank 0's process, which collectives tell."""
        with contextlib.suppress(Exception):  # of several kinds, by version
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
        last_resort = threading.Timer(3 * REPLY_S, os._exit, [HangError.exit_code])  # should a disk hang as well
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
                f"step {mine.step} takes {time.monotonic() - current[1]:.0f} s"
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
        if self._store is not None:  # which may be in this process, and others ask; and launchers end all when the first leaves
            time.sleep(POLL_S if reports else 2 * POLL_S)
        dist.leave(HangError.exit_code)

    def _exchange(self, mine: RankState, seen: dict[int, RankState]) -> None:
        """Put into ``seen`` what the ranks see that answer in time: all into that of the lowest; into the others'
        whose that is. If each read all, a thousand ranks would take minutes."""
        store, until = self._store, time.monotonic() + REPLY_S
        with contextlib.suppress(Exception):  # a store that is gone
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
    """This rank, as it is now."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    own = [call for call in stack if call.filename.startswith(PACKAGE)]
    where = _named(stack[-1]) + (f", called by {_named(own[-1])}" if own and own[-1] is not stack[-1] else "")
    groups, last = _collectives()
    return RankState(dist.rank(), socket.gethostname(), os.getpid(), step, where, groups, last)


def diagnose(seen: dict[int, RankState], world: int) -> Iterator[str]:
    """Whom the others wait for, a line a rank."""
    silent = [rank for rank in range(world) if rank not in seen]
    if len(seen) == 1 < world and 0 in silent:  # in rank 0's process ranks find each other
        yield "rank 0 does not answer: its process is stopped or its node gone; what other ranks see cannot be told"
        silent = [0]
    else:
        for rank in silent:
            yield f"rank {rank} does not answer: its process is stopped or its node gone"
    most = {group: max(of.groups.get(group, 0) for of in seen.values()) for of in seen.values() for group in of.groups}
    late = [of for of in seen.values() if any(count < most[group] for group, count in of.groups.items())]
    for of in late:
        group = next(group for group, count in of.groups.items() if count < most[group])
        waiting = next(other for other in seen.values() if other.groups.get(group) == most[group])
        yield (
            f"rank {of.rank} ({of.host}, process {of.pid}) has not begun {waiting.last[group]}, in which others wait: "
            f"it is in {of.where}"
        )
    if not late and not silent:
        yield "all ranks have begun the same collectives: the network, or a device, does not get on"
    for of in seen.values():
        if of not in late:
            yield f"rank {of.rank} ({of.host}, process {of.pid}) is in {of.where}; its last collective: {_newest(of)}"


def _newest(of: RankState) -> str:
    """Of the group that it has last called: dictionaries keep that order."""
    return [*of.last.values()][-1] if of.last else "none"


def _named(call: traceback.FrameSummary) -> str:
    return f"{call.name} ({call.filename}:{call.lineno})"


def _collectives() -> tuple[dict[str, int], dict[str, str]]:
    """From PyTorch's flight recorder, as torch 2.11 to 2.15 have it: by process group the last collective's number, and it."""
    if not torch_dist.is_initialized():
        return {}, {}
    recorders: Any = torch._C._distributed_c10d
    dump = recorders._dump_nccl_trace_json if torch_dist.get_backend() == "nccl" else recorders._dump_fr_trace_json
    numbers: dict[str, int] = {}
    last: dict[str, str] = {}
    with contextlib.suppress(Exception):  # a report without it is better than none
        entries: list[dict[str, Any]] = json.loads(dump())["entries"]
        for entry in entries:
            if not entry["is_p2p"]:
                group = " ".join(entry["process_group"])
                numbers[group] = entry["collective_seq_id"]
                last.pop(group, None)  # the newest comes last
                last[group] = f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group}"
    return numbers, last


def _store() -> Any:
    """A connection of its own to where the ranks met: the process group's may be waiting in a call."""
    if not torch_dist.is_initialized() or dist.world() == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = torch_dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's own restarts have one store
    return torch_dist.PrefixStore(f"watchdog{start}", client)
