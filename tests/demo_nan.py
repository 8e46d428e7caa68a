"""A bf16 run under ZeRO-3 whose activations are not finite in bf16 for a while, beside the fp32 run: ``make demo-nan``."""

import argparse
import json
import sys
from pathlib import Path

from tests.processes import launch
from xar_scale.evaluate.digits import cache_digits

STEPS, BROKEN, MENDED, HOLD = 160, 40, 70, 20
FAULT = [{"kind": "activation", "step": BROKEN, "until": MENDED, "rank": 1}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of both runs and the picture")
    out = parser.parse_args().out
    if not (out / "data" / "dataset.json").exists():
        cache_digits(out / "data", samples_per_shard=500)
    guarded = train(out, "bf16", FAULT)
    exact = train(out, "fp32", [])
    picture = out / "fallback.png"
    draw(exact, guarded, picture)
    print(f"picture      {picture}\nreports      {out / 'bf16' / 'reports'}\nTensorBoard  tensorboard --logdir {out}")
    return 0


def train(out: Path, precision: str, faults: list[dict]) -> list[dict]:
    """What a training on 2 ranks logged; its folder is ``out``/``precision``."""
    settings = [f"train.steps={STEPS}", "train.log_every=2", f"guard.hold_steps={HOLD}"]
    settings += [f"train.checkpoint_every={BROKEN}", "train.keep_last=9"]  # each report has one to be replayed from
    words = [
        "train",
        "--recipe",
        "digits",
        "--run-dir",
        str(out / precision),
        "--resume",
        "none",
        f"data.path={out / 'data'}",
        "model.width=64",
    ]
    words += [*settings, "train.engine=deepspeed", f"train.precision={precision}", "data.workers=0"]
    print(
        f"{precision}: {STEPS} steps on 2 ranks under ZeRO-3"
        + (f"; broken in steps {BROKEN} to {MENDED - 1}" if faults else "")
    )
    ended = launch(2, ["-m", "tests.injected", json.dumps(faults), *words], out / "logs" / precision)
    print("".join(f"  {line}\n" for line in ended.outputs[0].splitlines() if line.startswith("guard:")), end="")
    if any(ended.codes):
        sys.exit(ended.text)
    return [json.loads(line) for line in (out / precision / "metrics.jsonl").read_text().splitlines()]


def draw(exact: list[dict], guarded: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for lines, label, style in ((exact, "fp32", dict(color="0.6", linewidth=3)), (guarded, "bf16, guarded", dict(color="C0"))):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=label, **style)
    held = [line["step"] for line in guarded if line["precision"] == "tf32"]
    axes.axvspan(BROKEN, MENDED, color="C3", alpha=0.15, linewidth=0, label="bf16 is not finite here")
    starts = [step for step in held if step - 2 not in held]
    for start in starts:
        end = next(step for step in range(start, STEPS + 3, 2) if step not in held)
        axes.axvspan(start - 1, end - 1, ymax=0.06, color="C1", linewidth=0, label="in TF32" if start == starts[0] else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="One run, two precisions: the guard falls back and returns")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
