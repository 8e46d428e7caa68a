"""``xar-scale`` with faults planted in training: ``python -m tests.injected 'FAULTS' train ...``, FAULTS a JSON list.

The product has no switch for faults: they are planted from outside, around the engine's attempts at steps.
"""

import contextlib
import errno
import json
import math
import os
import runpy
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xar_scale import dist
from xar_scale.checkpoint import store
from xar_scale.checkpoint.files import Fingerprint, Range
from xar_scale.data.feed import Feed
from xar_scale.data.loader import Batch, LatentDataset
from xar_scale.engines import replicated
from xar_scale.engines.base import Engine, Verdict

SCALE = 2.0**17  # a power of two: float32 computes with scaled weights what it computed before
SCALED = ("in_proj.weight", "in_proj.bias", "encoder_pos")  # what a norm stands behind


@dataclass(frozen=True)
class Fault:
    """What is planted on rank ``rank`` (of data, passes and their activations) in steps ``step`` to ``until``.

    loss, gradient, activation (the latter only while compute is bf16), latent (of the step's third sample; but for ``once``
    wherever it comes from then on), weight, moment: a NaN or ``value``. overflow: weights scaled so that fp16 overflows, on all
    ranks, and scaled back after. disk, defect: what writes a checkpoint meets a full disk, or a mistake.
    sleep: before the pass, for ``value`` seconds. slow: each Linear layer computes ``value`` seconds longer. late: reading the
    step's data takes ``value`` seconds longer.
    """

    kind: str
    step: int
    until: int | None = None  # beyond the last step; none: that one step
    rank: int = 1
    once: bool = False  # at the first attempt only
    value: float = math.nan

    def active(self, step: int, attempts: int) -> bool:
        return self.step <= step < (self.until or self.step + 1) and (attempts == 1 or not self.once)


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(context: Any, x: Tensor, value: float) -> Tensor:
        context.value = value
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.value, None


class Planter:
    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = faults
        self.attempts = Counter[int]()
        self.keys = dict[Fault, str]()  # of the sample whose latent is spoilt
        self.taken_from = 0  # steps
        self.scaled = False
        self.step = 0
        self.attempt, self.take, self.write = Engine.attempt, Feed.take, store.write_file
        self.getitems = LatentDataset.__getitems__

    def __call__(self, engine: Engine, step: int, batches: Sequence[Batch], *more: Any) -> Verdict:
        self.attempts[step] += 1
        self.step = step
        with contextlib.ExitStack() as planted:
            for fault in self.faults:
                if fault.kind == "overflow":
                    self.overflow(fault, engine, step)
                elif fault.kind not in ("latent", "late", "disk", "defect") and fault.active(step, self.attempts[step]):
                    if fault.kind in ("weight", "moment"):
                        self.state(fault, engine, step)
                    elif dist.rank() == fault.rank:
                        planted.enter_context(getattr(self, fault.kind)(fault, engine))
            return self.attempt(engine, step, batches, *more)

    @contextlib.contextmanager
    def loss(self, fault: Fault, engine: Engine) -> Iterator[None]:
        exact = engine._loss
        engine._loss = lambda batch: exact(batch) * fault.value  # type: ignore[method-assign]
        yield
        engine._loss = exact  # type: ignore[method-assign]

    # hooks come before those that watch

    @contextlib.contextmanager
    def gradient(self, fault: Fault, engine: Engine) -> Iterator[None]:
        def poison(module: nn.Module, inputs: Any, output: Tensor) -> Any:
            return Poison.apply(output, fault.value)

        hook = engine.model.blocks[1].register_forward_hook(poison, prepend=True)
        yield
        hook.remove()

    @contextlib.contextmanager
    def activation(self, fault: Fault, engine: Engine) -> Iterator[None]:
        def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            device = output.device.type
            mixed = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
            return output.roll(1, dims=-1) * fault.value if mixed else output  # wrong also where the value is a number

        hook = engine.model.blocks[2].register_forward_hook(spoil, prepend=True)
        yield
        hook.remove()

    @contextlib.contextmanager
    def sleep(self, fault: Fault, engine: Engine) -> Iterator[None]:
        time.sleep(fault.value)
        yield

    @contextlib.contextmanager
    def slow(self, fault: Fault, engine: Engine) -> Iterator[None]:
        layers = [module for module in engine.model.modules() if isinstance(module, nn.Linear)]
        hooks = [layer.register_forward_hook(lambda *_: time.sleep(fault.value), prepend=True) for layer in layers]
        yield
        for hook in hooks:
            hook.remove()

    def read(self, dataset: LatentDataset, numbers: Sequence[int]) -> Batch:
        """In a data worker."""
        for fault in self.faults:
            step = numbers[0] // dataset.config.train.global_batch
            if fault.kind == "late" and dist.rank() == fault.rank and fault.active(step, 1):
                time.sleep(fault.value)
        return self.getitems(dataset, numbers)

    def taken(self, feed: Feed, *more: Any) -> list[Batch]:
        batches, self.taken_from = self.take(feed, *more), self.taken_from + 1
        return [self.latent(batch) for batch in batches]

    def latent(self, batch: Batch) -> Batch:
        for fault in self.faults:
            if fault.kind != "latent" or dist.rank() != fault.rank:
                continue
            first = fault not in self.keys and self.taken_from > fault.step
            if first:
                self.keys[fault] = batch.keys[2]
            if self.keys.get(fault) in batch.keys and (first or not fault.once):
                latents = batch.latents.clone()
                latents[batch.keys.index(self.keys[fault]), 1, 2, 3] = fault.value
                batch = replace(batch, latents=latents)
        return batch

    def written(self, path: Path, parts: Sequence[Range]) -> Fingerprint:
        for fault in self.faults:
            if fault.kind in ("disk", "defect") and dist.rank() == fault.rank and fault.active(self.step, 1):
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                raise full if fault.kind == "disk" else RuntimeError("planted")
        return self.write(path, parts)

    def state(self, fault: Fault, engine: Engine, step: int) -> None:
        """One number of this rank's; every rank calls this, since engines may refresh together what they keep of weights."""
        if dist.rank() == fault.rank:
            owned = (shard for shard in engine.shards() if shard.master.numel() and shard.name.endswith("proj.weight"))
            shard = min(owned, key=lambda shard: shard.name != "mid_proj.weight")  # which not every engine has on every rank
            (shard.master if fault.kind == "weight" else shard.exp_avg)[0] = fault.value
        engine.shards_written(step)

    def overflow(self, fault: Fault, engine: Engine, step: int) -> None:
        wanted = fault.active(step, 1)
        if wanted == self.scaled:
            return
        for shard in engine.shards():
            if shard.name in SCALED:
                shard.master.mul_(SCALE if wanted else 1 / SCALE)
        engine.shards_written(step)
        self.scaled = wanted


class Announced(replicated.Graphs):
    """Print a line when a micro-batch is captured on a GPU."""

    def _capture(self, *arguments: Any) -> Any:
        print("a pass is captured", flush=True)
        return super()._capture(*arguments)


def main() -> None:
    replicated.Graphs = Announced  # type: ignore[misc]
    planter = Planter([Fault(**values) for values in json.loads(sys.argv[1])])
    Engine.attempt = lambda engine, *arguments: planter(engine, *arguments)  # type: ignore[method-assign]
    Feed.take = lambda feed, *more: planter.taken(feed, *more)  # type: ignore[method-assign]
    LatentDataset.__getitems__ = lambda dataset, numbers: planter.read(dataset, numbers)  # type: ignore[method-assign]
    store.write_file = planter.written
    sys.argv = ["xar-scale", *sys.argv[2:]]
    runpy.run_module("xar_scale", run_name="__main__")


if __name__ == "__main__":
    main()
