"""Hangs and stragglers in one process: when a step has taken too long, which rank the others wait for, how it is measured."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.conftest import digits_config
from tests.processes import environment
from xar_scale import dist, stragglers, watchdog
from xar_scale.stragglers import ForwardTime, Stragglers
from xar_scale.watchdog import RankState, Watchdog, diagnose

SETTINGS = digits_config("train.engine=single", "train.hang_after=4", "train.hang_seconds=0.5").train


def seen(rank: int, begun: dict[str, int], where: str = "wait (x.py:1)") -> RankState:
    last = {group: f"all_reduce number {count} of group {group}" for group, count in begun.items()}
    return RankState(rank, f"host{rank}", 100 + rank, 7, where, begun, last)


def test_the_others_wait_for_the_rank_that_has_entered_fewer_collectives():
    ranks = {0: seen(0, {"all": 9}), 1: seen(1, {"all": 8}, "sleep (loader.py:3)"), 2: seen(2, {"all": 9})}
    assert list(diagnose(ranks, 3)) == [
        "rank 1 (host1, process 101) has not entered all_reduce number 9 of group all, where other ranks wait: it is in "
        "sleep (loader.py:3)",
        "rank 0 (host0, process 100) is in wait (x.py:1); its last collective: all_reduce number 9 of group all",
        "rank 2 (host2, process 102) is in wait (x.py:1); its last collective: all_reduce number 9 of group all",
    ]


def test_groups_that_a_rank_does_not_belong_to_do_not_count():
    ranks = {0: seen(0, {"all": 9, "left": 5}), 1: seen(1, {"all": 9, "left": 4}), 2: seen(2, {"all": 9, "right": 2})}
    lines = list(diagnose(ranks, 3))
    assert lines[0].startswith("rank 1 (host1, process 101) has not entered all_reduce number 5 of group left")
    assert len([line for line in lines if "has not entered" in line]) == 1


def test_where_a_rank_is_can_be_written_whatever_the_names_of_its_files():
    call = traceback.FrameSummary(os.fsdecode(b"/home/\xe9/x.py"), 3, "wait")
    assert watchdog._named(call) == "wait (/home/\ufffd/x.py:3)"


def test_a_rank_that_does_not_answer_is_named_and_so_is_a_hang_of_all():
    assert next(diagnose({0: seen(0, {"all": 9})}, 2)) == "rank 1 does not answer: its process is stopped or its node is down"
    assert next(diagnose({3: seen(3, {"all": 9})}, 6)).startswith("rank 0 does not answer: ")  # it hosts the store
    both = {rank: seen(rank, {"all": 9}) for rank in range(2)}
    assert next(diagnose(both, 2)) == "all ranks have entered the same collectives: the network or a device is stuck"


def test_the_limit_is_a_multiple_of_the_median_and_needs_a_median(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(tmp_path, SETTINGS)
    for step, seconds in enumerate([9, 1, 1, 1, 1]):
        dog.begin(step)
        assert dog.limit is None
        now[0] += seconds
    dog.pause()
    now[0] += 1000  # a disk
    dog.begin(5)
    assert dog.limit is None  # the time that includes the pause does not count
    now[0] += 1
    dog.begin(6)
    assert dog.limit == 4
    dog.seconds.extend([0.01] * 100)
    assert dog.limit == 0.5


def test_a_process_that_was_suspended_does_not_count_as_hanging(tmp_path, monkeypatch):
    now, ended = [0.0], []
    dog = Watchdog(tmp_path, SETTINGS)
    dog.seconds.extend([0.1] * 10)  # the limit is half a second
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dog, "_end", lambda current: ended.append(now[0]))
    monkeypatch.setattr(watchdog, "POLL_S", 0.1)
    pauses = iter([0.1, 500.0, 0.2, 0.2, 0.2])  # in the second the whole process is suspended
    dog._current = (3, 0.05)

    def wait(seconds):
        now[0] += (pause := next(pauses, 0.0))
        return not pause

    monkeypatch.setattr(dog._ended, "wait", wait)
    dog._watch()
    assert [round(at, 3) for at in ended] == [500.5, 500.7]  # after the time that was left before the suspension
    dog.begin(4)
    assert dog.seconds[-1] == pytest.approx(0.75)  # of the 500.7 s since 0.05


PROGRAM = """
import sys, time
from dataclasses import replace
from pathlib import Path
from tests.unit.test_watchdog import SETTINGS
from xar_scale import watchdog
watchdog.POLL_S = 0.05
with watchdog.Watchdog(Path("."), replace(SETTINGS, hang_seconds=2.0)) as dog:
    for step in range(8):
        dog.begin(step)
        time.sleep(0.02)
    dog.pause()
    time.sleep(2.5)
    print("rested", flush=True)
    dog.begin(8)
    def stuck():
        time.sleep(1000)
    stuck()
"""


def test_a_process_that_hangs_exits_with_69_and_its_stacks_and_one_that_pauses_does_not(tmp_path):
    note = tmp_path / "note"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment() | {"XAR_SCALE_EXIT_FILE": str(note)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stdout) == (69, "rested\n"), done.stderr
    assert note.read_text().strip() == "69"
    assert re.match(r"xar-scale: hang: step 8 has taken [2-9] s, the median step 0.\d s\n", done.stderr)
    assert "is in stuck (<string>:17)" in done.stderr
    report = (tmp_path / "hangs" / "step-00000008-rank-0.txt").read_text()
    assert "in stuck" in report and "Thread 0x" in report
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert beat["step"] in range(9) and abs(beat["time"] - time.time()) < 60 and set(beat) == {"step", "time", "host", "pid"}


class CountingStore(dict):
    """The part of the TCPStore interface that ranks use."""

    def __init__(self) -> None:
        super().__init__(answers=0)
        self.lock, self.read = threading.Lock(), 0

    def set(self, key, value):
        self[key] = value

    def add(self, key, value):
        with self.lock:
            self[key] += value
            return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        with self.lock:
            self.read += 1
        return self[key]


@pytest.mark.parametrize("silent", [0, 5, None])
def test_the_lowest_rank_that_answers_reads_all_states_and_the_others_only_its_own(tmp_path, monkeypatch, silent):
    world, store = 40, CountingStore()
    monkeypatch.setattr(dist, "world", lambda: world)
    monkeypatch.setattr(watchdog, "REPLY_S", 0.5 if silent is not None else 100.0)
    dog = Watchdog(tmp_path, SETTINGS)
    dog._store = store
    found = {rank: {rank: seen(rank, {"all": 9})} for rank in range(world) if rank != silent}
    asking = [threading.Thread(target=dog._exchange, args=(of[rank], of)) for rank, of in found.items()]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    lowest = min(found)
    assert list(found[lowest]) == list(found) and all(set(of) == {rank, lowest} for rank, of in found.items() if rank != lowest)
    assert store.read == 2 * (len(found) - 1)  # linear in the ranks, not quadratic
    assert store.check(["alarm"])  # for ranks that do not notice by themselves


@pytest.mark.parametrize("rank", [0, 1])
def test_the_reporting_rank_exits_first(tmp_path, monkeypatch, capsys, rank):
    """Launchers end all other ranks when it exits, so it must have reported by then."""
    slept, codes = [], []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(watchdog.time, "sleep", slept.append)
    monkeypatch.setattr(dist, "leave", codes.append)
    dog, other = Watchdog(tmp_path, SETTINGS), 1 - rank
    dog._store = CountingStore()
    dog._store[f"rank{other}"] = json.dumps(vars(seen(other, {"all": 9})))
    dog._store.add("answers", 1)
    try:
        dog._end((7, time.monotonic()))
    finally:
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.cancel()  # the last-resort timer
    assert codes == [69] and ("hang: step 7" in capsys.readouterr().err) is (rank == 0)
    assert slept == [watchdog.POLL_S * (1 + rank)]


def test_only_rank_0_writes_the_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    monkeypatch.setenv("RANK", "1")
    with Watchdog(tmp_path, SETTINGS) as dog:
        dog.begin(3)
        dog._threads[-1].join(2)  # the heartbeat thread exits at once
        assert not dog._threads[-1].is_alive()
    assert not (tmp_path / watchdog.HEARTBEAT_FILE).exists()


def test_point_to_point_operations_are_not_counted_as_collectives(monkeypatch):
    """In a dump as PyTorch's flight recorder writes it."""

    def entry(name, number, **more):
        return {"process_group": ["0", "all"], "collective_seq_id": number, "profiling_name": name, "is_p2p": False} | more

    entries = [entry("gloo:all_reduce", 4), entry("gloo:all_gather", 5), entry("gloo:send 0->1", 9, is_p2p=True)]
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_fr_trace_json", lambda: json.dumps({"entries": entries}))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert watchdog._collectives() == ({"0 all": 5}, {"0 all": "gloo:all_gather number 5 of group 0 all"})
    finally:
        torch.distributed.destroy_process_group()


def test_an_alarm_from_before_a_restart_is_not_seen_after_it(monkeypatch):
    """Ranks that torchrun restarts use the same store as the ones it has ended."""
    met = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(met.port))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for count in ("0", "1"):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
            store = watchdog._store()
            assert not store.check(["alarm"])
            store.set("alarm", "1")
            assert watchdog._store().check(["alarm"])  # another rank's
    finally:
        torch.distributed.destroy_process_group()


def test_an_alarm_from_another_rank_also_ends_one_that_pauses(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "POLL_S", 0.01)
    dog, ended = Watchdog(tmp_path, SETTINGS), []
    dog._store = CountingStore()
    monkeypatch.setattr(dog, "_end", lambda current: ended.append(current) or dog._ended.set())
    with dog:
        dog.pause()  # for example while it saves
        time.sleep(0.1)
        assert ended == []
        dog._store.set("alarm", "1")
        assert dog._ended.wait(60)
    assert ended == [None]


def test_the_forward_time_covers_the_layers_alone(monkeypatch):
    clock = [0]
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: clock[0])

    def take(seconds):
        clock[0] += seconds

    class Layer(nn.Linear):
        def forward(self, x):
            take(1)
            return super().forward(x)

    network = nn.Sequential(Layer(3, 3), nn.ReLU(), Layer(3, 3))
    network[1].register_forward_hook(lambda *_: take(10))  # what engines wait for
    with ForwardTime(network, torch.device("cpu"), compiled=False) as measured:
        network(torch.ones(1, 3))
    assert measured.seconds == 2
    network(torch.ones(1, 3))
    assert measured.seconds == 2  # its hooks are gone


@pytest.mark.parametrize("often", [2, 3])
def test_a_rank_is_named_once_when_it_is_slow_several_times_in_a_row(monkeypatch, capsys, often):
    times = [1.0, 1.1, 1.0, 2.0]
    monkeypatch.setattr(stragglers, "CONSECUTIVE", often)
    compared, waits = Stragglers([f"host{rank}" for rank in range(4)]), [0.5] * 4
    for _ in range(often + 2):
        compared.compare(times, waits, 2.0)
    assert capsys.readouterr().out == "rank 3 (host3) is slow: its layers take 2.0 times as long as the median rank's\n"
    times[3] = 1.2
    compared.compare(times, waits, 2.0)
    times[3] = 2.0
    for _ in range(often - 1):
        compared.compare(times, waits, 2.0)
    assert capsys.readouterr().out == ""
    compared.compare(times, waits, 2.0)
    assert "rank 3" in capsys.readouterr().out


def test_a_rank_that_waits_for_data_while_others_wait_for_it_is_named(capsys):
    waits = [0.0, 0.01, 0.35]  # of a step of one second
    compared = Stragglers([f"host{rank}" for rank in range(3)])
    for _ in range(stragglers.CONSECUTIVE + 2):
        compared.compare([1.0] * 3, waits, 1.0)
    assert capsys.readouterr().out == "rank 2 (host2) is slow: it waits 0.35 s per step for data, the median rank 0.01 s\n"
    waits[:] = [0.9, 0.9, 0.9]  # all wait for the same storage: the metrics show it
    for _ in range(stragglers.CONSECUTIVE):
        compared.compare([1.0] * 3, waits, 1.0)
    assert capsys.readouterr().out == ""


def test_no_rank_is_slow_where_most_have_measured_nothing(capsys):
    compared = Stragglers(["host"] * 3)
    for _ in range(stragglers.CONSECUTIVE):
        compared.compare([0.0, 0.0, 1.0], [0.5] * 3, 2.0)
    assert capsys.readouterr().out == ""


def test_the_file_of_the_exit_code_is_never_empty(tmp_path, monkeypatch):
    """A launcher ends the other ranks while they write it."""
    note, seen, write = tmp_path / "note", [], os.write
    note.write_text("130 \n")
    monkeypatch.setenv("XAR_SCALE_EXIT_FILE", str(note))
    monkeypatch.setattr(os, "write", lambda *of: seen.append(note.read_text()) or write(*of))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="75"):
        dist.leave(75)
    assert seen == ["130 \n"] and note.read_text() == "75  \n"


def test_a_report_that_cannot_be_written_keeps_no_process_alive(tmp_path):
    (tmp_path / watchdog.FOLDER).mkdir()
    os.mkfifo(tmp_path / watchdog.FOLDER / "step-00000008-rank-0.txt")  # as a disk that hangs: opening waits for a reader
    quick = PROGRAM.replace("watchdog.POLL_S = 0.05", "watchdog.POLL_S, watchdog.REPLY_S = 0.05, 0.3").replace(
        "sleep(2.5)", "sleep(0)"
    )
    command = [sys.executable, "-c", quick]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 69 and "hang: step 8 has taken" in done.stderr
