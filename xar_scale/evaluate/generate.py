"""Generate uint8 images from class labels: the network, replicated or sharded over ranks, then the tokenizer's decoder."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from xar_scale import dist
from xar_scale.checkpoint.interop.pretrained import check_shapes
from xar_scale.config import SampleConfig
from xar_scale.dist import say
from xar_scale.errors import ConfigError
from xar_scale.evaluate.trained import TrainedModel
from xar_scale.graphs import Graphs
from xar_scale.model.compiled import compile_static
from xar_scale.model.kv_cache import KVCache
from xar_scale.model.xar import XAR, meta_model
from xar_scale.precision import FP32, MODES, apply_matmul_mode, autocast
from xar_scale.sampler import Watch, sample
from xar_scale.tokenizers import Tokenizer, create_tokenizer

FRAMES = 48  # of an animation, approximately
MAX_PENDING = 2  # batches of latents that wait to be decoded
# the fields of SampleConfig that sample() takes
SAMPLER_SETTINGS = ("sampler", "steps", "guidance", "guidance_schedule", "guidance_interval")


@dataclass(frozen=True)
class Generator:
    """Generates images with one set of weights. A batch is decoded while the next is sampled.

    ``compute``: the autocast dtype. ``shared``: the weights are sharded over ranks, which must call ``draw`` together and run
    the same number of batches.
    """

    model: XAR
    settings: SampleConfig
    tokenizer: Tokenizer
    latent_scale: float
    device: torch.device
    compute: torch.dtype
    shared: bool

    def with_settings(self, settings: SampleConfig) -> "Generator":
        """Return a generator with the same weights and other sampler settings. All other settings stay as they were."""
        changed = {name: getattr(settings, name) for name in SAMPLER_SETTINGS}
        settings = dataclasses.replace(self.settings, **changed)
        return replace(self, settings=settings)

    def draw(self, labels: Sequence[int], seed: int | Sequence[int] = 0, first: int = 0, batches: int = 0) -> np.ndarray:
        """Return uint8 images (N, I, H, W), one per label.

        Image i depends on its label and (seed, first + i), or on its own seed if ``seed`` is a sequence; its batch affects only
        the last bits. ``batches``: run at least this many, as the other ranks of the sharding group do; the results of extra
        ones are discarded. Decoding errors are raised after all batches: otherwise the other ranks would hang.
        """
        size = self.settings.batch
        starts = [*range(0, len(labels), size)]
        with ThreadPoolExecutor(1) as decoder:
            decoded: list[Future[np.ndarray]] = []
            for number, start in enumerate(starts):
                seeds = seed if isinstance(seed, int) else seed[start : start + size]
                latents = self.latents(labels[start : start + size], seeds, first + start)
                decoded.append(decoder.submit(self.tokenizer.decode, latents))
                if number >= MAX_PENDING:
                    wait([decoded[number - MAX_PENDING]])
            for _ in range(batches - len(starts)):
                self.latents([0], 0, 0)
            return np.concatenate([part.result() for part in decoded]) if decoded else np.empty((0, 0, 0, 0), np.uint8)

    def draw_over_ranks(self, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Return uint8 images (N, I, H, W), one per label and seed, on rank 0; ignore it on others. Every rank calls this."""
        world, rank = dist.world(), dist.rank()
        batches = math.ceil(math.ceil(len(labels) / world) / self.settings.batch) if self.shared else 0
        mine = dist.on_all_ranks(lambda: self.draw(labels[rank::world], seeds[rank::world], batches=batches))
        of_ranks = [part for part in dist.gather_on_rank_0(mine) if len(part)]
        if not of_ranks:
            return mine
        images = np.empty((len(labels), *of_ranks[0].shape[1:]), np.uint8)
        for number, part in enumerate(of_ranks):
            images[number::world] = part
        return images

    def latents(self, labels: Sequence[int], seed: int | Sequence[int], first: int = 0, watch: Watch | None = None) -> Tensor:
        """Sample the latents of one batch (B, C, rows, columns), in the tokenizer's scale."""
        options = {name: getattr(self.settings, name) for name in SAMPLER_SETTINGS}
        with autocast(self.device, self.compute), dist.abort_on_error() if self.shared else nullcontext():
            drawn = sample(self.model, labels, seed=seed, first_image=first, watch=watch, **options)
        return drawn / self.latent_scale

    def frames(self, label: int, seed: int) -> Iterator[np.ndarray]:
        """Yield about ``FRAMES`` intermediate states of an image and the final one, each (I, H, W).

        Entities that have not started are zero latents. If entities have grids of several sizes, only the finest is visible.
        """
        layout, states = self.model.layout, list[Tensor]()
        spacing = layout.entities / FRAMES  # of t, between two kept states; above 1, some entities have none

        def watch(entity: int, t: float, tokens_BTC: Tensor) -> None:
            if entity + 1 - t < len(states) * spacing - 1e-9:  # progress of the whole image; a predictor's state may be ahead
                return
            missing = tokens_BTC.new_zeros(1, layout.tokens - tokens_BTC.shape[1], tokens_BTC.shape[2])
            states.append(layout.from_entities(torch.cat([tokens_BTC, missing], dim=1)) / self.latent_scale)

        states.append(self.latents([label], [seed], watch=watch))
        for state in states:
            yield self.tokenizer.decode(state)[0]


def open_generator(trained: TrainedModel, device: torch.device) -> Generator:
    """Load weights from disk, each rank the part that it holds, and return the generator. Every rank calls this.

    Raises ConfigError if ``sample.shard_ranks`` does not divide the world, or the tokenizer's weights are missing.
    """
    settings = trained.sample
    if dist.world() % settings.shard_ranks:
        raise ConfigError(f"world {dist.world()} is not divisible by sample.shard_ranks {settings.shard_ranks}")

    def build() -> tuple[XAR, Tokenizer]:
        # one at a time on a CPU: then decoding does not depend on the batch at all
        at_once = 1 if device.type == "cpu" else settings.batch
        tokenizer = create_tokenizer(trained.tokenizer, settings.tokenizer_weights, device, batch=at_once)
        model = meta_model(trained.model)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        check_shapes(trained.source.path, trained.source.names(trained.kind), wanted)
        used = model.use_kernels(trained.kernels, device, MODES[settings.precision].compute, training=False)
        sharded = f", weights sharded over {settings.shard_ranks} ranks" if settings.shard_ranks > 1 else ""
        if trained.kernels.compile:
            used += ", blocks not compiled: they are sharded" if sharded else ", blocks compiled"
        say(f"sampling on {dist.world()} x {device.type}, {settings.precision}{sharded}; {used}")
        return model, tokenizer

    model, tokenizer = dist.on_all_ranks(build)
    apply_matmul_mode(settings.precision)
    ranges = _materialize(model, settings, device)

    def fill() -> None:
        for name, (start, values) in ranges.items():
            host = torch.empty(values.shape)
            trained.source.read(f"{trained.kind}/{name}", start, host.view(-1))
            values.copy_(host)

    dist.on_all_ranks(fill)
    compute = MODES[settings.precision].compute
    if settings.shard_ranks == 1:
        prepare(model, device, compute, compiled=trained.kernels.compile)
    return Generator(model, settings, tokenizer, trained.latent_scale, device, compute, settings.shard_ranks > 1)


def prepare(model: XAR, device: torch.device, compute: torch.dtype, *, compiled: bool) -> None:
    """Make a network fast for sampling, in place; it can no longer be trained.

    Linear layers hold their weights in ``compute``, which autocast would otherwise cast at each call. With ``compiled`` each
    block's forward is compiled. On a GPU each kind of call is captured as a CUDA graph.
    """
    model.requires_grad_(False)
    if compute is not FP32:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(compute)
    if compiled:
        for block in model.blocks:
            block.forward = compile_static(block.forward, fullgraph=True)  # type: ignore[method-assign]
    if device.type == "cuda":
        graphed = _GraphedNetwork(model, device)
        model.forward, model.new_cache = graphed.forward, graphed.new_cache  # type: ignore[method-assign, assignment]


class _GraphedNetwork:
    """Replays a network's calls from CUDA graphs. All graphs use one key/value cache, sized for the largest batch so far."""

    def __init__(self, model: XAR, device: torch.device) -> None:
        self._forward, self._new_cache, self._device = model.forward, model.new_cache, device
        self._graphs = Graphs(device)
        self._cache: KVCache = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, first: int = 0, cache: KVCache | None = None) -> Tensor:
        def work(x: Tensor, t: Tensor, labels: Tensor) -> list[Tensor]:
            return [self._forward(x, t, labels, first, cache)]

        if cache is not self._cache:
            (velocity,) = work(x, t, labels)
            return velocity
        (replayed,) = self._graphs.run(first, work, x, t, labels)
        assert replayed is not None
        return replayed.clone()

    def new_cache(self, batch: int, dtype: torch.dtype | None = None) -> KVCache:
        fits = self._cache and self._cache[0].keys.shape[0] >= batch and self._cache[0].keys.dtype == dtype
        if not fits:
            self._cache, self._graphs = [], Graphs(self._device)  # free both before allocating
            self._cache = self._new_cache(batch, dtype)
        return self._cache


def _materialize(model: XAR, settings: SampleConfig, device: torch.device) -> dict[str, tuple[int, Tensor]]:
    """Allocate the parameters. Returns this rank's shard of each: the index of its first element, and the tensor to fill."""
    if settings.shard_ranks == 1:
        model.to_empty(device=device).requires_grad_(False)
        return {name: (0, parameter.data) for name, parameter in model.named_parameters()}
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from xar_scale.engines.fsdp2 import create_mesh, owned_range, shard_model

    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    policy = MixedPrecisionPolicy(MODES[settings.precision].gather, cast_forward_inputs=False)
    mesh = create_mesh(settings.shard_ranks, device)
    shards = shard_model(model.requires_grad_(False), mesh, policy, device)
    return {name: (owned_range(shapes[name], settings.shard_ranks)[0], shard) for name, shard in shards.items()}
