"""One table of GPUs, and what is assumed of the machines around them."""

from typing import NamedTuple

from xar_scale.errors import UsageError


class GPU(NamedTuple):
    """Peaks of the vendor's data sheet (SXM, without sparsity); bandwidths in one direction. Bytes, operations a second."""

    memory: float
    bf16: float
    tf32: float
    fp32: float  # of no tensor core
    memory_bandwidth: float
    nvlink: float
    host_link: float  # PCIe or NVLink-C2C
    network: float  # of its own adapter

    def peak(self, mode: str) -> float:
        """Of matrix products; fp16's is bf16's."""
        return {"bf16": self.bf16, "fp16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[mode]


GPUS = {
    #             memory   bf16     tf32     fp32     memory/s  nvlink/s  host/s  network/s
    "a100": GPU(  80e9,    312e12,  156e12,  19.5e12, 2.04e12,  300e9,    25e9,   25e9),
    "h100": GPU(  80e9,    989e12,  495e12,  67e12,   3.35e12,  450e9,    50e9,   50e9),
    "h200": GPU( 141e9,    989e12,  495e12,  67e12,   4.80e12,  450e9,    50e9,   50e9),
    "b200": GPU( 180e9,   2250e12, 1125e12,  75e12,   7.70e12,  900e9,    50e9,   50e9),
}  # fmt: skip


class Machines(NamedTuple):
    """``gpus`` of a kind in nodes of ``per_node``."""

    gpu: GPU
    gpus: int
    per_node: int
    mfu: float = 0.35  # of the peak, what passes reach, recomputed work included (docs/benchmarks/2026-11-27-plan.md)
    launch: float = 6e-3  # seconds in which the host launches a block's pass, where none is recorded (there)
    link_share: float = 0.7  # of a link's peak, what collectives reach
    overlap: float = 1.0  # of communication, the share that can run beside computation
    hop: float = 5e-6  # seconds from one rank of a ring to the next
    disk: float = 2e9  # bytes a second and node, written
    loader: float = 20_000.0  # samples a second and core (docs/benchmarks/2026-11-23-cpu-data.md)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def find_gpu(name: str) -> GPU:
    """Raises UsageError that lists the known names."""
    try:
        return GPUS[name]
    except KeyError:
        raise UsageError(f"no GPU {name!r}; there are: {', '.join(GPUS)}") from None
