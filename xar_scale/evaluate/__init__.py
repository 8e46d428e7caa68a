"""Generate images from trained weights and compute their metrics."""
