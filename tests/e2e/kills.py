"""Trains a run to its end although it is killed again and again while it saves.

``python -m tests.e2e.kills FOLDER DATA KILLS``.

Every child goes on from where the one before it was killed: half of them by themselves, before or after a call that reaches the
disk, one such call after another, the others from outside, at a random moment. Prints, of each kill, what it was in the middle
of, and the step of the newest valid checkpoint before and after it.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.conftest import digits_config
from xar_scale.checkpoint.manifest import checkpoint_paths, newest_valid, step_of
from xar_scale.train import train

STEPS = 220
CALLS = ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"))  # that a save consists of
FIRST_CALL = 40  # of two saves that come before


def configured(data: str) -> Any:
    sizes = ("model.width=16", "model.heads=2", "train.global_batch=8", "data.workers=0", "guard.snapshots=0")
    every = ("train.checkpoint_every=1", "train.keep_last=2", "train.log_every=50", f"train.steps={STEPS}")
    return digits_config(f"data.path={data}", "train.engine=single", "optim.warmup_steps=5", *sizes, *every)


def trained(folder: Path, data: str) -> None:
    sys.stdout = sys.stderr
    train(configured(data), folder)


def killed_at_call(number: int, folder: Path, data: str) -> None:
    """Before the call ``number // 2`` of those that a thread which saves makes, or after it."""
    count = [0]

    def counted(place: Any, name: str) -> Callable[..., Any]:
        exact = getattr(place, name)

        def call(*arguments: Any, **options: Any) -> Any:
            saving = threading.current_thread().name.startswith("checkpoint")
            for at in ("before", "after"):
                if saving:
                    if count[0] == number:
                        os.write(1, f"{at} {name} {Path(str(arguments[0])).name}\n".encode())
                        os.kill(os.getpid(), signal.SIGKILL)
                    count[0] += 1
                if at == "before":
                    result = exact(*arguments, **options)
            return result

        return call

    for place, name in CALLS:
        setattr(place, name, counted(place, name))
    trained(folder, data)


def child(work: Callable[[], None], kill_when: Callable[[], bool] | None = None) -> tuple[int, str]:
    """How a process that does ``work`` ends, and what it says last. It is killed soon after ``kill_when``."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        work()
        os._exit(0)
    os.close(writing)
    if kill_when is not None:
        while not kill_when():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.strip()


def newest_step(run: Path) -> int:
    found = newest_valid(run)
    return found.manifest.step if found else 0


def written(run: Path) -> int:
    return max(map(step_of, checkpoint_paths(run)), default=0)


def main(folder: Path, data: str, kills: int) -> None:
    torch.set_num_threads(1)
    assert child(partial(trained, folder / "undisturbed", data))[0] == 0
    run, report = folder / "killed", []
    for number in range(kills):
        before = newest_step(run)
        if number % 2:
            code, said = child(partial(trained, run, data), lambda before=before: written(run) > before)
            said = said or "at a random moment"
        else:
            code, said = child(partial(killed_at_call, FIRST_CALL + number // 2, run, data))
        report.append({"code": code, "during": said, "before": before, "after": newest_step(run)})
    code, _ = child(partial(trained, run, data))
    print(json.dumps({"kills": report, "end": code}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
