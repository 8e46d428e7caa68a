"""The xAR network: velocity of every noisy entity, given itself, the noisy ones before it, its time and the class."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xar_scale import rng
from xar_scale.config import KernelConfig, ModelConfig, validated
from xar_scale.errors import ConfigError, UsageError
from xar_scale.model.apex import choose_library
from xar_scale.model.attention import choose_backend, describe
from xar_scale.model.entities import create_layout
from xar_scale.model.kv_cache import KVCache, LayerCache
from xar_scale.model.layers import Attention, Block, RMSNorm, TimeEmbedding
from xar_scale.model.rope import rotary_angles
from xar_scale.presets import model_values


class XAR(nn.Module):
    """xAR (Ren et al., 2025), section 3: an encoder and a decoder of the same width, adaLN by time and class per entity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = layout = create_layout(config)
        width, tokens = config.width, layout.tokens
        self.class_embed = nn.Embedding(config.classes + 1, width)
        self.time_embed = TimeEmbedding(width, config.time_bins)
        self.in_proj = nn.Linear(config.channels, width)
        self.encoder_pos = nn.Parameter(torch.empty(tokens, width))  # rows, which FSDP2 shards by
        self.in_norm = RMSNorm(width, affine=True)
        self.encoder = nn.ModuleList(Block(config, layout) for _ in range(config.depth_encoder))
        self.encoder_norm = RMSNorm(width, affine=True)
        self.mid_proj = nn.Linear(width, width)
        self.decoder_pos = nn.Parameter(torch.empty(tokens, width))
        self.decoder = nn.ModuleList(Block(config, layout) for _ in range(config.depth_decoder))
        self.decoder_norm = RMSNorm(width, affine=True)
        self.out_proj = nn.Linear(width, config.channels)

    @property
    def null_class(self) -> int:
        """The label of no class, learned by label drop and used for guidance."""
        return self.config.classes

    @property
    def blocks(self) -> list[Block]:
        """The encoder's, then the decoder's."""
        return [*self.encoder, *self.decoder]

    def use_kernels(self, kernels: KernelConfig, device: torch.device, dtype: torch.dtype, *, training: bool) -> str:
        """Take the kernels that ``kernels`` names, to run on ``device`` in ``dtype``. Returns what is used, for the log.

        Raises ConfigError where one that is named cannot serve.
        """
        dropout = self.config.dropout if training else 0.0
        head_width = self.config.head_width
        backend = choose_backend(
            self.layout, device, dtype, head_width, dropout=dropout, backward=training, backend=kernels.attention
        )
        library = choose_library(kernels.library, device)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend
            elif isinstance(module, RMSNorm):
                module.library = library
        return f"attention {describe(backend, device, dtype, head_width)}, norms of {library}"

    def forward(self, x_BTC: Tensor, t_BK: Tensor, labels_B: Tensor, first: int = 0, cache: KVCache | None = None) -> Tensor:
        """Velocity (B, T, C) of noisy tokens x (B, T, C), entity-major, at times t (B, K) in [0, 1].

        ``first``: the index of the first entity fed; what comes before it is read from ``cache``. Raises UsageError for other
        shapes, and for times in whole numbers.
        """
        tokens = self._tokens(x_BTC, t_BK, labels_B, first)
        condition = self.class_embed(labels_B)[:, None] + self.time_embed(t_BK)
        # made anew each time, for next to nothing: a buffer would have to follow its model through devices, types and shards
        angles = rotary_angles(self.layout.on(x_BTC.device).coordinates[tokens], self.config.head_width)
        rotary = angles.cos(), angles.sin()
        caches: Sequence[LayerCache | None] = cache or [None] * len(self.blocks)

        x = self.in_norm(self.in_proj(x_BTC) + self.encoder_pos[tokens])
        for block, layer_cache in zip(self.encoder, caches, strict=False):
            x = block(x, condition, rotary, first, layer_cache)
        x = self.mid_proj(self.encoder_norm(x)) + self.decoder_pos[tokens]
        for block, layer_cache in zip(self.decoder, caches[len(self.encoder) :], strict=True):
            x = block(x, condition, rotary, first, layer_cache)
        return self.out_proj(self.decoder_norm(x))

    def _tokens(self, x_BTC: Tensor, t_BK: Tensor, labels_B: Tensor, first: int) -> slice:
        """Those of the entities that ``t_BK`` has times of."""
        last = first + t_BK.shape[-1] if t_BK.ndim else first
        place = slice(*(self.layout.offsets[min(entity, self.layout.entities)] for entity in (first, last)))
        expected = (t_BK.shape[0] if t_BK.ndim else 0, place.stop - place.start, self.config.channels)
        known = t_BK.ndim == 2 and last <= self.layout.entities
        if not known or x_BTC.shape != expected or labels_B.shape != expected[:1] or not t_BK.is_floating_point():
            given = f"x {tuple(x_BTC.shape)}, t {tuple(t_BK.shape)} of {t_BK.dtype}, labels {tuple(labels_B.shape)}"
            raise UsageError(
                f"{given}: x is (B, tokens, channels), t (B, entities) from 0 to 1, labels (B,); this model's layout is "
                f"{self.layout.tokens} tokens of {self.config.channels} channels in {self.layout.entities} entities"
            )
        return place

    def new_cache(self, batch: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for sampling ``batch`` sequences, of the parameters' device and, unless another is named, dtype."""
        shape = (batch, self.config.heads, self.layout.tokens, self.config.head_width)
        like = self.in_proj.weight
        empty = partial(torch.empty, shape, dtype=dtype or like.dtype, device=like.device)
        return [LayerCache(empty(), empty()) for _ in self.blocks]


class Weight(NamedTuple):
    """The value of one parameter, and where it belongs."""

    module: nn.Module
    key: str
    value: Tensor

    def place(self, device: torch.device) -> nn.Parameter:
        """Put the value in the module, in place of what stood there."""
        parameter = nn.Parameter(self.value.to(device))
        setattr(self.module, self.key, parameter)
        return parameter


def meta_model(config: ModelConfig) -> XAR:
    """The network without memory for its parameters; the engine fills them one by one. It has no buffers."""
    with torch.device("meta"):
        return XAR(config)


def initial_weights(model: XAR, seed: int, given: Callable[[str], Tensor | None] = lambda name: None) -> Iterator[Weight]:
    """The published initialisation: Xavier uniform for every Linear, biases 0, embeddings and positions normal 0.02.

    One parameter at a time, whole, in float32 on the CPU. Each has a generator of its own, keyed by its name: its value
    does not depend on the order or the process that asks for it. ``given``: a value by name that stands in for it, or none.
    """
    for module, key, name, shape in _parameters(model):
        if (instead := given(name)) is not None:
            yield Weight(module, key, instead)
            continue
        generator, value = rng.torch_generator(seed, f"init/{name}"), torch.empty(shape, device="cpu")
        if isinstance(module, nn.Linear) and key == "weight":
            nn.init.xavier_uniform_(value, generator=generator)
        elif len(shape) > 1:
            nn.init.normal_(value, std=0.02, generator=generator)
        else:
            nn.init.constant_(value, 1.0 if key == "weight" else 0.0)
        yield Weight(module, key, value)


def blank_weights(model: XAR) -> Iterator[Weight]:
    """Zeros, where a checkpoint is loaded next: drawing billions of numbers takes minutes."""
    for module, key, _, shape in _parameters(model):
        yield Weight(module, key, torch.zeros(shape, device="cpu"))


def _parameters(model: XAR) -> Iterator[tuple[nn.Module, str, str, torch.Size]]:
    """(owner, key in it, full name, shape) of every parameter, in the model's order; safe while they are replaced."""
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        yield model.get_submodule(owner), key, name, parameter.shape


def create_model(name: str, seed: int = 0, **changes: Any) -> XAR:
    """A freshly initialised preset, e.g. ``create_model("xar_h", entity="cell")``; ``changes`` are ModelConfig fields.

    Raises UsageError for an unknown name, ConfigError for fields that do not exist or fit.
    """
    model = meta_model(validated(ModelConfig, {**model_values(name), **changes}, ConfigError))
    for weight in initial_weights(model, seed):
        weight.place(torch.device("cpu"))
    return model
