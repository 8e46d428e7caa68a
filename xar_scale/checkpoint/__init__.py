"""Checkpoints: the store of a run, and conversion from and to other formats."""
