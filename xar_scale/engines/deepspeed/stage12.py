"""ZeRO-1 and ZeRO-2: replicated weights; fp32 master weights and moments sharded over all ranks, in stage 2 gradients too."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.engines.base import Shard, adam_state, set_steps
from xar_scale.engines.deepspeed.engine import DeepSpeedEngine
from xar_scale.model.xar import XAR, Weight


class ZeRO12Engine(DeepSpeedEngine):
    def __init__(
        self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device, settings: dict[str, Any]
    ) -> None:
        super().__init__(model, weights, config, device, settings)
        names = {parameter: name for name, parameter in model.named_parameters()}
        # 0.19.8: the parameters of a group are contiguous, in the order and at the offsets of round_robin_bit16_*, whatever
        # their dtype and whether or not that order was requested. A rank owns one contiguous range, which may start or end
        # inside a parameter
        self.places = {
            names[parameter]: (group, offset)
            for group, parameters in enumerate(self.optimizer.round_robin_bit16_groups)
            for parameter, offset in zip(parameters, self.optimizer.round_robin_bit16_offsets[group], strict=True)
        }

    def _place(self, weights: Iterable[Weight], settings: dict[str, Any]) -> None:
        for weight in weights:
            weight.place(self.device)

    def gradients(self) -> list[Tensor]:
        # 0.19.8: filled by the last micro-batch: a list per group, of this rank's part of each parameter's gradient, and
        # padding
        return [shard for shards in self.optimizer.averaged_gradients.values() for shard in shards or ()]

    def _drop_gradients(self) -> None:
        # 0.19.8: what its own overflow path does, inline there
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[group] = self.optimizer.all_grad_tensors[group] = None

    def shards(self) -> Iterator[Shard]:
        for name, shape in self.shapes.items():
            group, offset = self.places[name]
            flat = self.optimizer.single_partition_of_fp32_groups[group]
            state = adam_state(self.optimizer.optimizer, flat)
            begin = dist.rank() * flat.numel() - offset  # of this rank's range, relative to the parameter's first element
            start, stop = (min(max(at, 0), shape.numel()) for at in (begin, begin + flat.numel()))
            tensors = (flat, state["exp_avg"], state["exp_avg_sq"])
            views = (tensor.detach()[start - begin : stop - begin] for tensor in tensors)
            yield Shard(name, shape, start, stop, *views)

    def shards_written(self, steps: int) -> None:
        for flat in self.optimizer.single_partition_of_fp32_groups:
            set_steps(self.optimizer.optimizer, flat, steps)
        self.optimizer.update_lp_params()  # 0.19.8: copies master weights to the weights and gathers from all ranks
