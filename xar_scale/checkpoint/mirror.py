"""A copy of a run's checkpoints behind a URL. A copy is complete once its manifest is there: written last, removed first."""

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
from xar_scale.files import free_name, publish, remove, write_atomically

T = TypeVar("T")
Check = Callable[[Checkpoint], None]  # raises ConfigError if the run cannot resume from it
PROBE = "tried"  # name of a file that is written and removed again
PROBE_BYTES = 1 << 20  # written to find out whether the local disk is to blame
FOLDER_WAIT_S = 60
RETRY_DELAYS_S = 2, 4, 8  # between attempts at the start of a run


class StoreError(FileError):
    """The store does not respond, or refuses."""


class Mirror:
    """Checkpoints in ``URL/checkpoints/step-.../``, for any URL that fsspec opens. All methods raise StoreError naming the URL,
    and DataError if a file to be read is missing."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if ``url`` is not a URL, or no installed library supports its protocol."""
        protocol, separator, path = url.partition("://")
        if not (protocol and separator and path.strip("/")):  # fsspec would treat it as a path
            raise ConfigError(f"train.upload {url} is not a URL such as s3://bucket/runs/h or file:///backup/runs/h")
        self.url = url.rstrip("/")
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"train.upload {url} cannot be opened: {error}") from None

    def is_run_folder(self, run: Path) -> bool:
        """Whether the URL is the run's own folder under another name."""
        kind = fsspec.get_filesystem_class(fsspec.utils.get_protocol(self.url))  # without contacting the store
        if not issubclass(kind, LocalFileSystem):
            return False
        return bool((Path(kind._strip_protocol(self.url)) / FOLDER).resolve() == (run / FOLDER).resolve())

    def listing(self) -> dict[int, bool]:
        """For each step of which anything is there, oldest first: whether its checkpoint is complete."""

        def found(system: fsspec.AbstractFileSystem, root: str) -> dict[int, bool]:
            system.invalidate_cache()
            folders = ((path, re.fullmatch(r"step-(\d{8,})", _name(path))) for path in _listed(system, root))
            return {int(match[1]): MANIFEST in map(_name, _listed(system, path)) for path, match in folders if match}

        return dict(sorted(self._do("listed", "", found).items()))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return [step for step, complete in self.listing().items() if complete]

    def check_writable(self) -> None:
        """Write a file and remove it: called before the work whose copies go here."""

        def check_writable(system: fsspec.AbstractFileSystem, root: str) -> None:
            _make_folder(system, root)
            system.pipe_file(f"{root}/{PROBE}", b"tried")
            system.rm_file(f"{root}/{PROBE}")

        self._do("written", "", check_writable)

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Upload files of the checkpoint ``folder``."""

        def put(system: fsspec.AbstractFileSystem, root: str) -> None:
            _make_folder(system, root)
            for name in names:
                system.put_file(str(folder / name), f"{root}/{name}")

        self._do("written", folder.name, put)

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of the checkpoint of ``step``. Raises DataError if it is torn or changed."""
        name = checkpoint_name(step)
        content = self._do("read", name, lambda system, root: bytes(system.cat_file(f"{root}/{MANIFEST}")))
        return parse_manifest(content, f"{self.url}/{FOLDER}/{name}")

    def download(self, step: int, names: Iterable[str], folder: Path) -> None:
        """Download files of the checkpoint of ``step`` into ``folder``. A local error is a FileError that names the file."""

        def get(system: fsspec.AbstractFileSystem, root: str) -> None:
            for _ in range(FOLDER_WAIT_S):  # rank 0 has just made it: other clients of NFS may not see it at once
                if folder.is_dir():
                    break
                time.sleep(1)
            else:
                raise FileError(f"{folder} does not exist on this node")
            for name in names:
                try:
                    system.get_file(f"{root}/{name}", str(folder / name))
                except Exception:
                    _check_local(folder / name)
                    raise

        self._do("read", checkpoint_name(step), get)

    def remove(self, step: int) -> None:
        """Remove the checkpoint of ``step``, if there is one."""

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
        except FileError:  # a local one
            raise
        except Exception as error:  # each store and library raises its own types
            kind = DataError if what == "read" and isinstance(error, FileNotFoundError) else StoreError
            reason = f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0]
            raise kind(f"{url} cannot be {what}: {reason}") from None


def _check_local(path: Path) -> None:
    """Raise FileError if ``path`` cannot be written. The error of a download does not say on which side it occurred."""
    try:
        write_atomically(path, bytes(PROBE_BYTES))
    except OSError as error:
        raise dist.file_error(error) from None


def _listed(system: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    try:
        return list(system.ls(folder, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _make_folder(system: fsspec.AbstractFileSystem, root: str) -> None:
    bucket, *_ = root.split("/")
    if bucket and not system.exists(bucket):  # makedirs would create it, even if it is misspelt
        raise FileNotFoundError(f"{bucket} does not exist")
    system.makedirs(root, exist_ok=True)


def newest_valid_of(run: Path, mirror: Mirror, check: Check) -> Checkpoint | None:
    """Return the newest valid checkpoint of ``run``, or a newer one of the mirror, which is downloaded into the run's folder.
    If ``check`` refuses that one, nothing is downloaded.

    Every rank calls this. Raises DataError if there are checkpoints but none is valid. An unreachable mirror is reported and
    retried. If it stays unreachable and the run has no checkpoint, StoreError: a new start could lose work unnoticed. So could
    an older checkpoint after a local error during the download, which is a FileError.
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
    except StoreError as error:
        if local is None:
            raise
        dist.say(f"{error}; continuing with {local.path}")
        return local
    if local is None and damaged is not None:
        raise damaged
    return local


def _with_retries(work: Callable[[], T]) -> T:
    """Return what ``work`` on a mirror returns. It is retried on StoreError."""
    for seconds in RETRY_DELAYS_S:
        try:
            return work()
        except StoreError as error:
            dist.say(f"{error}; retrying in {seconds} s")
            time.sleep(seconds)
    return work()


def _fetch(mirror: Mirror, step: int, run: Path, check: Check) -> Checkpoint:
    """Download a checkpoint, each rank a share of the files, verify it and publish it in the run's folder."""
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

    def place() -> None:
        if final.exists():  # it is damaged, or there would be no download
            final.rename(free_name(final.with_name(f"damaged-{final.name}")))
        publish(temporary, final)

    names = dist.on_rank_0(begin)
    dist.say(f"downloading {final.name} from {mirror.url}")
    dist.on_all_ranks(lambda: _with_retries(lambda: mirror.download(step, dist.mine(names), temporary)))
    checkpoint = dist.on_all_ranks(lambda: verify(temporary))
    dist.on_rank_0(place)
    return replace(checkpoint, path=final)
