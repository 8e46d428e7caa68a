"""The configuration: frozen dataclasses, validated on construction; every field is read somewhere."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from xar_scale.errors import ConfigError, FileError, UsageError, XarScaleError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

T = TypeVar("T")
Share = Annotated[float, Field(ge=0, lt=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Recompute = Literal["none", "full", "selective", "offload"]
EngineName = Literal["single", "ddp", "fsdp2", "deepspeed"]
KernelLibrary = Literal["auto", "torch", "apex"]
AttentionBackend = Literal["auto", "dense", "masked", "prefix", "flex", "flash"]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """Sizes of one xAR network. The published models differ in width, depth and heads only."""

    width: int = Field(gt=0)
    depth_encoder: int = Field(gt=0)
    depth_decoder: int = Field(gt=0)
    heads: int = Field(gt=0)
    channels: int = Field(default=16, gt=0)  # of a latent token
    grid: tuple[PositiveInt, PositiveInt] = (16, 16)  # rows and columns of tokens
    entity: Literal["patch", "cell", "subsample", "scale", "image"] = "cell"
    # cell: tokens on a side; subsample: the stride; scale: how many. None: at most half the grid; 2; all that halve evenly
    entity_size: int | None = Field(default=None, gt=0)
    classes: int = Field(default=1000, gt=0)  # the null class comes after them
    mlp_ratio: float = Field(default=4.0, gt=0)
    time_bins: int = Field(default=1000, gt=0)  # the network sees floor(time_bins * t)
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        if self.head_width % 4:
            raise ConfigError(
                f"model.width {self.width} / model.heads {self.heads} = {self.head_width} channels a head: "
                "2-D rotary positions need a multiple of 4"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """Where the latents are and how they are read."""

    path: str = ""  # a folder; a URL that fsspec opens (s3://, gs://, https://); synthetic[:SAMPLES]
    cache: str = ""  # folder on the node for what comes from a URL; none: in the system's folder of temporary files
    cache_gb: float = Field(default=64.0, gt=0)  # that it may fill
    max_bad_samples: int = Field(default=0, ge=0)  # that a run may meet, and do without, before it stops
    workers: int = Field(default=2, ge=0)  # processes a rank
    prefetch: int = Field(default=4, gt=0)  # batches ahead a worker
    lanes: int = Field(default=1, gt=0)  # parts that the shards are cut into; each gives the same share of every global batch
    window: int = Field(default=8192, gt=0)  # samples of a lane that are shuffled together
    flip: bool = False  # half of the samples from their mirrored latents


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimConfig:
    """AdamW, its schedule, clipping and the weights' moving average."""

    lr: float = Field(gt=0)
    final_lr: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay_share: float = Field(default=0.0, ge=0, le=1)  # last share of the run's steps, a cosine to final_lr
    betas: tuple[Share, Share] = (0.9, 0.96)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema_decay: Share = 0.9999
    ema_snapshots_every: int | None = Field(default=None, gt=0)  # steps, of averages that any other is made of; none: never


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """One run: how long, in what batches, on which engine."""

    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)  # samples a rank and pass; none: no accumulation
    seed: int = Field(default=0, ge=0, lt=2**64)
    label_drop: float = Field(default=0.1, ge=0, le=1)
    engine: EngineName = "deepspeed"
    ds_config: str = "ds_configs/zero3.json"
    shard_ranks: int | None = Field(default=None, gt=0)  # neighbours that share one copy of the weights; none: all ranks
    precision: Literal["bf16", "fp16", "tf32", "fp32"] = "bf16"
    recompute: Recompute = "none"  # of activations, in the backward pass
    log_every: int = Field(default=50, gt=0)
    init_from: str = ""  # path of what the weights begin as, of any format that is read; none: drawn
    checkpoint_every: int = Field(default=5000, gt=0)
    keep_last: int = Field(default=3, gt=0)  # checkpoints
    keep_every: int | None = Field(default=None, gt=0)  # and for good those of steps that this divides
    hang_after: float = Field(default=20.0, gt=1)  # medians of a step, after which the job is ended as hanging
    hang_seconds: float = Field(default=600.0, gt=0)  # and not before
    upload: str = ""  # URL of a folder, any that fsspec opens, to copy checkpoints to; none: they stay in the run's

    @property
    def replicated_weights(self) -> bool:
        """Whether each rank has all of them: nothing is gathered for a pass."""
        return self.engine in ("single", "ddp")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SampleConfig:
    """How images are drawn from a trained model."""

    sampler: Literal["euler", "euler_maruyama", "heun", "adams_bashforth"] = "euler_maruyama"
    steps: int = Field(default=50, gt=0)
    guidance: float = Field(default=2.2, ge=0)
    guidance_schedule: Literal["linear", "cosine", "constant"] = "linear"  # over the entities
    guidance_interval: tuple[UnitInterval, UnitInterval] = (0.0, 1.0)  # of times at which guidance acts
    batch: int = Field(default=64, gt=0)
    precision: Literal["bf16", "tf32", "fp32"] = "tf32"
    shard_ranks: int = Field(default=1, gt=0)  # neighbours that share one copy of the weights
    tokenizer_weights: str = ""  # path of kl16.ckpt, for models of its latents
    every: int | None = Field(default=None, gt=0)  # steps of training after which the averages draw a grid of pictures
    shown: tuple[int, ...] = ()  # classes in it; none: eight of all

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        if low > high:
            raise ConfigError(f"sample.guidance_interval begins at {low}, after its end {high}")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvaluateConfig:
    """Numbers of a small set of images while a model is trained, as ``xar-scale evaluate`` has of a large one."""

    every: int | None = Field(default=None, gt=0)  # steps
    images: int = Field(default=10_000, gt=1)
    reference: str = ""  # digits, an npz with mu and sigma or images, or a folder of pictures
    features: str = "inception-v3-compat"
    inception_weights: str = ""  # path of torch-fidelity's file; none: where it keeps it


@dataclass(frozen=True, config=STRICT, kw_only=True)
class KernelConfig:
    """Whose kernels compute what the other sections ask for: never what, but for rounding and which values dropout drops."""

    attention: AttentionBackend = "auto"
    library: KernelLibrary = "auto"  # of RMSNorm and Adam; auto: torch, as long as apex is not measured
    compile: bool = False  # each block a graph of torch.compile, in training and in sampling


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GuardConfig:
    """What becomes of steps that are not fit to be taken (xar_scale.guard). All that begins with max is of the whole run."""

    enabled: bool = True
    hold_steps: int = Field(default=1000, gt=0)  # in TF32 after a step that needed it; twice as many at each relapse
    max_holds: int = Field(default=5, ge=0)  # then it is TF32 for good
    max_transients: int = Field(default=10, ge=0)  # steps whose second attempt came out otherwise
    max_quarantined: int = Field(default=8192, ge=0)  # samples taken out of the data
    max_rollbacks: int = Field(default=3, ge=0)
    snapshot_every: int = Field(default=100, gt=0)  # steps, of the whole state to the host's memory, to roll back to
    snapshots: int = Field(default=2, ge=0)  # that are kept; none: roll back to checkpoints
    spike: float = Field(default=0.0, ge=0)  # robust deviations above the median that loss or gradient norm may lie; 0: any
    spike_window: int = Field(default=128, gt=1)  # steps that the median is of
    on_spike: Literal["take", "skip"] = "skip"  # that is one in TF32 too


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Config:
    """Everything that a run depends on; saved with it."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    kernels: KernelConfig = KernelConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        if self.optim.warmup_steps > self.train.steps:
            raise ConfigError(f"optim.warmup_steps {self.optim.warmup_steps} is more than train.steps {self.train.steps}")
        if self.train.precision == "fp16" and not self.guard.enabled:
            raise ConfigError("train.precision fp16 needs guard.enabled: its loss scale is the guard's")
        if wrong := [label for label in self.sample.shown if not 0 <= label < self.model.classes]:
            raise ConfigError(f"sample.shown holds {wrong[0]}, the model's classes are 0..{self.model.classes - 1}")
        if self.evaluate.every and not self.evaluate.reference:
            raise ConfigError(f"evaluate.every is {self.evaluate.every}, but evaluate.reference is not set")
        if self.kernels.compile and self.train.engine == "deepspeed":
            raise ConfigError("kernels.compile: DeepSpeed gathers weights inside a block; use train.engine=ddp or fsdp2")
        if self.train.engine == "ddp" and self.train.shard_ranks:
            raise ConfigError("train.shard_ranks: with train.engine=ddp each rank has all weights; leave it out, or use fsdp2")
        if self.train.global_batch % self.data.lanes:
            raise ConfigError(f"train.global_batch {self.train.global_batch} is not divisible by data.lanes {self.data.lanes}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Validated from plain values. Raises ConfigError that names the first offending key and its value."""
        return validated(cls, values, ConfigError)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)


def validated(cls: type[T], values: dict[str, Any], error: type[XarScaleError], where: str = "") -> T:
    """A dataclass from plain values. Raises ``error`` that names the first offending key and its value, after ``where``."""

    def refuse(value: Any) -> None:
        raise error(f"{where}{value!r} is a {type(value).__name__}: no key takes one")

    try:
        text = json.dumps(values, default=refuse)
    except (ValueError, RecursionError):
        raise error(f"{where}the values contain themselves") from None
    try:
        return TypeAdapter(cls).validate_json(text)  # JSON's list is a tuple; nothing else is coerced
    except ValidationError as caught:
        first = caught.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise error(f"{where}unknown key {key}; known there: {', '.join(_known_keys(cls, first['loc']))}") from None
        if first["type"] in ("missing", "missing_argument"):
            raise error(f"{where}key {key} is missing") from None
        raise error(f"{where}{key} = {first['input']!r}: {first['msg']}") from None


def _known_keys(cls: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys that would have been right in the place of an unknown one."""
    for part in location[:-1]:
        cls = {field.name: field.type for field in dataclasses.fields(cls)}[str(part)]
    return [field.name for field in dataclasses.fields(cls)]


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-4 is a number, as in YAML 1.2 (1.1 wants 1.0e-4), and whose keys are there once, as in both."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:  # PyYAML would take the last
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that ``_Loader`` would take for a number."""


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
    """``base`` with ``changes`` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The sections of keys in a YAML file; one in which nothing is written changes nothing. Raises UsageError, FileError,
    ConfigError where it holds something else."""
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
    for section in values.keys() & {field.name for field in dataclasses.fields(Config)}:
        if not isinstance(keys := values[section], dict | None):
            raise ConfigError(f"{path}: {section} is {keys!r}, not a section of keys")
    return {section: keys for section, keys in values.items() if keys is not None}


def read_settings(path: str) -> dict[str, Any]:
    """What ``train.ds_config`` names. Raises UsageError when the file is missing, ConfigError when it is not a JSON object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = next((key for key, count in Counter(key for key, _ in pairs).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice")
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
    """``values`` with ``section.key=value`` assignments from the command line laid over it."""
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
    """How many ranks share one copy of the weights. Raises ConfigError with the numbers where ``world`` is no multiple."""
    ranks = train.shard_ranks or world
    if world % ranks:
        raise ConfigError(f"world {world} is not divisible by train.shard_ranks {ranks}")
    return ranks


def micro_batches(train: TrainConfig, world: int) -> tuple[int, int]:
    """(samples a rank and pass, passes a step) that make up the global batch on ``world`` ranks.

    Raises ConfigError with the numbers when they do not divide.
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
