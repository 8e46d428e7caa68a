"""Tables as text."""

from collections.abc import Sequence


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns under their titles."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = (titles, *rows)
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines)
