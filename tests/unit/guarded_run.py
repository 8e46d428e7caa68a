"""A tiny run with the guard's recovery, on one process."""

import json

import torch

from tests.conftest import digits_config, random_batch
from tests.unit.tiny_run import Run
from xar_scale.guard import GuardState
from xar_scale.recovery import Recovery

TINY = ("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8")
NAN = float("nan")


class Guarded(Run):
    """A tiny run with its recovery."""

    def __init__(self, folder, *overrides: str, splits: int = 1) -> None:
        super().__init__(folder, config=digits_config(*TINY, *overrides))
        self.recovery = Recovery(self.config, self.engine, self.ema, ["a"], self.store, GuardState(), splits)
        self.folder = folder

    def resolve(self, batch=None, step: int = 5):
        batches = [batch or random_batch(step)]
        return self.recovery.resolve(step, batches, self.recovery.attempt(step, batches))

    def spoil(self, monkeypatch, times: int, when=lambda engine: True) -> None:
        """The loss of the next ``times`` passes for which ``when`` holds."""
        exact, left = self.engine._loss, [times]

        def loss(batch):
            spoilt = left[0] > 0 and when(self.engine)
            left[0] -= spoilt
            return exact(batch) * (NAN if spoilt else 1)

        monkeypatch.setattr(self.engine, "_loss", loss)

    def report(self) -> dict:
        (path,) = (self.folder / "reports").glob("*.json")
        return json.loads(path.read_text())


def gradients(run: Run) -> list[torch.Tensor]:
    return [gradient.clone() for gradient in run.engine.gradients()]
