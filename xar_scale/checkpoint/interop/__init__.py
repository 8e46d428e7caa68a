"""Other checkpoint formats, read as named vectors, a range at a time; published weights as a model."""

from xar_scale.checkpoint.interop.official import official_names
from xar_scale.checkpoint.interop.open import open_source
from xar_scale.checkpoint.interop.pretrained import load_official
from xar_scale.checkpoint.interop.source import Source

__all__ = ["Source", "load_official", "official_names", "open_source"]
