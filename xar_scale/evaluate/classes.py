"""Parse classes and seeds from the command line: numbers, ImageNet class names, WordNet IDs (n02099601)."""

import difflib
import re
from collections.abc import Sequence
from functools import cache

from xar_scale.errors import UsageError
from xar_scale.rng import SEEDS

IMAGENET_CLASSES = 1000
MOST_SEEDS = 1_000_000  # in all; more is a mistake and would not fit in memory


def parse_classes(text: str, classes: int) -> list[int]:
    """Return class numbers without duplicates, for a model of ``classes``. Raises UsageError that suggests similar names."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"--classes {text!r}: empty entry between commas")
    return list(dict.fromkeys(number for word in words for number in _numbers(word, classes)))


def _numbers(word: str, classes: int) -> list[int]:
    if span := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise UsageError(f"classes {word}: a range must go from the smaller number to the larger")
        if last >= classes:
            raise UsageError(f"class {word} is outside 0..{classes - 1}")
        return [*range(first, last + 1)]
    if classes != IMAGENET_CLASSES:
        raise UsageError(f"class {word!r} is not a number in 0..{classes - 1}; names need {IMAGENET_CLASSES} ImageNet classes")
    known = _by_name()
    found = known.get(word.lower())
    if found is None:
        near = difflib.get_close_matches(word.lower(), known, n=3)
        raise UsageError(f"no class is named {word!r}" + (f"; similar names: {', '.join(near)}" if near else ""))
    if len(found) > 1:
        choices = ", ".join(f"{number} ({', '.join(names(number))})" for number in found)
        raise UsageError(f"{word!r} names {len(found)} classes, choose by number: {choices}")
    return found


def parse_seeds(text: str) -> list[int]:
    """Return seeds, without duplicates, from numbers and ranges such as 0-9,17. Raises UsageError."""
    seeds: list[int] = []
    for word in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise UsageError(f"--seeds {text!r} is not a comma-separated list of numbers and ranges, such as 0-9,17")
        first, last = int(span[1]), int(span[2] or span[1])
        if last >= SEEDS or len(seeds) + last - first >= MOST_SEEDS:
            raise UsageError(f"--seeds {text!r}: seeds must be below 2^64, with at most {MOST_SEEDS:,} in all")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def title(number: int, classes: int) -> str:
    """Return the number, for ImageNet followed by the class's first name (if timm is installed)."""
    try:
        return f"{number} {names(number)[0]}" if classes == IMAGENET_CLASSES else str(number)
    except UsageError:
        return str(number)


def names(number: int) -> Sequence[str]:
    """Return the names of an ImageNet class, the usual one first. Raises UsageError without timm."""
    return _lists()[number][1:]


@cache
def _lists() -> list[list[str]]:
    """Return for each class its WordNet ID, followed by its names."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        raise UsageError("class names need timm: pip install 'xar_scale[evaluate]'") from None
    known = ImageNetInfo("imagenet-1k")
    return [
        [known.index_to_label_name(n), *re.split(r",\s*", known.index_to_description(n))] for n in range(known.num_classes())
    ]


@cache
def _by_name() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, given in enumerate(_lists()):
        for name in given:
            found.setdefault(name.lower(), []).append(number)
    return found
