"""Training with data faults: bad samples, a store behind a URL, killed workers, ranks and jobs."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.object_store import object_store
from tests.processes import Ended, assert_one_line, finish, kill, launch, start
from xar_scale.checkpoint.manifest import read_manifest
from xar_scale.evaluate.digits import cache_digits

STEPS = 24
SETTINGS = ["train.global_batch=96", "train.log_every=1", "optim.warmup_steps=1", "train.label_drop=0.1"]
SINGLE = ["train.engine=single"]
SMALL = ["model.width=32", "model.heads=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    cache_digits(folder / "data", samples_per_shard=100)
    return folder


def words(folder: Path, run: str, data: str | Path, *more: str) -> list[str]:
    own = ["--recipe", "digits", "--run-dir", str(folder / run), f"data.path={data}", f"train.steps={STEPS}", *SETTINGS]
    return ["-m", "xar_scale", "train", *own, *more]


def train(folder: Path, run: str, data: str | Path, *more: str, world: int = 1, **environment: str) -> Ended:
    return launch(world, words(folder, run, data, *more), folder / "logs" / run, **environment)


def log(run: Path, *names: str) -> list[tuple]:
    """What was logged for every step, in order; no step is missing or logged twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [tuple(line[name] for name in names) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(folder):
    ended = train(folder, "undisturbed", folder / "data", *SINGLE)
    assert ended.codes == [0], ended.text
    losses = log(folder / "undisturbed", "loss", "grad_norm")
    assert len(set(losses)) == STEPS
    return losses


def test_bad_samples_are_skipped_alike_on_any_number_of_ranks_and_counted_over_the_run(folder):
    data = folder / "damaged"
    shutil.copytree(folder / "data", data)
    (data / "digits-000003.tar").unlink()  # and with it 100 samples
    content = np.fromfile(data / "digits-000005.tar", np.uint8)
    index = json.loads((data / "digits-000005.index.json").read_text())
    content[np.array(index["latent"]["data"])[:7] + 130] ^= 1
    content.tofile(data / "digits-000005.tar")
    budget = "data.max_bad_samples=107"
    alone = train(folder, "bad1", data, *SINGLE, *SMALL, budget, "train.checkpoint_every=10", "train.keep_last=9")
    assert alone.codes == [0], alone.text
    assert f"shard {data}/digits-000003.tar is missing: its 100 samples will be skipped" in alone.text
    more = [*SMALL, "train.micro_batch=16"]  # under ZeRO-3, three micro-batches per step
    together = train(folder, "bad2", data, *more, budget, world=2)
    assert together.codes == [0, 0], together.text
    one, two = (log(folder / run, "loss", "bad_samples") for run in ("bad1", "bad2"))
    assert [count for _, count in one] == [count for _, count in two] and one[0][1] < one[-1][1] == 107  # an epoch is 19 steps
    np.testing.assert_allclose([loss for loss, _ in one], [loss for loss, _ in two], rtol=1e-5)
    assert said(alone) == said(together)
    assert sum(count for count, _ in said(alone)) == one[-1][1]
    assert [what for _, what in said(alone)].count(f"shard {data}/digits-000003.tar is missing") <= 19  # one line per step

    # A resumed run knows them
    middle = folder / "bad1" / "checkpoints" / "step-00000010"
    known = read_manifest(middle).manifest.bad_samples
    assert len(known) == one[9][1] and {shard for shard, _ in known} == {"digits-000003", "digits-000005"}
    again = train(folder, "bad1-again", data, *SINGLE, *SMALL, budget, "--resume", str(middle))
    assert again.codes == [0], again.text
    assert sum(count for count, _ in said(again)) == 107 - len(known)
    over = train(
        folder, "over", data, "train.engine=fsdp2", *SMALL, "data.max_bad_samples=104", "train.checkpoint_every=10", world=2
    )
    assert_one_line(over, 65, "digits-00000", "data.max_bad_samples is 104")
    last = max(path.name for path in (folder / "over" / "checkpoints").glob("step-*"))
    assert one[int(last[5:]) - 1][1] <= 104 < one[int(last[5:])][1]  # the step before the one that would have been too many


def said(ended: Ended) -> list[tuple[int, str]]:
    """The numbers of samples that were skipped, and why, in the order of the lines."""
    line = r"^skipped (\d+) bad samples: (.*) \(\d+ so far, data.max_bad_samples 107\)$"
    found = re.findall(line, ended.text, re.MULTILINE)
    return [(int(count), what) for count, what in found]


def test_a_set_in_an_object_store_trains_as_on_disk(folder, undisturbed):
    with object_store() as store:
        url = store.put(folder / "data", "bucket", "latents/digits")
        more = [f"data.cache={folder / 'cache'}", "data.cache_gb=0.01"]
        ended = train(folder, "remote", url, *SINGLE, *more, **store.environment)
        assert ended.codes == [0], ended.text
        assert log(folder / "remote", "loss", "grad_norm") == undisturbed
        assert {times for path, times in store.gets.items() if path.endswith(".tar")} == {1}  # two workers, one download

        store.delete(url, "digits-000007.tar")
        shutil.rmtree(folder / "cache")
        ended = train(folder, "remote-missing", url, *more, world=2, **store.environment)
        assert_one_line(ended, 65, f"{url}/digits-000007.tar is missing (bad samples: ", "data.max_bad_samples is 0)")


def children(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def wait_for_steps(run: Path, steps: int, rank: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < steps:
        assert rank.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.005)


def test_a_worker_killed_in_training_is_not_noticed_in_the_losses(folder, undisturbed):
    logs = folder / "logs" / "worker"
    ranks = start(1, words(folder, "worker", folder / "data", *SINGLE, "data.workers=2"), logs)

    def kill_workers() -> None:
        for steps in sorted(random.sample(range(1, STEPS - 8), 2)):
            wait_for_steps(folder / "worker", steps, ranks[0])
            os.kill(random.choice(children(ranks[0])), signal.SIGKILL)

    ended = finish(ranks, logs, kill_workers)
    assert ended.codes == [0], ended.text
    assert log(folder / "worker", "loss", "grad_norm") == undisturbed
    assert "rank 0: " in ended.text and "; restarting its data workers" in ended.text


@pytest.mark.long
def test_a_job_killed_at_random_moments_sees_what_an_undisturbed_one_sees(folder, undisturbed):
    logs, run = folder / "logs" / "killed", folder / "killed"
    arguments = words(folder, "killed", folder / "data", *SINGLE, "train.checkpoint_every=3")
    for moment in sorted(random.sample(range(1, STEPS - 1), 3)):
        ranks = start(1, arguments, logs)
        try:
            wait_for_steps(run, moment, ranks[0])
            time.sleep(random.uniform(0, 0.1))
        finally:
            kill(ranks)
    ended = finish(start(1, arguments, logs), logs)
    assert ended.codes == [0], ended.text
    assert log(run, "loss", "grad_norm") == undisturbed


def test_synthetic_latents_need_no_disk(folder):
    ended = train(folder, "synthetic", "synthetic:1000", *SINGLE)
    assert ended.codes == [0], ended.text
    assert "1,000 samples" in ended.text
