"""flash's kernels compile for GPUs that are not present, and need no more shared memory than those have."""

import pytest

from xar_scale.model import flash
from xar_scale.model.flash_kernels import KERNELS

triton = pytest.importorskip("triton", reason="wheels for a CPU come without Triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# By compute capability, bytes of shared memory per program (CUDA's programming guide, technical specifications)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TYPES = {"seed": "*i32", "ends": "*i32", "words": "*i32", "lse": "*fp32", "delta": "*fp32", "scale": "fp32", "grown": "fp32"}


def compiled(name: str, head_width: int, capability: int):
    """Compile as launched: addresses and strides are multiples of 16."""
    kernel, cut = KERNELS[name], flash.block_sizes(name, head_width)
    constants = flash.constants(head_width, cut, dropout=True)
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        stride = argument[-2:] in ("_b", "_n", "_t")
        kind = TYPES.get(argument, "i32" if stride or argument in ("N", "Tq", "Tk", "dropped") else "*bf16")
        signature[argument] = "constexpr" if argument in constants else kind
        if argument not in constants and (stride or kind.startswith("*")):
            aligned[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    options = {"num_warps": cut.warps, "num_stages": cut.stages, "maxnreg": cut.registers}
    return triton.compile(
        ASTSource(kernel, signature, constexprs=values, attrs=aligned), GPUTarget("cuda", capability, 32), options
    )


LONG = pytest.mark.long


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_width", [pytest.param(64, marks=LONG), 80, pytest.param(128, marks=LONG)])
@pytest.mark.parametrize("capability", [pytest.param(each, marks=() if each == 90 else LONG) for each in SHARED])
def test_kernels_compile_for_every_supported_gpu(name, head_width, capability):
    made = compiled(name, head_width, capability)
    assert made.asm["cubin"] and 0 < made.metadata.shared <= 1024 * SHARED[capability]
