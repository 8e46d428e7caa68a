"""A tiny model in training on one process, and its checkpoints."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.conftest import digits_config, random_batch
from xar_scale import dist
from xar_scale.checkpoint.load import state_kinds
from xar_scale.checkpoint.manifest import Manifest
from xar_scale.checkpoint.mirror import Mirror
from xar_scale.checkpoint.store import Store
from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.data.order import Position
from xar_scale.data.shards import DatasetInfo, ShardInfo
from xar_scale.ema import EMA, ema_widths
from xar_scale.engines import create_engine
from xar_scale.guard import GuardState
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import initial_weights, meta_model

CONFIG = digits_config("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8")
INFO = DatasetInfo(
    tokenizer={"name": "pixel", "patch": 2, "image_channels": 1},
    latent_scale=1.0,
    stored="latents",
    shape=(4, 4, 4),
    dtype="float16",
    classes=10,
    flipped=False,
    shards=(ShardInfo("a", 100, 1, 0, 0),),
)


class Run:
    """A tiny model in training, and its store."""

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        keep_last: int = 2,
        config: Config = CONFIG,
        info: DatasetInfo = INFO,
        keep_every: int | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.config, self.info = config, info
        model = meta_model(config.model)
        apply_recompute(model.blocks, config.train.recompute, compiled=config.kernels.compile)
        self.engine = create_engine(model, initial_weights(model, seed), config, torch.device("cpu"))
        self.ema = EMA([shard.master for shard in self.engine.shards()], 0.9, ema_widths(config.optim))
        settings = replace(config.train, keep_last=keep_last, keep_every=keep_every)
        self.store, self.step = Store(folder, self.engine, self.ema, settings, mirror), 0

    def train(self, steps: int = 1, batch: Callable[[int], Batch] = random_batch) -> None:
        for _ in range(steps):
            verdict = self.engine.agree(self.engine.forward_backward(batch(self.step)), torch.zeros(()))
            self.engine.step(1e-2, verdict)
            self.step += 1
            self.ema.update(self.step)

    def save(self) -> Path:
        """A checkpoint, and wait for it."""
        self.store.save(self.manifest())
        self.store.finish()
        assert self.store.newest is not None
        return self.store.newest

    def manifest(self, **changes: Any) -> Manifest:
        """Of the state as it is."""
        consumed = self.step * self.config.train.global_batch
        values = {
            "step": self.step,
            "seed": self.config.train.seed,
            "samples_consumed": consumed,
            "position": Position(*divmod(consumed, self.info.samples)),
            "bad_samples": [],
            "quarantined": [],
            "guard": GuardState(),
            "dataset": {
                "samples": self.info.samples,
                "fingerprint": self.info.fingerprint,
                "tokenizer": self.info.tokenizer,
                "latent_scale": self.info.latent_scale,
            },
            "world": dist.world(),
            "engine": self.config.train.engine,
            "precision": self.engine.mode,
            "config": self.config.to_dict(),
            "shapes": {name: list(shape) for name, shape in self.engine.shapes.items()},
            "kinds": state_kinds(self.ema),
        }
        return Manifest(**(values | changes))

    def state(self) -> list[torch.Tensor]:
        shards = [tensor.clone() for s in self.engine.shards() for tensor in (s.master, s.exp_avg, s.exp_avg_sq)]
        return shards + [average.clone() for average in self.ema.tensors]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def poll_until(run: Run, what) -> None:
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < 200
        run.store.poll()
        time.sleep(0.001)
