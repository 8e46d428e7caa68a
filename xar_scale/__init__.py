"""xar_scale: train, sample and check xAR and larger next-X image models at scale."""

from xar_scale.checkpoint.interop import load_official
from xar_scale.model.entities import EntityLayout
from xar_scale.model.xar import XAR, create_model
from xar_scale.sampler import sample
from xar_scale.version import __version__

__all__ = ["XAR", "EntityLayout", "__version__", "create_model", "load_official", "sample"]
