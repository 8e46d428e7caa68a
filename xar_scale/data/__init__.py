"""Latents: shards on disk, the global order, batches."""
