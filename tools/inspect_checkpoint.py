"""Inspect checkpoints: show one, compare two, and make a post-hoc EMA of any width from a run's snapshots.

python tools/inspect_checkpoint.py show runs/demo
python tools/inspect_checkpoint.py diff runs/demo/checkpoints/step-00000350 runs/demo/checkpoints/step-00000700
python tools/inspect_checkpoint.py ema runs/demo --std 0.07 --out runs/demo-0.07
"""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from xar_scale.checkpoint.contents import changes, differences, not_finite
from xar_scale.checkpoint.manifest import EMA_SNAPSHOTS, FOLDER, MANIFEST, Manifest, checkpoint_paths, read_manifest, verify
from xar_scale.checkpoint.posthoc_ema import fit_to, open_snapshots, write_ema
from xar_scale.checkpoint.vectors import sizes
from xar_scale.dist import known_error
from xar_scale.errors import DataError, UsageError
from xar_scale.presets import MODELS
from xar_scale.program import tool_parser
from xar_scale.tables import aligned

LISTED = 8  # files, vectors or samples to list; the rest is counted
GOOD = ("intact", "finite")
TITLES = ("folder", "step", "epoch", "model", "precision", "engine", "ranks", "GB", "files", "values")


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="what a checkpoint holds, whether its files are intact and its values finite")
    show.add_argument("path", type=Path, help="a checkpoint's folder, or a run's, for all its checkpoints and snapshots")
    show.set_defaults(run_command=lambda options: show_path(options.path))
    diff = commands.add_parser("diff", help="the manifest entries and vectors that differ; exits with 0 either way")
    diff.add_argument("one", type=Path, help="a checkpoint's folder, or a run's, for its newest")
    diff.add_argument("other", type=Path, help="likewise")
    diff.set_defaults(run_command=lambda options: show_differences(options.one, options.other))
    ema = commands.add_parser("ema", help="an EMA of any width, made from a run's EMA snapshots (optim.ema_snapshots_every)")
    ema.add_argument("run", type=Path)
    ema.add_argument("--std", type=float, required=True, help="its width: standard deviation relative to the run's length")
    ema.add_argument("--step", type=int, help="step of the snapshot that it ends at (default: the newest)")
    ema.add_argument("--out", type=Path, required=True, help="folder to write: a checkpoint for `xar-scale sample`")
    ema.set_defaults(run_command=lambda options: make_ema(options.run, options.std, options.step, options.out))
    return parser.run(lambda options: options.run_command(options))


def show_path(path: Path) -> None:
    """Raises DataError, after everything is shown, if something is damaged or not finite."""
    paths = [found for folder in (FOLDER, EMA_SNAPSHOTS) for found in checkpoint_paths(path, folder)]
    if not paths and not (path / MANIFEST).is_file():
        raise UsageError(f"no xar-scale checkpoint in {path}")
    findings = show_run(path, paths) if paths else [show_checkpoint(path)]
    if wrong := sum(finding != GOOD for finding in findings):
        raise DataError(f"{path}: {wrong} of {len(findings)} damaged or not finite")


def show_checkpoint(path: Path) -> tuple[str, str]:
    finding = inspect(path)
    facts: list[tuple[str, str]] = []
    with suppress(DataError):  # already in the finding
        facts = describe(read_manifest(path).manifest)
    print(aligned(("what", "found"), [("folder", str(path)), *facts, *zip(("files", "values"), finding, strict=True)]))
    return finding


def show_run(run: Path, paths: Sequence[Path]) -> list[tuple[str, str]]:
    findings, rows, complaints = [], [], []
    for path in paths:
        name = str(path.relative_to(run))
        finding, summary = GOOD, ("-",) * (len(TITLES) - 3)
        try:
            finding = inspect(path)
            with suppress(DataError):
                summary = summarize(read_manifest(path).manifest)
        except (UsageError, FileNotFoundError):
            if path.is_dir():
                raise
        if not path.is_dir():  # removed meanwhile by a running job
            continue
        findings.append(finding)
        rows.append((name, *summary, *(words.split(":")[0] for words in finding)))
        complaints += [f"{name}: {words}" for words in finding if words not in GOOD]
    print("\n".join([aligned(TITLES, rows), *complaints]))
    return findings


def inspect(path: Path) -> tuple[str, str]:
    """Return the state of its files and of its values; ``GOOD`` if nothing is wrong. Reads everything."""
    files, values = GOOD
    try:
        verify(path)
    except DataError as error:
        files = f"DAMAGED: {error}"
    try:
        checkpoint = read_manifest(path)
        if found := not_finite(checkpoint):
            elements = sizes(checkpoint)
            named = listed([f"{key} ({count:,} of {elements[key]:,})" for key, count in found.items()])
            values = f"NOT FINITE: {sum(found.values()):,} elements in {len(found)} vectors: {named}"
    except (DataError, OSError) as error:
        values = f"unreadable: {known_error(error)}"
    return files, values


def summarize(manifest: Manifest) -> tuple[str, ...]:
    lowered = " (lowered)" if manifest.guard.lowered else ""
    return (
        str(manifest.step),
        str(manifest.position.epoch),
        model_name(manifest),
        f"{manifest.precision}{lowered}",
        manifest.engine,
        str(manifest.world),
        gigabytes(manifest.bytes),
    )


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """Return rows of (name, value) for people to read."""
    guard, position, config = manifest.guard, manifest.position, manifest.config
    parameters = sum(math.prod(shape) for shape in manifest.shapes.values())
    until = "for good" if guard.held_until is None else f"until step {guard.held_until}"
    counts = ("holds", "discarded", "skipped", "transients", "quarantined", "rollbacks")
    counted = ", ".join(f"{name} {getattr(guard, name)}" for name in counts)
    files = listed([f"{name} ({gigabytes(entry.bytes)} GB)" for name, entry in manifest.files.items()])
    if not config:
        return [
            ("step", f"{manifest.step:,}; run unknown: converted from another format"),
            ("model", f"{parameters:,} parameters"),
            ("kinds", ", ".join(manifest.kinds)),
            ("written", f"{gigabytes(manifest.bytes)} GB: {files}"),
        ]
    made = [("EMA", f"sigma_rel {manifest.sigma_rel:g}, made from snapshots")] if manifest.sigma_rel is not None else []
    return [
        *made,
        ("step", f"{manifest.step:,} of {config['train']['steps']:,}"),
        ("model", f"{model_name(manifest)}, {parameters:,} parameters, entity {config['model']['entity']}"),
        ("kinds", ", ".join(manifest.kinds)),
        ("written", f"by {manifest.world} ranks, engine {manifest.engine}, {gigabytes(manifest.bytes)} GB: {files}"),
        ("precision", f"{manifest.precision}, configured {config['train']['precision']}"),
        ("guard", f"{f'lowered {until}' if guard.lowered else 'not lowered'}; {counted}"),
        ("data", f"epoch {position.epoch}, {position.consumed:,} samples into it; {manifest.samples_consumed:,} in total"),
        ("bad samples", sample_list(manifest.bad_samples)),
        ("quarantined", sample_list(manifest.quarantined)),
    ]


def model_name(manifest: Manifest) -> str:
    """Name of the preset of these sizes, else the width."""
    if (model := manifest.config.get("model")) is None:
        return "unknown"
    return next((name for name, values in MODELS.items() if values.items() <= model.items()), f"width {model['width']}")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}"


def sample_list(samples: Sequence[tuple[str, int]]) -> str:
    return f"{len(samples):,}: {listed([f'{position} of {shard}' for shard, position in samples])}" if samples else "none"


def listed(words: Sequence[str]) -> str:
    return ", ".join(words[:LISTED]) + (f" and {len(words) - LISTED:,} more" if len(words) > LISTED else "")


def show_differences(one: Path, other: Path) -> None:
    old, new = (read_manifest(checkpoint_paths(path)[-1] if checkpoint_paths(path) else path) for path in (one, other))
    changed = changes(old, new)
    print(f"manifest: {len(changed)} entries differ" if changed else "manifest: identical")
    for key, (before, after) in changed.items():
        print(f"  {key}: {before} -> {after}")
    ours, theirs = sizes(old), sizes(new)
    found = list(differences(old, new))
    for kind in dict.fromkeys((*old.manifest.kinds, *new.manifest.kinds)):
        vectors = [difference for difference in found if difference.key.startswith(f"{kind}/")]
        unlike = [difference for difference in vectors if difference.differing]
        alone = [
            f"  only in {where}: {key}, {elements:,} elements"
            for mine, others, where in ((ours, theirs, one), (theirs, ours, other))
            for key, elements in mine.items()
            if key.startswith(f"{kind}/") and others.get(key) != elements
        ]
        if vectors:
            print(f"{kind}: {f'{len(unlike)} of {len(vectors)} vectors differ' if unlike else 'identical'}")
        if unlike:
            titles = ("  vector", "largest difference", "relative norm", "elements")
            rows = [
                (f"  {d.key}", f"{d.largest:.3g}", f"{d.relative:.3g}", f"{d.differing:,} of {d.elements:,}") for d in unlike
            ]
            print(aligned(titles, rows))
        for line in alone:
            print(line)


def make_ema(run: Path, sigma_rel: float, step: int | None, out: Path) -> None:
    snapshots = open_snapshots(run, step)
    fit = fit_to(snapshots, sigma_rel)
    made = write_ema(snapshots, fit.factors.tolist(), sigma_rel, out)
    print(
        f"{out}: EMA of sigma_rel {sigma_rel:g} at step {made.manifest.step}, from {len(snapshots)} snapshots; "
        f"profile error {fit.residual:.2%}"
    )


if __name__ == "__main__":
    sys.exit(main())
