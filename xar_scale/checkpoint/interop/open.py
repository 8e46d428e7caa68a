"""Recognises what is there, and opens it as a ``Source``."""

import re
from pathlib import Path

from xar_scale.checkpoint.interop.source import Source
from xar_scale.checkpoint.interop.universal import is_universal, open_universal
from xar_scale.checkpoint.interop.weights import open_weights, weight_files
from xar_scale.checkpoint.interop.zero import is_zero, open_zero
from xar_scale.checkpoint.manifest import FOLDER, LATEST, MANIFEST, checkpoint_paths, read_manifest
from xar_scale.checkpoint.vectors import open_vectors, shapes_of
from xar_scale.errors import DataError, UsageError

SUMS = "SHA256SUMS"
TAGS = (LATEST, "latest_universal")  # files that name the folder beside them that is meant


def open_source(path: Path, trust_pickle: bool = False) -> Source:
    """A checkpoint of ours, DeepSpeed's (ZeRO or universal), a ``.pth``, or safetensors.

    Raises UsageError where there is nothing, DataError where it is of no known format, torn, or would have to be unpickled
    with classes that are not known to be harmless; ``trust_pickle`` lets those run.
    """
    if not path.exists():
        raise UsageError(f"no checkpoint at {path}")
    if path.is_dir():
        path = _tagged(path)
        if (path / MANIFEST).is_file():
            return _open_own(path)
    if path.is_dir() and is_universal(path):
        source = open_universal(path, trust_pickle)
    elif path.is_dir() and is_zero(path):
        source = open_zero(path, trust_pickle)
    elif weight_files(path):
        source = open_weights(path, trust_pickle)
    else:
        raise DataError(
            f"{path} is no checkpoint of a known format: ours ({MANIFEST}), DeepSpeed's ZeRO (*_optim_states.pt) or universal "
            "(zero/optimizer_state.pt), .pth, safetensors"
        )
    source.checksums = _checksums(path)
    return source


def _tagged(folder: Path) -> Path:
    """The newest checkpoint of a run of ours, or the folder that a file ``latest`` names, of DeepSpeed, where there is one."""
    if paths := checkpoint_paths(folder.parent if folder.name == FOLDER else folder):
        return paths[-1]
    for tag in (folder / name for name in TAGS):
        if tag.is_file():
            tagged = tag.parent / tag.read_text().strip()
            if not tagged.is_dir():
                raise DataError(f"{tag} names {tagged.name}, which is not there")
            return tagged
    return folder


def _open_own(path: Path) -> Source:
    checkpoint = read_manifest(path)
    manifest = checkpoint.manifest
    if missing := [name for name in manifest.files if not (path / name).is_file()]:
        raise DataError(f"checkpoint {path}: {missing[0]} is missing")
    for name, entry in manifest.files.items():
        if (size := (path / name).stat().st_size) != entry.bytes:
            raise DataError(f"checkpoint {path}: {name} has {size} bytes, it was written with {entry.bytes}")
    return Source(
        path,
        f"xar-scale, {len(manifest.files)} files",
        shapes_of(checkpoint),
        open_vectors(checkpoint),
        [path / name for name in manifest.files],
        checksums={path / name: entry.sha256 for name, entry in manifest.files.items()},
        step=manifest.step,
        updates=manifest.updates,
        groups=_groups(manifest.config.get("optim")),
        manifest=manifest,
    )


def _groups(optim: dict[str, object] | None) -> list[dict[str, object]]:
    """Settings of the two groups that ``optim.parameter_groups`` makes; of a checkpoint without a config, none."""
    if optim is None:
        return []
    common = {name: optim[name] for name in ("lr", "betas", "eps")}
    return [{**common, "weight_decay": weight_decay} for weight_decay in (optim["weight_decay"], 0.0)]


def _checksums(path: Path) -> dict[Path, str]:
    """Of SHA256SUMS beside the files, or one folder up, where a checkpoint of DeepSpeed's has its ``latest``."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        if (place / SUMS).is_file():
            lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in (place / SUMS).read_text().splitlines()]
            return {place / line[2]: line[1] for line in lines if line}
    return {}
