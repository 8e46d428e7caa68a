"""Generating images from checkpoints, and judging them."""
