"""Convert between formats, block by block: planned to the byte beforehand, and resumable."""

from xar_scale.checkpoint.reshard.targets import TARGETS, plan
from xar_scale.checkpoint.reshard.writer import verifiable, write

__all__ = ["TARGETS", "plan", "verifiable", "write"]
