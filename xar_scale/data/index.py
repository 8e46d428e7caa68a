"""The index of one shard: the samples in a tar, the location of their arrays, and the checksums of their bytes."""

import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from typing_extensions import Self

from xar_scale.errors import DataError
from xar_scale.files import parse_json

LARGE_RECORDS = [1 << power for power in range(15, 21)]  # tar record sizes other than the usual one are powers of two
MOST_DIGITS = 18  # of a label: further on it would not fit an integer of 64 bits
LATENT, FLIPPED, LABEL = "latent.npy", "flipped.npy", "cls"  # members of a sample, as this project writes them


@dataclass
class Spans:
    """The byte range of one array of each sample: its headers start at ``begin``, its content of ``size`` bytes at ``data``;
    ``crc32`` is that of everything from ``begin`` to the end of the content."""

    begin: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)


@dataclass
class Index:
    """Columns over the samples of a shard, in the tar's order."""

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    latent: Spans = field(default_factory=Spans)
    flipped: Spans = field(default_factory=Spans)  # empty if the set has no mirrored arrays

    def rows(self) -> list[tuple[Any, ...]]:
        """Return (key, label, begin, data, size, crc32 of the array, the same of the mirrored array) for each sample."""
        spans = [*vars(self.latent).values(), *vars(self.flipped).values()]
        return list(zip(self.keys, self.labels, *(column for column in spans if column), strict=True))

    def to_json(self) -> bytes:
        arrays = {name: vars(spans) for name, spans in (("latent", self.latent), ("flipped", self.flipped)) if spans.begin}
        return json.dumps({"keys": self.keys, "labels": self.labels, **arrays}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Parse what ``to_json`` wrote. Raises ValueError, KeyError or TypeError if it has other keys; columns are as found."""
        values: dict[str, Any] = parse_json(content)
        latent, flipped = Spans(**values["latent"]), Spans(**values.get("flipped", {}))
        return cls(values["keys"], values["labels"], latent, flipped)


@dataclass(frozen=True)
class Members:
    """Names of a sample's files: what follows its key and a dot."""

    latent: str = LATENT
    flipped: str = FLIPPED  # of the mirrored image's array, in sets that have one
    label: str = LABEL


def index_tar(file: BinaryIO, path: str, members: Members, flipped: bool, *, checksums: bool = True) -> Index:
    """Return the index of a WebDataset tar, reading all of it; without ``checksums`` (then 0) read only headers and labels.

    A sample is a run of files whose names agree up to the first dot after the last slash. Its other members are ignored, and
    so are samples that have none of the wanted ones. Raises DataError, naming ``path`` and the sample, if the tar is torn or
    garbled, or if a sample lacks a member, appears twice, or has a member twice.
    """
    index, found, seen = Index(), dict[str, Any](), set[str]()
    arrays = {members.latent: index.latent} | ({members.flipped: index.flipped} if flipped else {})
    wanted = {*arrays, members.label}
    key, end = "", 0
    header = _header_class(file.seek(0, os.SEEK_END))
    file.seek(0)

    def finish() -> None:
        if not found:
            return
        if key in seen:
            raise DataError(f"shard {path}, sample {key}: appears twice")
        seen.add(key)
        if missing := sorted(wanted - found.keys()):
            raise DataError(f"shard {path}, sample {key} (number {len(index.keys)}): {missing[0]} is missing")
        index.keys.append(key)
        index.labels.append(_label(found[members.label], path, key))
        for name, spans in arrays.items():
            for column, value in found[name].items():
                getattr(spans, column).append(value)

    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=header) as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, slash, base = member.name.rpartition("/")
                stem, _, name = base.partition(".")
                this = f"{folder}{slash}{stem}"
                if not member.isreg() or not stem or name not in wanted:
                    continue
                if this != key:
                    finish()
                    key, found = this, {}
                if name in found:
                    raise DataError(f"shard {path}, sample {key}: {name} appears twice")
                found[name] = _span(file, member, checksums) if name != members.label else _content(file, member)
    except tarfile.TarError as error:
        raise DataError(f"shard {path} is not a complete tar: {error}") from None
    # Python's tarfile silently takes a garbled or zeroed header for the end of the archive
    file.seek(end)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise DataError(f"shard {path}: after sample {key}, at byte {end}: neither a header nor the end of the tar")
    zeros = file.tell() - end
    if zeros < 2 * tarfile.BLOCKSIZE:
        raise DataError(f"shard {path} is truncated: the tar does not end after sample {key}")
    # the end of a tar fills a record, whose size is not stored in the tar; a crash may leave more zeros than that
    least = end + 2 * tarfile.BLOCKSIZE
    fills = any(file.tell() == -(-least // record) * record for record in LARGE_RECORDS)
    if zeros > 2 * tarfile.RECORDSIZE and not fills:
        raise DataError(f"shard {path}: after sample {key}, at byte {end}: {zeros} zeros, more than the end of a tar has")
    finish()
    return index


def _header_class(whole: int) -> type[tarfile.TarInfo]:
    """Return a class for the headers of a tar of ``whole`` bytes: those that tarfile would not survive are a ReadError.

    A negative size sends tarfile back to headers it has read, forever, in Pythons before the mend of CVE-2025-8194.
    """

    def checked(header: tarfile.TarInfo) -> None:
        if not 0 <= header.size <= whole:
            raise tarfile.ReadError(f"a header declares {header.size:,} bytes, the file has {whole:,}")

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            header = super().frombuf(buf, encoding, errors)
            checked(header)  # before tarfile reads that many bytes, if they extend the next header
            return header

        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
            try:
                header = super().fromtarfile(tar)
            except (ValueError, IndexError, RecursionError):  # tarfile parses extended headers as if they were always right
                raise tarfile.ReadError("an extended header is garbled") from None
            checked(header)  # again: an extended header may replace the size
            return header

    return Header


def _span(file: BinaryIO, member: tarfile.TarInfo, checksums: bool) -> dict[str, int]:
    begin, data, size = member.offset, member.offset_data, member.size
    crc32 = zlib.crc32(_bytes(file, begin, data + size)) if checksums else 0
    return {"begin": begin, "data": data, "size": size, "crc32": crc32}


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    return _bytes(file, member.offset_data, member.offset_data + member.size)


def _bytes(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    content = file.read(end - begin)
    if len(content) < end - begin:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _label(content: bytes, path: str, key: str) -> int:
    if not content.strip().isdigit() or len(content.strip()) > MOST_DIGITS:
        label = content[: MOST_DIGITS + 2]
        raise DataError(f"shard {path}, sample {key}: its label {label!r} is not a number of up to {MOST_DIGITS} digits")
    return int(content)


def crc32_of(file: BinaryIO) -> int:
    """Return the CRC-32 of a whole file."""
    file.seek(0)
    crc32 = 0
    while block := file.read(1 << 20):
        crc32 = zlib.crc32(block, crc32)
    return crc32
