"""Checkpoints: the store of a run, and the formats of others."""
