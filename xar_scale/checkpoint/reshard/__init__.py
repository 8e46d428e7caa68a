"""From any format into another, in blocks: planned to the byte beforehand, written so that it can be gone on with."""

from xar_scale.checkpoint.reshard.targets import TARGETS, plan
from xar_scale.checkpoint.reshard.writer import verifiable, verify, write

__all__ = ["TARGETS", "plan", "verifiable", "verify", "write"]
