"""A copy of a run's checkpoints behind a URL: complete once its manifest is there, which is written last and goes first."""

import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from xar_scale import dist
from xar_scale.checkpoint.manifest import (
    FOLDER,
    MANIFEST,
    Checkpoint,
    Manifest,
    checkpoint_name,
    newest_valid,
    parse_manifest,
    verify,
)
from xar_scale.errors import ConfigError, DataError, FileError, XarScaleError
from xar_scale.files import free_name, remove, sync_folder

T = TypeVar("T")
Check = Callable[[Checkpoint], None]  # raises ConfigError where a run cannot go on from it
PROBE = "tried"  # a file, for a moment
RETRY_DELAYS_S = 2, 4, 8  # between attempts at the start


class Mirror:
    """``URL/checkpoints/step-.../``, of whatever fsspec opens. All methods raise FileError that names the URL, and DataError
    where what is read lacks a file."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError where it is no URL, or no installed library speaks its protocol."""
        protocol, separator, place = url.partition("://")
        if not (protocol and separator and place.strip("/")):  # fsspec would take it for a path
            raise ConfigError(f"train.upload {url} is no URL, such as s3://bucket/runs/h or file:///backup/runs/h")
        self.url = url.rstrip("/")
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"train.upload {url} cannot be opened: {error}") from None

    def is_run_folder(self, run: Path) -> bool:
        """Whether it is the run's own folder, under another name."""
        kind = fsspec.get_filesystem_class(fsspec.utils.get_protocol(self.url))  # a store may be silent, and is not asked
        if not issubclass(kind, LocalFileSystem):
            return False
        return bool((Path(kind._strip_protocol(self.url)) / FOLDER).resolve() == (run / FOLDER).resolve())

    def listing(self) -> dict[int, bool]:
        """Whether each checkpoint that something is there of is complete, by steps, oldest first."""

        def found(system: fsspec.AbstractFileSystem, root: str) -> dict[int, bool]:
            system.invalidate_cache()
            folders = ((path, re.fullmatch(r"step-(\d{8,})", _name(path))) for path in _listed(system, root))
            return {int(match[1]): MANIFEST in map(_name, _listed(system, path)) for path, match in folders if match}

        return dict(sorted(self._do("listed", "", found).items()))

    def steps(self) -> list[int]:
        """Of the checkpoints that are complete, oldest first."""
        return [step for step, complete in self.listing().items() if complete]

    def check_writable(self) -> None:
        """Write a file and remove it: before the work whose copies are to be there."""

        def check_writable(system: fsspec.AbstractFileSystem, root: str) -> None:
            _make_folder(system, root)
            system.pipe_file(f"{root}/{PROBE}", b"tried")
            system.rm_file(f"{root}/{PROBE}")

        self._do("written", "", check_writable)

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Files of the checkpoint ``folder``."""

        def put(system: fsspec.AbstractFileSystem, root: str) -> None:
            _make_folder(system, root)
            for name in names:
                system.put_file(str(folder / name), f"{root}/{name}")

        self._do("written", folder.name, put)

    def manifest(self, step: int) -> Manifest:
        """Of the checkpoint of ``step``. Raises DataError where it is not as it was written."""
        name = checkpoint_name(step)
        content = self._do("read", name, lambda system, root: bytes(system.cat_file(f"{root}/{MANIFEST}")))
        return parse_manifest(content, f"{self.url}/{FOLDER}/{name}")

    def download(self, step: int, names: Iterable[str], folder: Path) -> None:
        """Files of the checkpoint of ``step``, into ``folder``."""

        def get(system: fsspec.AbstractFileSystem, root: str) -> None:
            if not folder.is_dir():
                raise OSError(f"{folder} is not there on this node")
            for name in names:
                system.get_file(f"{root}/{name}", str(folder / name))

        self._do("read", checkpoint_name(step), get)

    def remove(self, step: int) -> None:
        """The checkpoint of ``step``, if it is there."""

        def remove(system: fsspec.AbstractFileSystem, root: str) -> None:
            system.invalidate_cache()
            if system.exists(f"{root}/{MANIFEST}"):
                system.rm_file(f"{root}/{MANIFEST}")
            if system.exists(root):
                system.rm(root, recursive=True)

        self._do("removed", checkpoint_name(step), remove)

    def _do(self, what: str, name: str, work: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
        url = f"{self.url}/{FOLDER}/{name}".rstrip("/")
        try:
            system, root = fsspec.url_to_fs(url)
            return work(system, root)
        except Exception as error:  # each store and library has its own kinds
            kind = DataError if what == "read" and isinstance(error, FileNotFoundError) else FileError
            said = f"{type(error).__name__}: {str(error) or 'no more was said'}".splitlines()[0]
            raise kind(f"{url} cannot be {what}: {said}") from None


def _listed(system: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    try:
        return list(system.ls(folder, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _make_folder(system: fsspec.AbstractFileSystem, root: str) -> None:
    bucket, *_ = root.split("/")
    if bucket and not system.exists(bucket):  # or it would be made: a misspelt one too
        raise FileNotFoundError(f"{bucket} does not exist")
    system.makedirs(root, exist_ok=True)


def newest_valid_of(run: Path, mirror: Mirror, check: Check) -> Checkpoint | None:
    """The newest valid checkpoint of ``run``, or a newer one of the mirror, which is fetched to the run's folder first, unless
    ``check`` refuses it: then nothing is.

    Every rank calls this. Raises DataError where there are some and none is valid. A mirror that does not answer is asked
    again, and reported, and raises FileError where the run's folder has none: nobody would know what is lost by beginning anew.
    """
    local: Checkpoint | None = None
    damaged: XarScaleError | None = None
    try:
        local = newest_valid(run)
    except DataError as error:
        damaged = error
    try:
        for step in reversed(dist.on_rank_0(lambda: _with_retries(mirror.steps))):
            if local is not None and step <= local.manifest.step:
                break
            try:
                return _fetch(mirror, step, run, check)
            except DataError as error:
                dist.say(f"{error}; trying the checkpoint before it")
                damaged = error
    except FileError as error:
        if local is None:
            raise
        dist.say(f"{error}; going on with {local.path}")
        return local
    if local is None and damaged is not None:
        raise damaged
    return local


def _with_retries(work: Callable[[], T]) -> T:
    """What ``work`` of a mirror returns. Without an answer it is tried again."""
    for seconds in RETRY_DELAYS_S:
        try:
            return work()
        except FileError as error:
            dist.say(f"{error}; again in {seconds} s")
            time.sleep(seconds)
    return work()


def _fetch(mirror: Mirror, step: int, run: Path, check: Check) -> Checkpoint:
    """Each rank fetches a share of the files."""
    final = run / FOLDER / checkpoint_name(step)
    temporary = final.with_name(f".{final.name}.tmp")

    def begin() -> list[str]:
        manifest = _with_retries(lambda: mirror.manifest(step))
        try:
            check(Checkpoint(Path(final.name), manifest))
        except ConfigError as error:
            raise ConfigError(f"train.upload {mirror.url}: {error}") from None
        if os.path.lexists(temporary):
            remove(temporary)
        temporary.mkdir(parents=True)
        return [MANIFEST, *manifest.files]

    def publish() -> None:
        if final.exists():  # damaged, or it would not be fetched
            final.rename(free_name(final.with_name(f"damaged-{final.name}")))
        temporary.rename(final)
        sync_folder(final.parent)

    names = dist.on_rank_0(begin)
    dist.say(f"fetching {final.name} from {mirror.url}")
    dist.together(lambda: _with_retries(lambda: mirror.download(step, dist.mine(names), temporary)))
    checkpoint = dist.together(lambda: verify(temporary))
    dist.on_rank_0(publish)
    return replace(checkpoint, path=final)
