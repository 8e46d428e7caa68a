"""Folders of runs as training writes them, without training; and what a report of one shows."""

import html
import re

from PIL import Image

from tests.unit.tiny_run import CONFIG
from xar_scale.guard import GuardState
from xar_scale.metrics import Metrics

STEPS = CONFIG.train.steps
CALM = GuardState()


def logged(step: int, counts: GuardState = CALM, **changes) -> dict:
    values = {"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 2.0, "images_per_s": 100.0, "tflops_per_s": 5.0}
    values |= {"step_s": 0.5, "data_wait_s": 0.1, "memory_gb": 1.5, "precision": "bf16", "forward_s": [0.25], **counts.counts}
    return values | changes


def write_run(folder, entries=None):
    """Write a run's folder as training does, with these entries in its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.to_yaml())
    entries = [logged(step) for step in range(10, 101, 10)] if entries is None else entries
    with Metrics(folder, 0, STEPS) as metrics:
        for entry in entries:
            metrics.log(entry["step"], {name: value for name, value in entry.items() if name != "step"})
    return folder


def text_of(page: str) -> str:
    """Return the visible text, without curves."""
    text = re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def draw_samples(run, steps, size=(40, 30)) -> None:
    (run / "samples").mkdir(exist_ok=True)
    for step in steps:
        Image.new("RGB", size, (step % 256, 10, 10)).save(run / "samples" / f"step-{step:08d}.png")
