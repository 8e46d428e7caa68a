"""A table of GPUs, and the assumptions about the machines around them."""

from typing import NamedTuple

from xar_scale.errors import UsageError


class GPU(NamedTuple):
    """Data-sheet peaks (SXM, without sparsity), bandwidths in one direction. Units: bytes, bytes and operations per second."""

    memory: float
    bf16: float
    tf32: float
    fp32: float  # not on tensor cores
    memory_bandwidth: float
    nvlink: float
    host_link: float  # PCIe or NVLink-C2C
    network: float  # its own network adapter

    def peak(self, mode: str) -> float:
        """Peak of matrix products in precision ``mode``; fp16 has that of bf16."""
        return {"bf16": self.bf16, "fp16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[mode]


GPUS = {
    #             memory   bf16     tf32     fp32     memory/s  nvlink/s  host/s  network/s
    "a100": GPU(  80e9,    312e12,  156e12,  19.5e12, 2.04e12,  300e9,    25e9,   25e9),
    "h100": GPU(  80e9,    989e12,  495e12,  67e12,   3.35e12,  450e9,    50e9,   50e9),
    "h200": GPU( 141e9,    989e12,  495e12,  67e12,   4.80e12,  450e9,    50e9,   50e9),
    "b200": GPU( 180e9,   2250e12, 1125e12,  75e12,   7.70e12,  900e9,    50e9,   50e9),
}  # fmt: skip


class Machines(NamedTuple):
    """``gpus`` GPUs of one kind in nodes of ``per_node``, and what is assumed about them."""

    gpu: GPU
    gpus: int
    per_node: int
    mfu: float = 0.35  # share of the peak reached, recomputed FLOPs included (docs/benchmarks/2026-11-27-plan.md)
    launch: float = 6e-3  # CPU seconds to launch a block's kernels per micro-batch, without CUDA graphs (same record)
    link_share: float = 0.7  # share of a link's peak that collectives reach
    overlap: float = 1.0  # share of communication that can overlap with compute
    hop: float = 5e-6  # seconds from one rank of a ring to the next
    disk: float = 2e9  # bytes written per second and node
    loader: float = 20_000.0  # samples per second and core (docs/benchmarks/2026-11-23-cpu-data.md)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def find_gpu(name: str) -> GPU:
    """Return the GPU called ``name``. Raises UsageError with the known names."""
    try:
        return GPUS[name]
    except KeyError:
        raise UsageError(f"no GPU {name!r}; available: {', '.join(GPUS)}") from None
