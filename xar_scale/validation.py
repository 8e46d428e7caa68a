"""Values read from a file or a command line into a frozen dataclass, or one line that names the first one that is wrong."""

import dataclasses
import json
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from xar_scale.errors import XarScaleError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MAX_COUNT = 1 << 53  # of steps, samples or bytes: a larger number in a file is damage
Count = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
LONGEST = 200  # characters of a value in an error
T = TypeVar("T")


def validated(cls: type[T], values: dict[str, Any], error: type[XarScaleError], where: str = "") -> T:
    """Build the dataclass ``cls`` from plain values. Raises ``error`` with ``where``, the first offending key and its value."""

    def refuse(value: Any) -> None:
        raise error(f"{where}{value!r} is a {type(value).__name__}: no key takes one")

    try:
        text = json.dumps(values, default=refuse)
    except (ValueError, RecursionError):
        raise error(f"{where}the values contain themselves") from None
    try:
        return TypeAdapter(cls).validate_json(text)  # a JSON list may become a tuple; nothing else is coerced
    except ValidationError as caught:
        first = caught.errors()[0]
        if not first["loc"]:  # of the whole text, not of a key
            raise error(f"{where}{first['msg']}") from None
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise error(f"{where}{unknown_key(cls, first['loc'])}") from None
        if first["type"] in ("missing", "missing_argument"):
            raise error(f"{where}key {key} is missing") from None
        raise error(f"{where}{key} = {_shown(first['input'])}: {first['msg']}") from None


def _shown(value: Any) -> str:
    """Return ``value`` as a line shows it: a file may hold anything where a number should be."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def unknown_key(cls: Any, location: tuple[int | str, ...]) -> str:
    """Return the complaint about a key that ``cls`` does not have."""
    return f"unknown key {'.'.join(map(str, location))}; known keys: {', '.join(known_keys(cls, location))}"


def known_keys(cls: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys at the location of a key."""
    for part in location[:-1]:
        cls = {field.name: field.type for field in dataclasses.fields(cls)}[str(part)]
    return [field.name for field in dataclasses.fields(cls)]
