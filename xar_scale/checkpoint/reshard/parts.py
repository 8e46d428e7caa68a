"""What an output file will hold, known to the byte before anything is read."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xar_scale.checkpoint.files import FLOAT32, Fingerprint


class Slice(NamedTuple):
    """Elements [start, stop) of a vector, in float32."""

    key: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return FLOAT32 * (self.stop - self.start)


class Fixed(NamedTuple):
    """Bytes that do not depend on values."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)


class Deferred(NamedTuple):
    """Bytes computed from the CRC-32 of each slice before them in the file."""

    size: int
    make: Callable[[Sequence[int]], bytes]


Part = Slice | Fixed | Deferred


class Output(NamedTuple):
    """An output file, by its name in the destination folder."""

    name: str
    parts: Sequence[Part]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def layout(self) -> str:
        """Return a digest, equal for outputs that will be equal."""
        digest = hashlib.sha256(self.name.encode())
        for part in self.parts:
            known = part.size if isinstance(part, Deferred) else tuple(part)  # without the names of classes and fields
            digest.update(repr(known).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """A folder of files, and a last file (name, content) that is made from their fingerprints."""

    outputs: Sequence[Output]
    last: Callable[[Mapping[str, Fingerprint]], tuple[str, bytes]]

    @property
    def size(self) -> int:
        """Bytes of all files but the last."""
        return sum(output.size for output in self.outputs)
