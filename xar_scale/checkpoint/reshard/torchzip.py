"""``torch.save`` files whose values are written later: torch lays the file out without values; checksums are filled in."""

import struct
import tempfile
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from xar_scale.checkpoint.interop.pickled import content_offset
from xar_scale.checkpoint.reshard.parts import Deferred, Fixed, Output, Part, Slice
from xar_scale.errors import FileError

RECORD = struct.Struct("<4s12xI8x3H12x")  # an entry in the central directory at the end of a zip archive
DESCRIPTOR_CRC, RECORD_CRC = 4, 16  # offset of the CRC-32 in the data descriptor after an entry, and in its record


class Placeholder(NamedTuple):
    """Stands for a float32 tensor in a value to be saved."""

    key: str
    shape: torch.Size


def small_torch_file(name: str, value: Any) -> Output:
    """Return a file that holds no parameter."""
    buffer = BytesIO()
    torch.save(value, buffer)
    return Output(name, [Fixed(buffer.getvalue())])


def torch_file(name: str, value: Any) -> Output:
    """Return the file that ``torch.save`` writes for nested dicts, each ``Placeholder`` a tensor. Other tensors are lost."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    found: list[Placeholder] = []

    def hollow(value: Any) -> Any:
        if isinstance(value, Placeholder):
            found.append(value)
            return torch.empty(value.shape)
        return {key: hollow(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name  # torch names the archive's root after the file
        with FakeTensorMode():
            hollowed = hollow(value)
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(hollowed, path)  # values are holes in the file: it takes no space
        except RuntimeError as error:  # torch raises it for system errors
            reason = str(error).partition("\n")[0]
            raise FileError(f"{path} cannot be written; is the disk of {tempfile.gettempdir()} full? ({reason})") from None
        with path.open("rb") as file:
            return Output(name, _parts(file, found))


def _parts(file: BinaryIO, tensors: Sequence[Placeholder]) -> list[Part]:
    """Storages are numbered and stored in the order in which the tensors were met."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    parts: list[Part] = []
    end = 0  # of the last tensor's values
    for number, tensor in enumerate(tensors):
        entry = entries[f"data/{number}"]
        begin = content_offset(file, entry)
        assert entry.file_size == 4 * tensor.shape.numel() and not entry.compress_type, f"{tensor.key}: {entry}"
        parts += [_between(file, end, begin, number), Slice(tensor.key, 0, tensor.shape.numel())]
        end = begin + entry.file_size
    size = file.seek(0, 2)
    file.seek(archive.start_dir)
    directory = file.read(size - archive.start_dir)
    parts += [_between(file, end, archive.start_dir, len(tensors)), _directory(directory, len(tensors))]
    return parts


def _between(file: BinaryIO, begin: int, end: int, before: int) -> Part:
    """The bytes from the end of a tensor's values, where its CRC-32 goes, to the next values; ``before``: tensors so far."""
    file.seek(begin)
    content = file.read(end - begin)
    if not before or not content.startswith(b"PK\x07\x08"):  # without values there is no descriptor
        return Fixed(content)
    return Deferred(len(content), lambda sums: _with(content, DESCRIPTOR_CRC, sums[before - 1]))


def _directory(content: bytes, tensors: int) -> Deferred:
    """The central directory, in which tensors keep their order, and the end of the archive."""

    def make(sums: Sequence[int]) -> bytes:
        patched, at = content, 0
        while content.startswith(b"PK\x01\x02", at):
            _, _, name, extra, comment = RECORD.unpack_from(content, at)
            folder, _, number = content[at + RECORD.size : at + RECORD.size + name].decode().rpartition("/")
            if folder.endswith("/data") and number.isdigit():
                patched = _with(patched, at + RECORD_CRC, sums[int(number)])
            at += RECORD.size + name + extra + comment
        return patched

    return Deferred(len(content), make)


def _with(content: bytes, at: int, crc: int) -> bytes:
    return content[:at] + struct.pack("<I", crc) + content[at + 4 :]
