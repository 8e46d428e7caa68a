"""A forward and backward pass on fake tensors: the bytes it would save for backward, and its peak memory."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xar_scale.config import Config, KernelConfig, ModelConfig
from xar_scale.data.loader import Batch
from xar_scale.flow import velocity_loss
from xar_scale.model.aligned import mark_weights_gathered
from xar_scale.model.cpu import emulate
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import blank_weights, meta_model
from xar_scale.precision import FP32, MODES, autocast


class PassMemory(NamedTuple):
    """Bytes on the device, without weights and their gradients: what the forward pass saves for the backward pass, and the peak
    of each of the two."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


class _LiveStorages(TorchDispatchMode):
    """Tracks storages that operations allocate on ``device``: ``bytes`` of the live ones, and their ``peak``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.bytes, self.peak = device, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._meet(tensor.untyped_storage())
        return made

    def ignore(self, *tensors: Tensor) -> None:
        self.known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._lose, key, size)

    def _lose(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


class _FusedKernels(TorchFunctionMode):
    """Makes CPU tensors save what a GPU's kernels save for backward: of attention the inputs, the output and one number per
    row; of dropout one byte per element."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype
            return _FLASH(*(tensor.to(dtype) for tensor in args), dropout_p=kwargs["dropout_p"])[0]  # a mask is small
        if function is F.dropout:
            x, share = args[0], kwargs["p"]
            return torch.native_dropout(x, share, True)[0] if share else x
        return function(*args, **kwargs)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def pass_memory(config: Config, mode: str, samples: int, device: torch.device) -> PassMemory:
    """Return the memory of one micro-batch of ``samples`` in precision ``mode``, by running the network on fake tensors.

    - Gradients of weights are freed as they appear. Copies of weights that autocast makes and keeps count, except with engines
      that already gather weights in 16 bits.
    - FlexAttention and apex do not accept fake tensors. Code that saves as much replaces them: prefix attention, and PyTorch's
      norm.
    - A backward pass on fake CUDA tensors needs a GPU. If ``device`` is a GPU and there is none, CPU tensors emulate it: they
      save what a GPU's kernels save, with one masked call in place of this project's attention kernel.
    - Compiled blocks are always emulated on CPU tensors: AOTAutograd partitions the graphs in the same way.
    """
    precision = MODES[mode]
    model = meta_model(config.model)
    layout = model.layout
    # with "selective" compiled blocks save what eager ones do, and attention also where it draws dropout
    selective = config.kernels.compile and config.train.recompute == "selective"
    compiled = config.kernels.compile and not selective
    emulated = device.type == "cuda" and (compiled or not torch.cuda.is_available())
    attention = config.kernels.attention
    if attention == "flex":
        attention = "prefix"
    elif emulated and attention in ("auto", "flash"):
        attention = "masked"
    kernels = replace(config.kernels, attention=attention, library="torch")
    model.use_kernels(kernels, device, precision.compute, training=True)
    inputs: list[int] = []
    if emulated:
        device = torch.device("cpu")
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].nbytes))
    gathered = FP32 if config.train.replicated_weights else precision.gather
    graph = None
    if compiled:
        shallow = replace(config.model, depth_encoder=1, depth_decoder=1)
        graph = _cached_graph(shallow, kernels, mode, samples, config.train.engine, emulated)
        for block in model.blocks:
            block.forward = partial(graph, block)  # type: ignore[method-assign]
    else:
        for block in model.blocks:
            block.forward = partial(_eager, emulated, block.forward)  # type: ignore[method-assign]
    apply_recompute(model.blocks, config.train.recompute)
    if selective:
        for block in model.blocks:
            block.forward = partial(_in_graph, block.forward)  # type: ignore[method-assign]
    layout.on(device)  # real tensors, made outside the fake mode: making them reads values
    # DeepSpeed gathers the weights of all Linear layers in 16 bits, FSDP2 those of blocks
    sources = model.blocks if config.train.engine == "fsdp2" else [model]
    lowered = {layer for source in sources for layer in source.modules() if isinstance(layer, nn.Linear)}
    living = _LiveStorages(device)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for weight in blank_weights(model):
            cast = weight.value.to(gathered) if weight.module in lowered else weight.value
            weight._replace(value=cast).place(device).register_post_accumulate_grad_hook(_free_gradient)
        batch = Batch.zeros(layout, config.model.channels, samples, device)
        given = (batch.latents, batch.noise, batch.t, batch.labels)

        def forward() -> Tensor:
            with autocast(device, precision.compute):
                return velocity_loss(model, layout, *given)

        if graph and not graph.made:
            forward().backward()
            graph.made = True
            inputs.clear()
        living.ignore(*model.parameters(), *given)
        stack.enter_context(living)
        loss = forward()
        saved, most = living.bytes, living.peak
        living.peak = saved
        loss.backward()
    backward = living.peak
    if emulated and config.train.recompute == "offload":  # all block inputs but the current one are in host memory
        gone = sum(inputs) - max(inputs)
        return PassMemory(saved - sum(inputs), most - gone, backward - gone)
    return PassMemory(saved, most, backward)


def _eager(gpu: bool, forward: Callable[..., Any], *arguments: Any) -> Any:
    with emulate(gpu=gpu, graph=False), _FusedKernels() if gpu else nullcontext():
        return forward(*arguments)


def _in_graph(forward: Callable[..., Any], *arguments: Any) -> Any:
    with emulate(gpu=False, graph=True):
        return forward(*arguments)


class _Graph:
    """A block with torch.compile's graphs but not its kernels: (block, arguments) -> output.

    Inductor's partitioner decides what the forward graph saves for the backward graph. Inside a graph more is live than with
    Inductor's fused kernels. The first call traces the graph, which takes seconds, for its arguments: ``samples``, and weights
    as ``engine`` has them.
    """

    def __init__(self, config: ModelConfig, kernels: KernelConfig, mode: str, samples: int, engine: str, gpu: bool) -> None:
        # imported here because it takes a second in each process
        from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped]
        from functorch.compile import min_cut_rematerialization_partition as cut
        from torch._inductor.decomposition import select_decomp_table

        model = meta_model(config)
        model.use_kernels(kernels, torch.device("cuda" if gpu else "cpu"), MODES[mode].compute, training=True)
        if engine == "fsdp2":
            mark_weights_gathered(model)
        model.layout.on(torch.device("cpu"))
        self.made, self.gpu, self.block = False, gpu, model.blocks[0]
        self.names = [name for name, _ in self.block.named_parameters()]

        def as_it_is(graph: Callable[..., Any], _inputs: list[Tensor]) -> Any:
            return make_boxed_func(graph)

        self._call = aot_function(self._forward, as_it_is, as_it_is, cut, decompositions=select_decomp_table())

    def _forward(self, weights: list[Tensor], *arguments: Any) -> Any:
        with emulate(gpu=self.gpu, graph=True), _FusedKernels() if self.gpu else nullcontext():
            return functional_call(self.block, dict(zip(self.names, weights, strict=True)), arguments)

    def __call__(self, block: nn.Module, *arguments: Any) -> Any:
        return self._call([*block.parameters()], *arguments)


_cached_graph = cache(_Graph)


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


PassEstimator = Callable[[Config, str, int, torch.device], PassMemory]
SHALLOW, DEEPER = 2, 3  # blocks, of which the decoder has one


@cache
def pass_estimator() -> PassEstimator:
    """Return an estimator of ``pass_memory`` for any depth and number of samples. It measures networks of SHALLOW and DEEPER
    blocks at the powers of 8 around the number of samples, and caches the results.

    Bytes are linear in the number of blocks. In samples they are a maximum of linear functions, thus convex: between two
    measured sizes they lie on or below the connecting line, beyond them possibly above it.
    """
    known: dict[Any, PassMemory] = {}

    def measured(config: Config, mode: str, samples: int, device: torch.device, depth: int) -> PassMemory:
        engine = config.train.engine if config.kernels.compile or MODES[mode].gather is not FP32 else ""
        model = replace(config.model, depth_encoder=depth - 1, depth_decoder=1)
        key = (model, config.kernels, config.train.recompute, engine, mode, device, samples)
        if key not in known:
            known[key] = pass_memory(replace(config, model=model), mode, samples, device)
        return known[key]

    def estimate(config: Config, mode: str, samples: int, device: torch.device) -> PassMemory:
        few = 8 ** ((samples.bit_length() - 1) // 3)  # the largest power of 8 up to samples
        share = (samples - few) / (7 * few)
        deep = (config.model.depth_encoder + config.model.depth_decoder - SHALLOW) / (DEEPER - SHALLOW)

        def at(size: int) -> list[float]:
            pairs = zip(*(measured(config, mode, size, device, depth) for depth in (SHALLOW, DEEPER)), strict=True)
            return [_linear(shallow, deeper, deep) for shallow, deeper in pairs]

        ends = zip(at(few), at(8 * few) if share else at(few), strict=True)
        return PassMemory(*(round(_linear(low, high, share)) for low, high in ends))

    return estimate


def _linear(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
