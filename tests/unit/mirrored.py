"""Runs whose checkpoints are copied to a URL, and what lies there."""

from pathlib import Path

import boto3

from tests.unit.tiny_run import Run
from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.checkpoint.mirror import Mirror, newest_valid_of

FILES = ["manifest.json", "shard-00001-model-00001-of-00001.safetensors"]


def objects(store, url: str) -> list[str]:
    name, _, prefix = url.removeprefix("s3://").partition("/")
    found = boto3.client("s3", endpoint_url=store.url).list_objects_v2(Bucket=name, Prefix=prefix)
    return sorted(entry["Key"].removeprefix(f"{prefix}/checkpoints/") for entry in found.get("Contents", []))


def copied(steps: list[int]) -> list[str]:
    return [f"step-{step:08d}/{name}" for step in steps for name in FILES]


def trained(folder: Path, url: str, steps: int = 3, **settings) -> Run:
    run = Run(folder, mirror=Mirror(url), **settings)
    for _ in range(steps):
        run.train()
        run.save()
    return run


def resumed_from(folder: Path, url: str) -> Checkpoint | None:
    return newest_valid_of(folder, Mirror(url), lambda found: None)
