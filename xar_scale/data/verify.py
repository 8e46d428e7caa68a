"""Verify a whole set: every byte of every shard, with each fault named by its sample."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from xar_scale.data.index import crc32_of, index_tar
from xar_scale.data.processes import map_in_processes
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import INDEX, DatasetInfo
from xar_scale.errors import DataError, FileError


def verify_set(shards: LatentShards, processes: int) -> Iterator[tuple[str, list[str]]]:
    """Yield (shard, its faults) for every shard, in order."""
    names = (shard.name for shard in shards.info.shards)
    found = map_in_processes(_faults_of, range(len(shards.info.shards)), processes, initializer=_open, initargs=(shards,))
    yield from zip(names, found, strict=True)


def stray_files(folder: Path, info: DatasetInfo) -> list[str]:
    """Return the tars and indexes in the set's folder that it does not list."""
    listed = {f"{shard.name}{ending}" for shard in info.shards for ending in (".tar", INDEX)}
    found = {path.name for path in folder.iterdir() if path.name.endswith((".tar", INDEX))}
    return sorted(found - listed)


_opened: list[LatentShards] = []  # in a worker process: sent once, not with every shard number


def _open(shards: LatentShards) -> None:
    _opened[:] = [shards]


def _faults_of(number: int) -> list[str]:
    try:
        return _faults(_opened[0], number)
    except FileError as error:
        return [str(error)]
    except OSError as error:
        return [f"cannot read shard {_opened[0].path(number)}: {error.strerror}"]


def _faults(shards: LatentShards, number: int) -> list[str]:
    try:
        stored = shards.index(number)
    except DataError as error:  # the index, or the file as a whole: no sample can be checked
        return [str(error)]
    found = [_fault(shards, number, position) for position in range(len(stored.keys))]
    faults = [fault for fault in found if fault is not None]
    path, shard = shards.path(number), shards.info.shards[number]
    with open(path, "rb") as file:
        if crc32_of(file) == shard.crc32:
            return faults
        # changed, maybe outside the arrays: index the tar again and compare
        try:
            again = index_tar(file, path, shards.info.members, shards.info.flipped)
        except DataError as error:
            return [*faults, str(error)]
    for position, (was, is_) in enumerate(zip_longest(stored.rows(), again.rows())):
        if was != is_ and (position >= len(found) or found[position] is None):
            faults.append(f"shard {path}, sample {(was or is_)[0]} (number {position}): differs from the index")
    return faults or [f"shard {path} has changed, in bytes that belong to no sample"]


def _fault(shards: LatentShards, number: int, position: int) -> str | None:
    for flipped in (False, True) if shards.info.flipped else (False,):
        try:
            key, _, array = shards.read_array(number, position, flipped=flipped)
        except DataError as error:
            return str(error)
        if not np.isfinite(array).all():
            which = "mirrored array" if flipped else "array"
            return f"shard {shards.path(number)}, sample {key} (number {position}): its {which} is not finite"
    return None
