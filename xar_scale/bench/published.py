"""Runs the published code unchanged from a checkout that the user provides. None of it is included here."""

import contextlib
import copy
import importlib
import importlib.util
import io
import math
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xar_scale.errors import UsageError
from xar_scale.precision import autocast

NAMES = {"xar_b": "xar_base", "xar_l": "xar_large", "xar_h": "xar_huge"}
CLIP, BETAS, WEIGHT_DECAY, EMA_DECAY = 1.0, (0.9, 0.96), 0.02, 0.9999  # of its training


class Published:
    """The published network, and a training step as its loop does it: the host reads the loss, PyTorch's default AdamW, and
    EMA one parameter at a time.

    Raises UsageError if the folder is not such a checkout, has no such model, or cannot be imported.
    """

    def __init__(self, folder: Path, model: str, dropout: float, device: torch.device) -> None:
        if model not in NAMES:
            raise UsageError(f"the published code has no {model}; it has: {', '.join(NAMES)}")
        self.device = device
        with self._as_it_expects(), device:  # created there: one core takes half a minute to draw a billion weights
            create = getattr(_import(folder), NAMES[model])
            self.network: torch.nn.Module = create(attn_dropout=dropout, proj_dropout=dropout).to(device)
        self.weights = list(self.network.parameters())
        self.optimizer: torch.optim.Optimizer | None = None
        self.ema: list[Tensor] = []

    def step(self, latents_BCHW: Tensor, labels_B: Tensor, compute: torch.dtype) -> None:
        """Forward, backward, clipping, AdamW, EMA. The network draws times and noise itself."""
        if self.optimizer is None:
            groups = [[weight for weight in self.weights if (weight.ndim > 1) == matrix] for matrix in (True, False)]
            decays = zip(groups, (WEIGHT_DECAY, 0.0), strict=True)
            options = [{"params": group, "weight_decay": decay} for group, decay in decays]
            self.optimizer = torch.optim.AdamW(options, lr=1e-4, betas=BETAS)
            self.ema = copy.deepcopy(self.weights)
            self.network.train()
        with self._as_it_expects(), autocast(self.device, compute):
            loss = self.network(latents_BCHW, labels_B)
        if not math.isfinite(loss.item()):
            raise UsageError("the published code's loss is not finite")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, weight in zip(self.ema, self.weights, strict=True):
            average.detach().mul_(EMA_DECAY).add_(weight, alpha=1 - EMA_DECAY)

    @torch.no_grad()
    def sample(self, labels: Sequence[int], steps: int, guidance: float, compute: torch.dtype) -> Tensor:
        """Return latents from its Euler-Maruyama sampler."""
        self.network.eval()
        with self._as_it_expects(), autocast(self.device, compute):
            latents: Tensor = self.network.sample_tokens(steps, guidance, torch.tensor(labels, device=self.device))  # type: ignore[operator]
        return latents

    @contextlib.contextmanager
    def _as_it_expects(self) -> Iterator[None]:
        """Silence its prints, and redirect its ``.cuda()`` calls to the device."""
        known, torch.Tensor.cuda = torch.Tensor.cuda, lambda tensor, *_, **__: tensor.to(self.device)  # type: ignore[method-assign]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            torch.Tensor.cuda = known  # type: ignore[method-assign]


def _import(folder: Path) -> Any:
    if not (folder / "models" / "xar.py").is_file():
        raise UsageError(f"{folder} is not a checkout of the published code: it has no models/xar.py")
    stand_ins: dict[str, types.ModuleType] = {}
    if importlib.util.find_spec("flash_attn") is None:  # it imports the name but never calls it
        absent = types.ModuleType("flash_attn")
        absent.flash_attn_func = None  # type: ignore[attr-defined]
        stand_ins["flash_attn"] = absent
    sys.path.insert(0, str(folder))
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("models.xar")
    except Exception as error:  # not our file: anything may be wrong with it
        raise UsageError(f"{folder} cannot be imported: {error}") from None
    finally:
        sys.path.remove(str(folder))
        for name in stand_ins:
            del sys.modules[name]
