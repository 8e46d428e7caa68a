"""The DeepSpeed config of a run: the user's file, which holds DeepSpeed-only keys, merged with what our config decides."""

from typing import Any

import torch
from torch import nn

from xar_scale.config import Config, TrainConfig, micro_batches, read_settings, shard_ranks
from xar_scale.errors import ConfigError
from xar_scale.model.aligned import NarrowingLinear, WideningLinear
from xar_scale.precision import MODES

# The DeepSpeed-only keys that a ds_config may hold, besides those that our config decides
THEIRS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
}
PRECISION = {"bf16", "fp16", "torch_autocast", "amp", "communication_data_type", "data_types"}  # train.precision decides


def deepspeed_settings(config: Config, world: int) -> dict[str, Any]:
    """Return the merged DeepSpeed config.

    Raises ConfigError, naming both keys and values, if the file contradicts our config or asks for something unsupported here.
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
        raise ConfigError(f"{path}: the deepspeed engine does not accept {unknown[0]}; it accepts {', '.join(sorted(THEIRS))}")
    settings["zero_optimization"] = _zero_settings(settings.get("zero_optimization"), train, world)
    settings |= {key: value for key, (_, value) in ours.items()}
    settings["gradient_clipping"] = 0.0  # Engine.step clips, by the norm agreed by all ranks
    settings["zero_allow_untested_optimizer"] = True  # torch's AdamW
    settings["zero_force_ds_cpu_optimizer"] = False  # even where its state is offloaded
    if MODES[train.precision].compute is torch.bfloat16:
        # not "bf16", which casts the parameters themselves: with autocast the shards stay float32 and the precision can change
        # Their weights and gradients are sent in 16 bits. 0.19.8: by exact class, so each subclass has to be named
        linears = [f"{layer.__module__}.{layer.__qualname__}" for layer in (nn.Linear, WideningLinear, NarrowingLinear)]
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": linears}
    return settings


def _zero_settings(given: Any, train: TrainConfig, world: int) -> dict[str, Any]:
    path = train.ds_config
    stage = given.get("stage") if isinstance(given, dict) else None
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage {stage}; the deepspeed engine runs stages 1, 2 and 3")
    zero = dict(given)
    for key in ("offload_optimizer", "offload_param"):
        _check_offload(f"{path}: zero_optimization.{key}", zero.get(key), stage)
    ranks = shard_ranks(train, world)
    if ranks != world and stage != 3:
        raise ConfigError(
            f"train.shard_ranks {ranks} shards weights, and {path}: zero_optimization.stage {stage} does not; "
            "use stage 3, or leave train.shard_ranks unset"
        )
    neighbours = {"zero_hpz_partition_size": 1 if ranks == world else ranks}  # 1 in DeepSpeed: no hpZ
    for key, value in {**neighbours, "mics_shard_size": -1}.items():
        if zero.get(key, value) != value:
            raise ConfigError(
                f"{path}: zero_optimization.{key} {zero[key]} contradicts train.shard_ranks {train.shard_ranks}, "
                "which decides; remove it"
            )
    if ranks != world:
        zero |= neighbours
    if stage == 3 and train.recompute == "selective":
        # 0.19.8: its Linear adds the bias in place to the product that selective recomputation keeps, and recomputation then
        # adds the bias once more: wrong gradients. That Linear exists so that gathered weights are not held until the backward
        # pass; recomputation avoids that too.
        if zero.get("memory_efficient_linear"):
            raise ConfigError(f"{path}: zero_optimization.memory_efficient_linear contradicts train.recompute selective")
        zero["memory_efficient_linear"] = False
    return zero


def _check_offload(key: str, given: Any, stage: int) -> None:
    """Accept offload to host memory only, of the whole state, stepped by torch's AdamW. Raises ConfigError otherwise."""
    if given is None:
        return
    if not isinstance(given, dict):
        raise ConfigError(f"{key} {given!r} is not an object")
    device = given.get("device", "none")
    if device not in ("none", "cpu"):
        raise ConfigError(f"{key}.device {device}: only cpu offload is supported, as checkpoints read shards from memory")
    if device == "cpu" and stage != 3:
        # 0.19.8: there it waits for the device once per parameter and step, and accumulates unsharded gradients in host memory
        raise ConfigError(f"{key}.device cpu with stage {stage}: the deepspeed engine offloads in stage 3 only")
    if given.get("ratio", 1.0) != 1.0 or given.get("super_offload"):
        raise ConfigError(f"{key}: ratio and super_offload are for DeepSpeed's own Adam; AdamW here is torch's; remove them")
