"""A pass on tensors without memory: what it would keep, and the most that it would take."""

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
from xar_scale.flow import velocity_loss
from xar_scale.model.aligned import weights_are_gathered
from xar_scale.model.cpu import standing_for
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import blank_weights, meta_model
from xar_scale.precision import FP32, MODES


class PassMemory(NamedTuple):
    """Bytes on the device, beside weights and their gradients: what the forward pass leaves for the backward pass, and the most
    at any moment of each of the two."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that operations make on ``device``: ``bytes`` of those alive, the ``peak`` of that."""

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
    """What a GPU's kernels keep for the backward pass, on CPU tensors: of attention its inputs, output and a number a row, of
    dropout a byte an element."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype
            return _FLASH(*(tensor.to(dtype) for tensor in args), dropout_p=kwargs["dropout_p"])[0]  # a mask is little
        if function is F.dropout:
            x, share = args[0], kwargs["p"]
            return torch.native_dropout(x, share, True)[0] if share else x
        return function(*args, **kwargs)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def pass_memory(config: Config, mode: str, samples: int, device: torch.device) -> PassMemory:
    """Of one pass of ``samples`` in precision ``mode``: the network's own, forward and backward, on tensors without memory.

    Gradients of weights are let go of as they come. Copies of weights that autocast makes and keeps count, except with engines
    that gather weights in 16 bits already. FlexAttention and apex, which take no such tensors, are stood for by what keeps as
    much: attention by entities, and PyTorch's norm. Where ``device`` is a GPU and there is none, whose backward pass even such
    tensors need, a CPU's stand for them, with what a GPU's kernels keep, and one masked call for this project's own attention.
    They always do where blocks are compiled: AOTAutograd, which cuts the graphs, cuts the same ones.
    """
    precision = MODES[mode]
    model = meta_model(config.model)
    layout = model.layout
    # "selective" has both keep products and attention
    compiled = config.kernels.compile and config.train.recompute != "selective"
    stands = device.type == "cuda" and (compiled or not torch.cuda.is_available())
    attention = config.kernels.attention
    if attention == "flex":
        attention = "prefix"
    elif stands and attention in ("auto", "flash"):
        attention = "masked"
    kernels = replace(config.kernels, attention=attention, library="torch")
    model.use_kernels(kernels, device, precision.compute, training=True)
    inputs: list[int] = []
    if stands:
        device = torch.device("cpu")
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].nbytes))
    gathered = FP32 if config.train.whole_weights else precision.gather
    graph = None
    if compiled:
        shallow = replace(config.model, depth_encoder=1, depth_decoder=1)
        graph = _cached_graph(shallow, kernels, mode, samples, config.train.engine, stands)
        for block in model.blocks:
            block.forward = partial(graph, block)  # type: ignore[method-assign]
    elif stands:
        for block in model.blocks:
            block.forward = partial(_as_on_a_gpu, block.forward)  # type: ignore[method-assign]
    apply_recompute(model.blocks, config.train.recompute)
    layout.on(device)  # real, and made here: their making reads values
    # DeepSpeed gathers the weights of Linear layers in 16 bits, FSDP2 those of blocks
    sources = model.blocks if config.train.engine == "fsdp2" else [model]
    lowered = {layer for source in sources for layer in source.modules() if isinstance(layer, nn.Linear)}
    living = _LiveStorages(device)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for weight in blank_weights(model):
            cast = weight.value.to(gathered) if weight.module in lowered else weight.value
            weight._replace(value=cast).place(device).register_post_accumulate_grad_hook(_free_gradient)
        latents = torch.zeros(samples, config.model.channels, *layout.grid, device=device)
        noise = torch.zeros(samples, layout.tokens, config.model.channels, device=device)
        t = torch.zeros(samples, layout.entities, device=device)
        labels = torch.zeros(samples, dtype=torch.int64, device=device)

        def forward() -> Tensor:
            with torch.autocast(device.type, dtype=precision.compute, enabled=precision.compute is not FP32):
                return velocity_loss(model, layout, latents, noise, t, labels)

        if graph and not graph.made:
            forward().backward()
            graph.made = True
            inputs.clear()
        living.ignore(*model.parameters(), latents, noise, t, labels)
        stack.enter_context(living)
        loss = forward()
        saved, most = living.bytes, living.peak
        living.peak = saved
        loss.backward()
    backward = living.peak
    if stands and config.train.recompute == "offload":  # all but the one at work on are in the host's memory
        gone = sum(inputs) - max(inputs)
        return PassMemory(saved - sum(inputs), most - gone, backward - gone)
    return PassMemory(saved, most, backward)


def _as_on_a_gpu(forward: Callable[..., Any], *arguments: Any) -> Any:
    with standing_for(gpu=True, graph=False), _FusedKernels():
        return forward(*arguments)


class _Graph:
    """A block as torch.compile has it, but for its kernels: (a block, its arguments) -> its output.

    What the forward graph leaves for the backward graph is Inductor's own choice; what is alive inside of one is more than
    Inductor's fused kernels would have. It is made when it is first called, which takes seconds, for what it is called with
    then: ``samples``, and weights as ``engine`` has them.
    """

    def __init__(self, config: ModelConfig, kernels: KernelConfig, mode: str, samples: int, engine: str, gpu: bool) -> None:
        # a second, for which each process would wait
        from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped]
        from functorch.compile import min_cut_rematerialization_partition as cut
        from torch._inductor.decomposition import select_decomp_table

        model = meta_model(config)
        model.use_kernels(kernels, torch.device("cuda" if gpu else "cpu"), MODES[mode].compute, training=True)
        if engine == "fsdp2":
            weights_are_gathered(model)
        model.layout.on(torch.device("cpu"))
        self.made, self.gpu, self.block = False, gpu, model.blocks[0]
        self.names = [name for name, _ in self.block.named_parameters()]

        def as_it_is(graph: Callable[..., Any], _inputs: list[Tensor]) -> Any:
            return make_boxed_func(graph)

        self._call = aot_function(self._forward, as_it_is, as_it_is, cut, decompositions=select_decomp_table())

    def _forward(self, weights: list[Tensor], *arguments: Any) -> Any:
        with standing_for(gpu=self.gpu, graph=True), _FusedKernels() if self.gpu else nullcontext():
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
    """``pass_memory`` of any depth and number of samples, from shallow ones of the powers of 8 around it, that are kept.

    Bytes of the forward pass grow evenly with blocks, and so do those of the backward pass. In samples each is the largest of
    sums that grow evenly: between two sizes it lies below the line of theirs, and beyond them it may lie above.
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
        few = 8 ** ((samples.bit_length() - 1) // 3)  # the largest power of 8 that is no more
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
