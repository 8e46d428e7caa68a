"""The xAR network: the velocity of each noisy entity, given itself, the noisy entities before it, its time and the class."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xar_scale import rng
from xar_scale.config import KernelConfig, ModelConfig
from xar_scale.errors import ConfigError, UsageError
from xar_scale.model.apex import choose_library
from xar_scale.model.attention import choose_backend, describe
from xar_scale.model.entities import create_layout
from xar_scale.model.kv_cache import KVCache, LayerCache
from xar_scale.model.layers import Attention, Block, RMSNorm, TimeEmbedding
from xar_scale.model.rope import rotary_angles
from xar_scale.presets import model_values
from xar_scale.validation import validated


class XAR(nn.Module):
    """xAR (Ren et al., 2025), section 3: an encoder and a decoder of equal width, with adaLN by time and class per entity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = layout = create_layout(config)
        width, tokens = config.width, layout.tokens
        self.class_embed = nn.Embedding(config.classes + 1, width)
        self.time_embed = TimeEmbedding(width, config.time_bins)
        self.in_proj = nn.Linear(config.channels, width)
        self.encoder_pos = nn.Parameter(torch.empty(tokens, width))  # a row per token: FSDP2 shards by rows
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
        """The label for "no class", learned by label drop and used for guidance."""
        return self.config.classes

    @property
    def blocks(self) -> list[Block]:
        """The encoder's blocks, then the decoder's."""
        return [*self.encoder, *self.decoder]

    def use_kernels(self, kernels: KernelConfig, device: torch.device, dtype: torch.dtype, *, training: bool) -> str:
        """Select the kernels that ``kernels`` names, to run on ``device`` in ``dtype``. Returns a description for the log.

        Raises ConfigError if a named kernel is not usable.
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
        """Return the velocity (B, T, C) of noisy tokens x (B, T, C), entity-major, at times t (B, K) in [0, 1].

        ``first``: the index of the first entity fed; earlier entities are read from ``cache``. Raises UsageError for other
        shapes, and for integer times.
        """
        tokens = self._tokens(x_BTC, t_BK, labels_B, first)
        condition = self.class_embed(labels_B)[:, None] + self.time_embed(t_BK)
        # recomputed each time at next to no cost: a buffer would have to follow the model through devices, dtypes and sharding
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
        """Return the tokens of the entities for which ``t_BK`` has times, and check all shapes."""
        last = first + t_BK.shape[-1] if t_BK.ndim else first
        place = slice(*(self.layout.offsets[min(entity, self.layout.entities)] for entity in (first, last)))
        expected = (t_BK.shape[0] if t_BK.ndim else 0, place.stop - place.start, self.config.channels)
        known = t_BK.ndim == 2 and last <= self.layout.entities
        if not known or x_BTC.shape != expected or labels_B.shape != expected[:1] or not t_BK.is_floating_point():
            given = f"x {tuple(x_BTC.shape)}, t {tuple(t_BK.shape)} of {t_BK.dtype}, labels {tuple(labels_B.shape)}"
            raise UsageError(
                f"{given}: expected x (B, tokens, channels), t (B, entities) from 0 to 1, labels (B,); this model has "
                f"{self.layout.tokens} tokens of {self.config.channels} channels in {self.layout.entities} entities"
            )
        return place

    def new_cache(self, batch: int, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache for sampling ``batch`` sequences, on the parameters' device and in ``dtype`` or theirs."""
        shape = (batch, self.config.heads, self.layout.tokens, self.config.head_width)
        like = self.in_proj.weight
        empty = partial(torch.empty, shape, dtype=dtype or like.dtype, device=like.device)
        return [LayerCache(empty(), empty()) for _ in self.blocks]


class Weight(NamedTuple):
    """The value of one parameter, and the module attribute that it belongs to."""

    module: nn.Module
    key: str
    value: Tensor

    def place(self, device: torch.device) -> nn.Parameter:
        """Make the value a parameter on ``device`` and set it in the module. Returns the parameter."""
        parameter = nn.Parameter(self.value.to(device))
        setattr(self.module, self.key, parameter)
        return parameter


def meta_model(config: ModelConfig) -> XAR:
    """Return the network on the meta device; the engine fills its parameters one by one. It has no buffers."""
    with torch.device("meta"):
        return XAR(config)


def initial_weights(model: XAR, seed: int, given: Callable[[str], Tensor | None] = lambda name: None) -> Iterator[Weight]:
    """Yield the published initialisation: Xavier uniform for every Linear, biases 0, embeddings and positions normal 0.02.

    Parameters come one at a time, unsharded, in float32 on the CPU. Each has its own generator, keyed by its name: its value
    does not depend on the order or the process. ``given``: returns the value to use instead, by name, on any device, or None.
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
    """Yield zeros, for models that a checkpoint is loaded into next: drawing billions of numbers takes minutes."""
    for module, key, _, shape in _parameters(model):
        yield Weight(module, key, torch.zeros(shape, device="cpu"))


def _parameters(model: XAR) -> Iterator[tuple[nn.Module, str, str, torch.Size]]:
    """Yield (owner, key in it, full name, shape) of every parameter, in the model's order; safe while they are replaced."""
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        yield model.get_submodule(owner), key, name, parameter.shape


def create_model(name: str, seed: int = 0, **changes: Any) -> XAR:
    """Return a freshly initialised preset, e.g. ``create_model("xar_h", entity="cell")``; ``changes`` are ModelConfig fields.

    Raises UsageError for an unknown name, ConfigError for fields that do not exist or do not fit.
    """
    model = meta_model(validated(ModelConfig, {**model_values(name), **changes}, ConfigError))
    for weight in initial_weights(model, seed):
        weight.place(torch.device("cpu"))
    return model
