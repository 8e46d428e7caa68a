"""Recognise the format of a checkpoint and open it as a ``Source``."""

import re
from pathlib import Path

from xar_scale.checkpoint.interop.source import Source
from xar_scale.checkpoint.interop.universal import is_universal, open_universal
from xar_scale.checkpoint.interop.weights import open_weights, weight_files
from xar_scale.checkpoint.interop.zero import is_zero, open_zero
from xar_scale.checkpoint.manifest import FOLDER, LATEST, MANIFEST, checkpoint_paths, read_manifest
from xar_scale.checkpoint.vectors import open_vectors, shapes_of
from xar_scale.errors import DataError, UsageError
from xar_scale.files import is_entry_name

SUMS = "SHA256SUMS"
TAGS = (LATEST, "latest_universal")  # files that name the current checkpoint, a folder next to them


def open_source(path: Path, trust_pickle: bool = False) -> Source:
    """Open an xar-scale or DeepSpeed (ZeRO, universal) checkpoint, a ``.pth``, or safetensors.

    Raises UsageError if there is nothing, DataError if the format is unknown, the file is torn, or unpickling it needs classes
    that are not known to be harmless; ``trust_pickle`` lets those run.
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
            f"{path} is not a checkpoint of a known format: xar-scale ({MANIFEST}), DeepSpeed ZeRO (*_optim_states.pt) or "
            "universal (zero/optimizer_state.pt), .pth, safetensors"
        )
    source.checksums = _checksums(path)
    return source


def _tagged(folder: Path) -> Path:
    """Return the newest checkpoint of an xar-scale run, the one that DeepSpeed's ``latest`` names, or the folder itself."""
    if paths := checkpoint_paths(folder.parent if folder.name == FOLDER else folder):
        return paths[-1]
    for tag in (folder / name for name in TAGS):
        if tag.is_file():
            name = tag.read_text(errors="replace").strip()
            if not is_entry_name(name):
                raise DataError(f"{tag} names {name!r}, which is not a folder next to it")
            if not (folder / name).is_dir():
                raise DataError(f"{tag} names {name}, which does not exist")
            return folder / name
    return folder


def _open_own(path: Path) -> Source:
    checkpoint = read_manifest(path)
    manifest = checkpoint.manifest
    if missing := [name for name in manifest.files if not (path / name).is_file()]:
        raise DataError(f"checkpoint {path}: {missing[0]} is missing")
    for name, entry in manifest.files.items():
        if (size := (path / name).stat().st_size) != entry.bytes:
            raise DataError(f"checkpoint {path}: {name} has {size} bytes, its manifest says {entry.bytes}")
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
    """Settings of the two groups that ``optim.parameter_groups`` makes; none for a checkpoint without a config."""
    if optim is None:
        return []
    common = {name: optim[name] for name in ("lr", "betas", "eps")}
    return [{**common, "weight_decay": weight_decay} for weight_decay in (optim["weight_decay"], 0.0)]


def _checksums(path: Path) -> dict[Path, str]:
    """Read SHA256SUMS next to the files, or one folder up, where DeepSpeed has its ``latest``."""
    folder = path if path.is_dir() else path.parent
    for location in (folder, folder.parent):
        if (location / SUMS).is_file():
            text = (location / SUMS).read_text(errors="surrogateescape")  # as in paths: a name may hold any bytes
            lines = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in text.splitlines()]
            return {location / line[2]: line[1] for line in lines if line}
    return {}
