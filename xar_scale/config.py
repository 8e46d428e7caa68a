"""The configuration: frozen dataclasses, validated on construction; every field is read somewhere."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from xar_scale.errors import ConfigError, FileError, UsageError
from xar_scale.validation import STRICT, known_keys, unknown_key, validated

# only a mistake exceeds these; further on it would end in an overflow
MAX_WIDTH, MAX_TOKENS = 2**17, 2**20
MAX_LR = 1e3  # AdamW moves a weight by about this much per step

Fraction = Annotated[float, Field(ge=0, lt=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Recompute = Literal["none", "full", "selective", "offload"]
EngineName = Literal["single", "ddp", "fsdp2", "deepspeed"]
KernelLibrary = Literal["auto", "torch", "apex"]
AttentionBackend = Literal["auto", "dense", "masked", "prefix", "flex", "flash"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """Sizes of one xAR network. The published models differ in width, depth and heads only."""

    width: int = Field(gt=0, le=MAX_WIDTH)
    depth_encoder: int = Field(gt=0)
    depth_decoder: int = Field(gt=0)
    heads: int = Field(gt=0)
    channels: int = Field(default=16, gt=0)  # channels per latent token
    grid: tuple[PositiveInt, PositiveInt] = (16, 16)  # rows and columns of tokens
    entity: Literal["patch", "cell", "subsample", "scale", "image"] = "cell"
    # cell: tokens per side; subsample: stride; scale: number of scales. None: at most half the grid; 2; as many as halve evenly
    entity_size: int | None = Field(default=None, gt=0)
    classes: int = Field(default=1000, gt=0)  # the null class is added after these
    mlp_ratio: float = Field(default=4.0, gt=0)
    time_bins: int = Field(default=1000, gt=0)  # the network sees floor(time_bins * t)
    dropout: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        if self.head_width % 4:
            raise ConfigError(
                f"model.width {self.width} / model.heads {self.heads} = {self.head_width} channels per head: "
                "2-D rotary positions need a multiple of 4"
            )
        rows, columns = self.grid
        if rows * columns > MAX_TOKENS:
            raise ConfigError(f"model.grid {rows}x{columns} has {rows * columns:,} tokens, the most is {MAX_TOKENS:,}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """Where the latents are and how they are read."""

    path: str = ""  # a folder; a URL that fsspec opens (s3://, gs://, https://); synthetic[:SAMPLES]
    cache: str = ""  # node-local folder for files from a URL; empty: in the system's temporary folder
    cache_gb: float = Field(default=64.0, gt=0)  # size limit of the cache
    max_bad_samples: int = Field(default=0, ge=0)  # distinct bad samples that a run may skip before it stops
    workers: int = Field(default=2, ge=0)  # processes per rank
    prefetch: int = Field(default=4, gt=0)  # batches ahead per worker
    lanes: int = Field(default=1, gt=0)  # equal parts of the shards; each supplies the same number of samples per global batch
    window: int = Field(default=8192, gt=0)  # samples of a lane that are shuffled together
    flip: bool = False  # take half of the samples from their mirrored latents


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimConfig:
    """AdamW, the learning-rate schedule, gradient clipping and the EMA."""

    lr: float = Field(gt=0, le=MAX_LR)
    final_lr: float = Field(default=0.0, ge=0, le=MAX_LR)
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: float = Field(default=0.0, ge=0, le=1)  # last fraction of the run's steps: cosine decay to final_lr
    betas: tuple[Fraction, Fraction] = (0.9, 0.96)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema_decay: Fraction = 0.9999
    ema_snapshots_every: int | None = Field(default=None, gt=0)  # steps between power-function EMA snapshots; None: never


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """One run: its length, batch sizes and engine."""

    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)  # samples per rank and micro-batch; None: no gradient accumulation
    seed: int = Field(default=0, ge=0, lt=2**64)
    label_drop: float = Field(default=0.1, ge=0, le=1)
    engine: EngineName = "deepspeed"
    ds_config: str = "ds_configs/zero3.json"
    shard_ranks: int | None = Field(default=None, gt=0)  # size of a sharding group (HSDP, hpZ); None: all ranks
    precision: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"
    recompute: Recompute = "none"  # activation checkpointing
    log_every: int = Field(default=50, gt=0)
    init_from: str = ""  # path of the initial weights, in any readable format; empty: random
    checkpoint_every: int = Field(default=5000, gt=0)
    keep_last: int = Field(default=3, gt=0)  # checkpoints
    keep_every: int | None = Field(default=None, gt=0)  # also keep checkpoints of steps divisible by this, permanently
    hang_after: float = Field(default=20.0, gt=1)  # a step hangs after this many times the median step,
    hang_seconds: float = Field(default=600.0, gt=0)  # but not before this many seconds
    upload: str = ""  # URL of a folder to copy checkpoints to, any that fsspec opens; empty: no copies

    @property
    def replicated_weights(self) -> bool:
        """Whether every rank holds all weights, so that no forward-backward pass gathers them."""
        return self.engine in ("single", "ddp")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SampleConfig:
    """How a trained model generates images."""

    sampler: Literal["euler", "euler_maruyama", "heun", "adams_bashforth"] = "euler_maruyama"
    steps: int = Field(default=50, gt=0)
    guidance: float = Field(default=2.2, ge=0)
    guidance_schedule: Literal["linear", "cosine", "constant"] = "linear"  # over the entities
    guidance_interval: tuple[UnitInterval, UnitInterval] = (0.0, 1.0)  # flow times at which guidance applies
    batch: int = Field(default=64, gt=0)
    precision: Literal["bf16", "tf32", "fp32"] = "tf32"
    shard_ranks: int = Field(default=1, gt=0)  # size of a sharding group
    tokenizer_weights: str = ""  # path of kl16.ckpt, for models of KL-16 latents
    every: int | None = Field(default=None, gt=0)  # training steps between preview grids from the EMA weights
    shown: tuple[int, ...] = ()  # classes in the grid; empty: eight of all classes

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if low > high:
            raise ConfigError(f"sample.guidance_interval starts at {low}, after its end {high}")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvaluateConfig:
    """Metrics of a small image set during training; ``xar-scale evaluate`` computes them for a large set."""

    every: int | None = Field(default=None, gt=0)  # steps
    images: int = Field(default=10_000, gt=1)
    reference: str = ""  # digits, an npz with mu and sigma or with images, or a folder of images
    features: str = "inception-v3-compat"
    inception_weights: str = ""  # path of torch-fidelity's file; empty: its own cache


@dataclass(frozen=True, config=STRICT, kw_only=True)
class KernelConfig:
    """Which kernels compute the model. They change no results, except for rounding and which values dropout drops."""

    attention: AttentionBackend = "auto"
    library: KernelLibrary = "auto"  # for RMSNorm and Adam; auto: torch, until apex has been measured
    compile: bool = False  # torch.compile each block, in training and in sampling


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GuardConfig:
    """What happens to steps that are not finite or spike (xar_scale.guard). Every max_ limit applies to the whole run."""

    enabled: bool = True
    hold_steps: int = Field(default=1000, gt=0)  # in TF32 after a step that needed it; doubled at each relapse
    max_holds: int = Field(default=5, ge=0)  # after these, TF32 is permanent
    max_transients: int = Field(default=10, ge=0)  # steps that were finite only on a retry
    max_quarantined: int = Field(default=8192, ge=0)  # samples removed from the data
    max_rollbacks: int = Field(default=3, ge=0)
    snapshot_every: int = Field(default=100, gt=0)  # steps between copies of the whole state to host memory, for rollback
    snapshots: int = Field(default=2, ge=0)  # copies kept; 0: roll back to checkpoints
    spike: float = Field(default=0.0, ge=0)  # allowed robust deviations of loss or gradient norm above the median; 0: no limit
    spike_window: int = Field(default=128, gt=1)  # steps in the median
    on_spike: Literal["take", "skip"] = "skip"  # what to do if it is a spike in TF32 too


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Config:
    """All settings of a run; saved with it."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    kernels: KernelConfig = KernelConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        for key, url in (("data.path", self.data.path), ("train.upload", self.train.upload)):
            if re.match(r"[^/]*://[^/]*@", url or ""):  # not shown either
                raise ConfigError(f"{key} holds a user or a password, which checkpoints would keep: give them to the store")
        if self.optim.warmup_steps > self.train.steps:
            raise ConfigError(f"optim.warmup_steps {self.optim.warmup_steps} is more than train.steps {self.train.steps}")
        if self.train.steps * self.train.global_batch >= 2**63:
            numbers = f"train.steps {self.train.steps} x train.global_batch {self.train.global_batch}"
            raise ConfigError(f"{numbers} is not below 2^63: samples are numbered in 64 bits")
        if self.train.precision == "fp16" and not self.guard.enabled:
            raise ConfigError("train.precision fp16 needs guard.enabled: the guard manages its loss scale")
        if self.train.precision == "fp16" and self.train.engine == "deepspeed":
            raise ConfigError(
                "train.precision fp16 needs a loss scale, and DeepSpeed's does not work under ZeRO with autocast: ranks "
                "disagree on which steps to skip, and the scale never backs off; use train.engine=ddp, fsdp2 or single"
            )
        if wrong := [label for label in self.sample.shown if not 0 <= label < self.model.classes]:
            raise ConfigError(f"sample.shown holds {wrong[0]}, the model's classes are 0..{self.model.classes - 1}")
        if self.evaluate.every and not self.evaluate.reference:
            raise ConfigError(f"evaluate.every is {self.evaluate.every}, but evaluate.reference is not set")
        if self.kernels.compile and self.train.engine == "deepspeed":
            raise ConfigError("kernels.compile: DeepSpeed gathers weights inside a block; use train.engine=ddp or fsdp2")
        if self.train.engine == "ddp" and self.train.shard_ranks:
            raise ConfigError("train.engine=ddp replicates all weights: leave train.shard_ranks unset, or use fsdp2")
        if self.train.global_batch % self.data.lanes:
            raise ConfigError(f"train.global_batch {self.train.global_batch} is not divisible by data.lanes {self.data.lanes}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a validated config from plain values. Raises ConfigError that names the first offending key and its value."""
        return validated(cls, values, ConfigError)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as in YAML 1.2 (1.1 requires 1.0e-4), and refuses duplicate keys, as both versions do."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:  # PyYAML would use the last one
                raise yaml.MarkedYAMLError(problem=f"{key.value} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that ``_Loader`` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where} is not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` overridden by ``changes``, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the sections of keys in a YAML file; an empty section changes nothing.

    Raises UsageError if the file does not exist, FileError if it cannot be read, ConfigError if it holds anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UsageError(f"no config file at {path}") from None
    except OSError as error:
        raise FileError(f"cannot read config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    values = _parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not sections of keys")

    def check(*location: str) -> None:  # here, because later nobody knows which keys are from the file
        if location[-1] not in known_keys(Config, location):
            raise ConfigError(f"{path}: {unknown_key(Config, location)}")

    for section, keys in values.items():
        check(section)
        if not isinstance(keys, dict | None):
            raise ConfigError(f"{path}: {section} is {keys!r}, not a section of keys")
        for key in keys or ():
            check(section, key)
    return {section: keys for section, keys in values.items() if keys is not None}


def read_settings(path: str) -> dict[str, Any]:
    """Return the DeepSpeed settings in the file of ``train.ds_config``.

    Raises UsageError if the file is missing, ConfigError if it is not a JSON object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = next((key for key, count in Counter(key for key, _ in pairs).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} appears twice")
        return dict(pairs)

    try:
        settings = json.loads(Path(path).read_text(), object_pairs_hook=once)
    except FileNotFoundError:
        raise UsageError(f"no DeepSpeed config at {path} (train.ds_config)") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path} (train.ds_config): {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__}, not an object")
    return settings


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return ``values`` overridden by ``section.key=value`` assignments from the command line."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key:
            raise UsageError(f"override {assignment!r} is not of the form section.key=value")
        change: Any = _parse_yaml(text, f"override {assignment!r}")
        for part in reversed(key.split(".")):
            change = {part: change}
        values = merge(values, change)
    return values


def shard_ranks(train: TrainConfig, world: int) -> int:
    """Return the size of a sharding group. Raises ConfigError if ``train.engine`` has no such groups on ``world`` ranks."""
    ranks = train.shard_ranks or world
    if train.engine == "single" and world > 1:
        raise ConfigError(f"train.engine single is one process, not {world}; use train.engine=ddp, fsdp2 or deepspeed")
    if world % ranks:
        raise ConfigError(f"world {world} is not divisible by train.shard_ranks {ranks}")
    if train.engine == "deepspeed" and ranks == 1 != world:
        raise ConfigError(
            "train.shard_ranks 1 replicates the weights on each rank, which ZeRO-3 cannot do: leave it unset, and use ddp or "
            "ZeRO stage 2"
        )
    return ranks


def micro_batches(train: TrainConfig, world: int) -> tuple[int, int]:
    """Return (samples per rank and micro-batch, micro-batches per step) for the global batch on ``world`` ranks.

    Raises ConfigError with the numbers if they do not divide it.
    """
    if train.micro_batch is None:
        if train.global_batch % world:
            raise ConfigError(f"global_batch {train.global_batch} is not divisible by world {world}")
        return train.global_batch // world, 1
    together = train.micro_batch * world
    if train.global_batch % together:
        raise ConfigError(
            f"global_batch {train.global_batch} is not divisible by micro_batch {train.micro_batch} "
            f"x world {world} = {together}"
        )
    return train.micro_batch, train.global_batch // together
