"""Benchmark records: arithmetic, comparison, README's table, and sums over traces."""

import argparse
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tools import bench, bench_gpu, records
from xar_scale.bench import timing
from xar_scale.bench.published import Published
from xar_scale.bench.record import BASELINE, OURS, PUBLISHED, Record, SlowerError, compare, markdown, read_record
from xar_scale.bench.step import _earlier
from xar_scale.bench.timing import WARM_UP, in_turns, median_ms
from xar_scale.bench.trace import overlap_length, trace, union_length
from xar_scale.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {"model": "nano", "batch": 4, "precision": "fp32"}


def record(ours: float, baseline: float = 1.0, **changes):
    seconds = {OURS: [ours, 2 * ours, 4 * ours], BASELINE: [baseline, 2 * baseline, 4 * baseline]}
    return Record(**({"what": "step", "settings": SETTINGS, "images": 8, "seconds": seconds} | changes))


def test_the_speedup_is_the_median_ratio_of_turns():
    """A machine that slows down fourfold in the middle does not change it."""
    assert record(2.0).speedup(BASELINE) == 0.5
    seconds = {OURS: [1.0, 2.0, 8.0], BASELINE: [3.0, 2.0, 8.0]}
    assert record(1.0, seconds=seconds).speedup(BASELINE) == 1.0  # the ratio of medians is 1.5


def test_mfu_and_images():
    kept = record(2.0, flops=8e9, peak=4e9)
    assert kept.mfu == 8e9 / 4.0 / 4e9  # the median is 4 s
    assert "| ours | 4000 | 150% | 2 | 1.00 |" in markdown(kept) and "MFU: 50% of 4e+09 FLOP/s" in markdown(kept)


def test_overlapped_communication_is_reported_with_all_communication():
    said = markdown(record(1.0, communication_s=2e-3, hidden_s=1.5e-3))
    assert said.endswith("communication: 2.0 ms, 1.5 ms of it overlapped")


@pytest.mark.parametrize(("ranks", "launcher"), [("1", "python"), ("2", "torchrun --nproc-per-node 2")])
def test_a_record_s_command_can_be_run_again(ranks, launcher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(sys, "argv", ["tools/bench.py", "step"])
    assert record(1.0).command == f"{launcher} tools/bench.py step"


def test_a_record_is_read_back(tmp_path):
    record(2.0, flops=1.0).write(tmp_path / "kept.json")
    assert read_record(tmp_path / "kept.json") == record(2.0, flops=1.0, command=read_record(tmp_path / "kept.json").command)


def test_a_file_that_is_not_a_record_is_refused_by_name(tmp_path):
    for content, said in (("[", "is not JSON"), ('{"what": "step"}', "key settings is missing")):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(UsageError, match=f"wrong.json.*{said}"):
            read_record(tmp_path / "wrong.json")
    with pytest.raises(UsageError, match="cannot read .*nowhere.json"):
        read_record(tmp_path / "nowhere.json")


def test_a_record_of_other_work_is_refused_before_the_work(tmp_path):
    record(2.0).write(kept := tmp_path / "kept.json")
    options = argparse.Namespace(repeats=1, reference=None, compare=kept, json=None)
    assert _earlier(options, "step", SETTINGS) == read_record(kept)
    with pytest.raises(UsageError, match="not the same work: batch is 8, but 4 in the record to compare with"):
        _earlier(options, "step", SETTINGS | {"batch": 8})
    with pytest.raises(UsageError, match="what is 'sample'"):
        _earlier(options, "sample", SETTINGS)


@pytest.mark.parametrize("seconds", [{}, {OURS: [1.0]}, {OURS: [], BASELINE: []}, {OURS: [1.0], BASELINE: [1.0, 2.0]}])
def test_a_record_without_its_times_is_refused(tmp_path, seconds):
    record(1.0, seconds=seconds).write(tmp_path / "wrong.json")
    with pytest.raises(UsageError, match="wrong.json: seconds must have ours and baseline"):
        read_record(tmp_path / "wrong.json")


def test_15_percent_more_of_the_baseline_s_time_fails():
    before = record(1.0)
    assert "+14%" in compare(record(1.14), before)
    assert "-50%" in compare(record(0.5), before)
    with pytest.raises(SlowerError, match=r"slower by more than 15%: 1.16 of the baseline's time, was 1.00 on .*: \+16%$"):
        compare(record(1.16), before)
    assert "+0%" in compare(record(3.0, baseline=3.0), before)  # the machine is slower, not ours


def test_turns_that_differ_are_reported():
    before, sure = record(1.0), [1.0, 2.0, 4.0]
    assert "turns" not in compare(record(1.0, seconds={OURS: sure, BASELINE: [1.0, 2.1, 4.4]}), before)
    now = record(1.0, seconds={OURS: sure, BASELINE: [1.0, 2.0, 4.8]})
    for one, other in ((now, before), (before, now)):
        assert compare(one, other).endswith("(turns differ by 20%)")


def test_other_work_is_not_compared():
    other = dataclasses.replace(record(1.0), settings=SETTINGS | {"batch": 8})
    with pytest.raises(UsageError, match="not the same work: batch is 4, but 8 in the record to compare with"):
        compare(record(1.0), other)
    for mine, theirs in ((SETTINGS, {}), ({}, SETTINGS)):
        with pytest.raises(UsageError, match="not the same work: model is "):
            compare(record(1.0, settings=mine), record(1.0, settings=theirs))
    with pytest.raises(UsageError, match="what is 'step', but 'sample' in the record to compare with"):
        compare(record(1.0), dataclasses.replace(record(1.0), what="sample"))


def test_works_take_turns_and_warm_ups_do_not_count():
    called = []
    seconds = in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, torch.device("cpu"), repeats=3)
    assert called == ["a", "b"] * (WARM_UP + 3)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}


def test_seconds_are_of_the_last_turns_and_a_median_is_in_ms(monkeypatch):
    clock = 0.0

    def works(*taking: float):
        left = iter(taking)

        def work() -> None:
            nonlocal clock
            clock += next(left)

        return work

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    assert in_turns({"a": works(64, 32, 1, 2, 4)}, torch.device("cpu"), repeats=3) == {"a": [1, 2, 4]}
    assert median_ms(works(64, 32, 1, 2, 4, 8, 16), torch.device("cpu")) == 4000


def test_union_and_overlap_of_spans():
    assert union_length([(0, 4), (2, 6), (10, 11)]) == 7
    assert overlap_length([(0, 4), (10, 20)], [(3, 12), (11, 13)]) == 1 + 3
    assert overlap_length([(0, 4)], []) == 0


def test_a_trace_names_what_takes_longest():
    matrix, small = torch.randn(1536, 1536), torch.randn(4)
    found = trace(lambda: [matrix @ matrix, small.sin()], torch.device("cpu"))
    assert found.top[0][0] == "aten::mm" and found.top[0][2] == 1
    assert found.communication_s == 0


def test_a_trace_shows_communication():
    """gloo's collectives are user annotations; other annotations are left out."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = trace(lambda: torch.distributed.all_reduce(torch.ones(2**20)), torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
    assert 0 <= found.hidden_s <= found.communication_s > 0
    assert "gloo:all_reduce" not in [name for name, _, _ in found.top]


def test_communication_during_compute_is_overlapped():
    """Two ranks in this process: the second joins the collective after the first has computed for a while."""
    store, matrix = torch.distributed.HashStore(), torch.randn(1024, 1024)
    with ThreadPoolExecutor(2) as pool:  # each waits for the other
        first, second = pool.map(lambda rank: torch.distributed.ProcessGroupGloo(store, rank, 2), range(2))

    def work() -> None:
        sent = first.allreduce([torch.ones(4)])
        matrix @ matrix @ matrix
        second.allreduce([torch.ones(4)]).wait()
        sent.wait()

    found = trace(work, torch.device("cpu"))
    assert found.communication_s >= found.hidden_s > 0


def test_readme_s_table_matches_the_records():
    kept = [read_record(path) for path in sorted(records.RECORDS.glob("*.json"))]
    assert sum(PUBLISHED in each.seconds for each in kept) >= 4
    text = records.README.read_text()
    assert records.put(text, records.table(kept)) == text


def test_a_row_has_the_measured_numbers():
    seconds = {OURS: [2.0, 2.0], PUBLISHED: [3.0, 3.0]}
    made = records.table([record(1.0, seconds=seconds, flops=4.0, peak=4.0, machine="a machine"), record(1.0)])
    assert made.startswith("a machine, ") and made.endswith("| training step, nano, batch 4, fp32 | 2.67 | 4 | 1.50 | 50% |")
    with pytest.raises(UsageError, match="has no lines"):
        records.put("no marks", made)


def test_the_table_is_written_between_its_marks_and_nowhere_else(tmp_path, monkeypatch):
    readme, kept = tmp_path / "README.md", tmp_path / "records"
    kept.mkdir()
    measured = record(1.0, seconds={name: [1.0] for name in (OURS, BASELINE, PUBLISHED)}, machine="a machine")
    measured.write(kept / "step.json")
    readme.write_text(f"before\n{records.BEGIN}\nan old table\n{records.END}\nafter\n")
    monkeypatch.setattr(records, "README", readme)
    monkeypatch.setattr(records, "RECORDS", kept)
    monkeypatch.setattr(sys, "argv", ["records", "--write"])
    assert records.main() == 0
    assert readme.read_text() == f"before\n{records.BEGIN}\n{records.table([measured])}\n{records.END}\nafter\n"


def test_a_folder_without_the_published_code_is_refused(tmp_path):
    device = torch.device("cpu")
    with pytest.raises(UsageError, match="is not a checkout of the published code"):
        Published(tmp_path, "xar_b", 0.0, device)
    with pytest.raises(UsageError, match="has no nano; it has: xar_b, xar_l, xar_h"):
        Published(tmp_path, "nano", 0.0, device)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "xar.py").write_text("import not_installed_anywhere")
    with pytest.raises(UsageError, match="cannot be imported: No module named 'not_installed_anywhere'"):
        Published(tmp_path, "xar_b", 0.0, device)


def test_step_and_sample_are_timed_and_compared(tmp_path):
    """Run the programs: a record, its output, and a comparison with a record in which ours took a hundredth of the time."""
    small = ["--model", "nano", "--batch", "2", "--grid", "8", "--repeats", "2"]

    def bench(*words):
        return subprocess.run([sys.executable, "tools/bench.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=400)

    kept = tmp_path / "kept.json"
    done = bench("step", *small, "--json", str(kept), "--trace", str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stderr
    assert "| ours |" in done.stdout and "MFU" in done.stdout
    assert len(done.stdout.split("| longest")[1].splitlines()) == 2 + 10  # which ten depends on the load of the machine
    assert (tmp_path / "trace.json").stat().st_size > 1000
    found = read_record(kept)
    assert found.settings["batch"] == found.images == 2 and found.flops and found.peak and found.data_wait_s is not None
    quick = {name: [each / (100 if name == OURS else 1) for each in taken] for name, taken in found.seconds.items()}
    dataclasses.replace(found, seconds=quick).write(kept)
    slower = bench("step", *small, "--compare", str(kept), "--json", str(kept))  # the record to compare with is read first
    assert slower.returncode == 1 and "bench: step became slower" in slower.stderr

    sampled = bench("sample", *small, "--steps", "2", "--precision", "bf16", "--json", str(kept))
    assert sampled.returncode == 0 and "| ours |" in sampled.stdout and read_record(kept).settings["steps"] == 2


def test_bench_gpu_reports_what_it_could_not_measure(tmp_path, monkeypatch, capsys):
    """A case that times out, one that fails, and no measurement at all."""
    calls = iter([subprocess.TimeoutExpired("bench", 240), subprocess.CompletedProcess([], 1, "", "step\nno memory")])

    def run(*_, timeout, **__):
        assert timeout == bench_gpu.LIMIT_S
        done = next(calls)
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(bench_gpu.subprocess, "run", run)
    monkeypatch.setattr(bench_gpu, "CASES", bench_gpu.CASES[:2])
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--small", "--out", str(tmp_path)])
    assert bench_gpu.main() == 1
    (page,) = tmp_path.glob("*-small.md")
    assert "timed out after 240 s" in page.read_text() and "exited with code 1: no memory" in page.read_text()
    assert f"bench_gpu: no case was measured; {page} says why" in capsys.readouterr().err


def test_bench_gpu_starts_no_case_after_its_minutes_and_reads_no_earlier_record(tmp_path, monkeypatch):
    clock, begun = 0.0, []

    def run(command, **_):
        nonlocal clock
        clock += 59.0
        file = Path(command[-1])
        begun.append(file.exists())
        record(1.0).write(file)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bench_gpu.subprocess, "run", run)
    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: clock)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--small", "--minutes", "1", "--out", str(tmp_path)])
    for _ in range(2):  # the second finds the first's records
        assert bench_gpu.main() == 0
    assert begun == [False, False] * 2
    (page,) = tmp_path.glob("*-small.md")
    assert page.read_text().count("not run: out of time") == len(bench_gpu.CASES) - 2


@pytest.mark.parametrize("case", bench_gpu.CASES, ids=lambda case: case.words)
def test_each_bench_gpu_case_is_a_valid_command(case):
    bench.create_parser().parse_args([*case.words.split(), "--json", "kept.json", "--reference", "xAR"])


@pytest.mark.parametrize("wrong", ["--batch", "--grid"])
def test_zero_images_or_tokens_are_refused(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "step", wrong, "0"])
    assert bench.main() == 64 and "--batch and --grid must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_bench_gpu_without_a_gpu_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--out", str(tmp_path / "out")])
    assert bench_gpu.main() == 64 and "no GPU found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_bench_gpu_has_a_row_for_every_case(tmp_path):
    """One small case runs; the page lists the others as out of time."""
    command = [sys.executable, "tools/bench_gpu.py", "--small", "--minutes", "0.0001", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("*-small.md")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `s")]
    assert len(rows) == len(bench_gpu.CASES) and sum("out of time" in row for row in rows) == len(rows) - 1
    assert len(list((tmp_path / "records").glob("*.json"))) == 1 and "aten::" in page.read_text()
