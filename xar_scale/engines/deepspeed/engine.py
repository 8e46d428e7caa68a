"""What the ZeRO stages share: DeepSpeed's engine, its micro-batches and its precision."""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.engines.base import Engine
from xar_scale.errors import ConfigError
from xar_scale.model.apex import choose_library
from xar_scale.model.xar import XAR, Weight
from xar_scale.optim import create_adamw
from xar_scale.precision import FP32


class DeepSpeedEngine(Engine):
    def __init__(
        self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device, settings: dict[str, Any]
    ) -> None:
        """``settings``: DeepSpeed's config. Raises ConfigError if DeepSpeed rejects it."""
        super().__init__(model, config, device)
        self.replicas = 1  # even with hpZ, gradients are sharded over all ranks
        import deepspeed

        # 0.19.8 calls collectives by names that torch 2.14 deprecates
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # 0.19.8: on a CPU it would compile a shared-memory all-reduce, which takes a minute and a C++ compiler. ZeRO never
        # calls it: its collectives are torch.distributed's
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        if choose_library(config.kernels.library, device) == "apex":
            # apex's Adam would count a step for each sub-group that ZeRO-3 steps, and correct the moments' bias wrongly
            dist.say("kernels.library apex: its Adam counts steps per parameter group, not per ZeRO-3 sub-group; using torch's")
        offload = settings["zero_optimization"].get("offload_optimizer") or {}
        stepped_on = torch.device("cpu") if offload.get("device") == "cpu" else device
        try:
            self._place(weights, settings)
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=create_adamw(dict(model.named_parameters()), self.shapes, config.optim, stepped_on),
                config=settings,
            )
        except (ValidationError, deepspeed.DeepSpeedConfigError) as error:
            raise ConfigError(f"{config.train.ds_config}: DeepSpeed rejects it: {' '.join(str(error).split())}") from None
        self.network = self.engine
        # 0.19.8: the parameters of Linear layers, where torch_autocast is configured
        self.autocast_parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "comm_dtype")]

    @abstractmethod
    def _place(self, weights: Iterable[Weight], settings: dict[str, Any]) -> None:
        """Give the model its parameters, in the form that this stage needs before DeepSpeed wraps the model."""

    def load_universal(self, folder: str, tag: str) -> None:
        """Load a universal checkpoint, converted by DeepSpeed's own tool, with DeepSpeed's own loader. For comparisons."""
        self.engine._config.load_universal_checkpoint = True  # 0.19.8
        self.engine.load_checkpoint(folder, tag=tag)

    def _apply_precision(self) -> None:
        config = self.engine._config
        # 0.19.8: read in each forward pass, and at each gather and reduction of a parameter
        config.torch_autocast_enabled = self.precision.compute is not FP32
        for parameter in self.autocast_parameters:
            parameter.comm_dtype = self.precision.gather
        assert torch.float32 in self.optimizer.ipg_buckets, "no bucket for gradients in float32"
        config.gradient_accumulation_steps = self.accumulation_steps * self.splits
        self.engine.micro_steps = 0

    def forward_backward(self, batch: Batch) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.splits):
            loss = self._loss(part)
            self.engine.backward(loss)  # divides by the micro-batches of a step
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()  # only counts the micro-batch
            total += loss.detach() / self.splits
        return total

    def _optimizer_step(self) -> None:
        self.engine.step()

    def discard(self) -> None:
        self._drop_gradients()
        self.engine.micro_steps += 1  # 0.19.8: engine.step() would have counted it

    @abstractmethod
    def _drop_gradients(self) -> None: ...
