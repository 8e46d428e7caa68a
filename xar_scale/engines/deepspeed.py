"""DeepSpeed ZeRO-3: parameters, gradients and moments cut over all ranks. The only file that knows DeepSpeed.

Private names are used where DeepSpeed has no public ones, each marked with the version it was read from.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from xar_scale import dist
from xar_scale.config import Config, micro_batches
from xar_scale.data.loader import Batch
from xar_scale.engines.base import Engine, Shard, adam_state, set_steps
from xar_scale.errors import ConfigError
from xar_scale.model.apex import choose_library
from xar_scale.model.xar import XAR, Weight
from xar_scale.optim import create_adamw
from xar_scale.precision import FP32, MODES

# What a ds_config may hold beside what ours decides: DeepSpeed's own affairs
THEIRS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
}
PRECISION = {"bf16", "fp16", "torch_autocast", "amp", "communication_data_type", "data_types"}  # train.precision decides


class DeepSpeedEngine(Engine):
    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        """Raises ConfigError when the DeepSpeed config contradicts ours or asks for what this engine does not run."""
        super().__init__(model, config, device)
        settings = deepspeed_settings(config, dist.world())
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # 0.19.8: on a CPU it would compile a shared-memory all-reduce, a minute and a C++ compiler for something that
        # ZeRO-3, which gathers and reduce-scatters, never calls
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        if choose_library(config.kernels.library, device) == "apex":
            # it would count a step for each sub-group that ZeRO-3 steps, and so correct the moments' bias wrongly
            dist.say("kernels.library apex: its Adam counts steps a parameter group, ZeRO-3 has sub-groups: Adam is torch's")
        try:
            # an empty module: this makes the partitioner and its memory-saving Linear, and converts nothing yet
            partitioner = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=torch.float32)
            for weight in weights:  # 0.19.8: sends rank 0's value to all, then every rank keeps its shard of it
                partitioner._convert_to_zero_parameters([weight.place(device)])
            names = {parameter: name for name, parameter in model.named_parameters()}
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=create_adamw(dict(model.named_parameters()), self.shapes, config.optim),
                config=settings,
            )
        except (ValidationError, deepspeed.DeepSpeedConfigError) as error:
            raise ConfigError(f"{config.train.ds_config}: DeepSpeed refuses it: {' '.join(str(error).split())}") from None
        self.network = self.engine
        # 0.19.8: fp16_groups holds the parameters of each sub-group, whatever their dtype; their shards lie end to end in
        # fp32_partitioned_groups_flat, each ds_tensor.ds_numel long (the last rank's padded)
        self.places = {
            names[parameter]: (parameter, group, offset)
            for group, parameters in enumerate(self.optimizer.fp16_groups)
            for parameter, offset in zip(parameters, _offsets(parameters), strict=True)
        }
        self.order = list(names.values())
        # 0.19.8: those of Linear layers, where it was told of autocast
        self.lowered = [parameter for parameter in names if hasattr(parameter, "comm_dtype")]
        self._let_go()

    def _apply_precision(self) -> None:
        config = self.engine._config
        # 0.19.8: read at each pass, and at each gather and reduction of a parameter
        config.torch_autocast_enabled = self.precision.compute is not FP32
        for parameter in self.lowered:
            parameter.comm_dtype = self.precision.gather
        assert torch.float32 in self.optimizer.ipg_buckets, "no bucket for gradients in float32"
        config.gradient_accumulation_steps = self.passes * self.splits
        self.engine.micro_steps = 0
        self._let_go()

    def forward_backward(self, batch: Batch) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.splits):
            loss = self._loss(part)
            self.engine.backward(loss)  # divides by the passes of a step
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()  # only counts the pass
            total += loss.detach() / self.splits
        return total

    def gradients(self) -> list[Tensor]:
        # 0.19.8: filled by the epilogue of the last pass, a list of flat shards a sub-group
        return [shard for shards in self.optimizer.averaged_gradients.values() for shard in shards]

    def _optimizer_step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def discard(self) -> None:
        # 0.19.8: what its own overflow path does, and the count that engine.step() would have advanced
        self.optimizer._overflow_clean_up(self.optimizer.loss_scale)
        self.engine.micro_steps += 1

    def shards(self) -> Iterator[Shard]:
        for name in self.order:
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
        self._let_go()

    def _let_go(self) -> None:
        # 0.19.8: the master shards are not what the next pass gathers: let go of what is gathered, and copy them there
        self.optimizer._partition_all_parameters()
        for group in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # 0.19.8: what is kept gathered comes back after each step in float32, but in a pass that finds it missing in 16 bits
        if kept := self.optimizer.persistent_parameters:
            kept[0].all_gather(kept)


def _offsets(parameters: list[Any]) -> list[int]:
    offsets = [0]
    for parameter in parameters:
        offsets.append(offsets[-1] + parameter.ds_tensor.ds_numel)
    return offsets[:-1]


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: the user's file with our batch and precision.

    The file holds DeepSpeed's own affairs. Raises ConfigError, naming both keys and values, when it contradicts ours.
    """
    train, path = config.train, config.train.ds_config
    settings = read_settings(path)
    micro, passes = micro_batches(train, world)
    ours: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch", train.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", micro),
        "gradient_accumulation_steps": ("train.global_batch / micro_batch / world", passes),
        "gradient_clipping": ("optim.clip", config.optim.clip),
    }
    for key, (name, value) in ours.items():
        if key in settings and settings[key] != value:
            raise ConfigError(f"{path}: {key} {settings[key]} contradicts {name} {value}")
    for key in sorted(PRECISION):
        if settings.get(key) not in (None, {}, {"enabled": False}):
            raise ConfigError(f"{path}: {key} contradicts train.precision {train.precision}, which decides; remove it")
    for key, name in (("optimizer", "optim.*"), ("scheduler", "optim.warmup_steps and decay_share")):
        if key in settings:
            raise ConfigError(f"{path}: {key} contradicts {name}, which decides; remove it")
    if unknown := sorted(set(settings) - set(ours) - PRECISION - THEIRS):
        raise ConfigError(f"{path}: this engine does not take {unknown[0]}; it takes {', '.join(sorted(THEIRS))}")
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or stage != 3:
        raise ConfigError(f"{path}: zero_optimization.stage {stage}; this version's deepspeed engine runs stage 3")
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            raise ConfigError(f"{path}: zero_optimization.{key} is not supported by this version's deepspeed engine")
    if train.recompute == "selective":
        # 0.19.8: its Linear adds the bias in place, to the very product that selective recomputation has kept and adds it to
        # once more: wrong gradients. What that Linear saves, gathered weights held until the backward pass, recomputation
        # saves too.
        if zero.get("memory_efficient_linear"):
            raise ConfigError(f"{path}: zero_optimization.memory_efficient_linear contradicts train.recompute selective")
        zero["memory_efficient_linear"] = False
    settings |= {key: value for key, (_, value) in ours.items()}
    settings["gradient_clipping"] = 0.0  # Engine.step clips, by the norm that all ranks agreed on
    settings["zero_allow_untested_optimizer"] = True  # torch's AdamW
    if MODES[train.precision].compute is torch.bfloat16:
        # not "bf16", which casts the parameters themselves: with autocast shards stay float32 and precision can change
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings


def read_settings(path: str) -> dict[str, Any]:
    """Raises ConfigError when the file is missing or is not a JSON object."""
    try:
        settings = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"no DeepSpeed config at {path} (train.ds_config)") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path} (train.ds_config): {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__}, not an object")
    return settings
