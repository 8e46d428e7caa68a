"""ZeRO-3: weights, gradients and moments sharded over all ranks; weights gathered for each forward and backward pass, with hpZ
within a sharding group in the backward pass.

Master weights and moments may be in host memory (offload_optimizer), and so may the parameter shards that are gathered
(offload_param).
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.engines.base import Shard, adam_state, set_steps
from xar_scale.engines.deepspeed.engine import DeepSpeedEngine
from xar_scale.model.aligned import mark_weights_gathered
from xar_scale.model.xar import XAR, Weight


class ZeRO3Engine(DeepSpeedEngine):
    def __init__(
        self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device, settings: dict[str, Any]
    ) -> None:
        mark_weights_gathered(model)
        super().__init__(model, weights, config, device, settings)
        names = {parameter: name for name, parameter in model.named_parameters()}
        # 0.19.8: fp16_groups holds the parameters of each sub-group, whatever their dtype. Their shards are contiguous in
        # fp32_partitioned_groups_flat, each ds_tensor.ds_numel long (the last rank's padded)
        self.places = {
            names[parameter]: (parameter, group, offset)
            for group, parameters in enumerate(self.optimizer.fp16_groups)
            for parameter, offset in zip(parameters, _offsets(parameters), strict=False)
        }
        self._release_gathered()

    def _place(self, weights: Iterable[Weight], settings: dict[str, Any]) -> None:
        import deepspeed

        # with an empty module this creates the partitioner and installs its memory-saving Linear, and converts nothing yet
        partitioner = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=torch.float32)
        for weight in weights:  # 0.19.8: broadcasts rank 0's value, then every rank keeps its shard of it
            partitioner._convert_to_zero_parameters([weight.place(self.device)])

    def _apply_precision(self) -> None:
        super()._apply_precision()
        self._release_gathered()

    def gradients(self) -> list[Tensor]:
        # 0.19.8: filled by the last micro-batch. Offloaded: the flat .grad of the master weights; else a list per sub-group,
        # filled by the epilogue
        if self.optimizer.offload_optimizer:
            return [flat.grad for flat in self.optimizer.fp32_partitioned_groups_flat]
        return [shard for shards in self.optimizer.averaged_gradients.values() for shard in shards]

    def _drop_gradients(self) -> None:
        self.optimizer._overflow_clean_up(self.optimizer.loss_scale)  # 0.19.8: what its own overflow path does

    def shards(self) -> Iterator[Shard]:
        for name in self.shapes:
            parameter, group, offset = self.places[name]
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            state = adam_state(self.optimizer.optimizer, flat)
            chunk, total = parameter.ds_tensor.ds_numel, parameter.ds_numel
            start = min(dist.rank() * chunk, total)
            stop = min(start + chunk, total)
            tensors = (flat, state["exp_avg"], state["exp_avg_sq"])
            views = (tensor.detach().narrow(0, offset, stop - start) for tensor in tensors)
            yield Shard(name, parameter.ds_shape, start, stop, *views)

    def shards_written(self, steps: int) -> None:
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            set_steps(self.optimizer.optimizer, flat, steps)
        self._release_gathered()

    def _release_gathered(self) -> None:
        # 0.19.8: the next pass gathers the parameter partitions, not the master shards: free what is gathered and copy the
        # master shards to the partitions
        self.optimizer._partition_all_parameters()
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # 0.19.8: with hpZ, freeing keeps what was gathered as the group's secondary copy, which is used first until a step is
        # taken
        self.optimizer.invalidate_secondary_tensor()
        # 0.19.8: small parameters that stay gathered are float32 after a step, but 16-bit if a pass has to gather them, and
        # DeepSpeed's Linear adds the bias as gathered: in bf16 a resumed run would differ from an uninterrupted one. With
        # selective recomputation that Linear is off, and the first pass must find nothing gathered: otherwise the forward pass
        # would gather differently from its recomputation
        if self.optimizer.persistent_parameters and self.config.train.recompute != "selective":
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)


def _offsets(parameters: list[Any]) -> Iterator[int]:
    return accumulate((parameter.ds_tensor.ds_numel for parameter in parameters), initial=0)
