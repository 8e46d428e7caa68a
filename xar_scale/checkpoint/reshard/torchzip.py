"""Files of ``torch.save`` whose values are written later: torch lays them out, without values; checksums are put in."""

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

RECORD = struct.Struct("<4s12xI8x3H12x")  # of an entry, in the directory at a zip archive's end
DESCRIPTOR_CRC, RECORD_CRC = 4, 16  # where in what follows an entry's data, and in its record, its CRC-32 is


class Placeholder(NamedTuple):
    """Stands for a float32 tensor in what is saved."""

    key: str
    shape: torch.Size


def small_torch_file(name: str, value: Any) -> Output:
    """A file that holds no parameter."""
    buffer = BytesIO()
    torch.save(value, buffer)
    return Output(name, [Fixed(buffer.getvalue())])


def torch_file(name: str, value: Any) -> Output:
    """What ``torch.save`` makes of nested dicts in which every ``Placeholder`` is a tensor. Other tensors would be lost."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    found: list[Placeholder] = []

    def hollow(value: Any) -> Any:
        if isinstance(value, Placeholder):
            found.append(value)
            return torch.empty(value.shape)
        return {key: hollow(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name  # torch names what is inside after the file
        with FakeTensorMode():
            hollowed = hollow(value)
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(hollowed, path)  # holes where values will be: it takes no room
        except RuntimeError as error:  # torch has no other for what the system refuses
            said = str(error).partition("\n")[0]
            raise FileError(f"{path} cannot be written; is the disk of {tempfile.gettempdir()} full? ({said})") from None
        with path.open("rb") as file:
            return Output(name, _parts(file, found))


def _parts(file: BinaryIO, tensors: Sequence[Placeholder]) -> list[Part]:
    """Storages are numbered, and lie in the file, in the order in which tensors were met."""
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
    """From the end of a tensor's values, where its CRC-32 belongs, to the next one's; ``before``: tensors so far."""
    file.seek(begin)
    content = file.read(end - begin)
    if not before or not content.startswith(b"PK\x07\x08"):  # nothing follows where there are no values
        return Fixed(content)
    return Deferred(len(content), lambda sums: _with(content, DESCRIPTOR_CRC, sums[before - 1]))


def _directory(content: bytes, tensors: int) -> Deferred:
    """Records of all entries, those of tensors in their order, and what ends the archive."""

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
