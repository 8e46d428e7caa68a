"""README's speed table, generated from docs/benchmarks/records.

python tools/records.py            # print it
python tools/records.py --write    # write it into README.md
"""

import sys
from pathlib import Path

from xar_scale.bench.record import OURS, PUBLISHED, Record, read_record
from xar_scale.errors import UsageError
from xar_scale.program import tool_parser

ROOT = Path(__file__).parent.parent
RECORDS, README = ROOT / "docs" / "benchmarks" / "records", ROOT / "README.md"
BEGIN, END = "<!-- speed: tools/records.py --write -->", "<!-- end of speed -->"
WORK = {"step": "training step", "sample": "sampling"}


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    return parser.run(lambda options: make(options.write))


def make(write: bool) -> None:
    made = table([read_record(path) for path in sorted(RECORDS.glob("*.json"))])
    if write:
        README.write_text(put(README.read_text(), made))
    else:
        print(made)


def table(records: list[Record]) -> str:
    """Return one table per machine, of the records that also time the published code."""
    rows: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda record: (record.what != "step", record.settings["model"], record.date)):
        if PUBLISHED in record.seconds:
            rows.setdefault(f"{record.machine}, {record.date}", []).append(_row(record))
    head = "| | published, images/s | ours, images/s | speedup | MFU |\n| --- | --- | --- | --- | --- |"
    return "\n\n".join(f"{where}:\n\n{head}\n" + "\n".join(lines) for where, lines in rows.items())


def _row(record: Record) -> str:
    settings = record.settings
    more = f", {settings['steps']} steps per entity, guidance" if record.what == "sample" else ""
    name = f"{WORK[record.what]}, {settings['model']}, batch {settings['batch']}{more}, {settings['precision']}"
    theirs, ours = (record.images / record.median(case) for case in (PUBLISHED, OURS))
    peak = "" if record.mfu is None else f"{record.mfu:.0%}"
    return f"| {name} | {theirs:.3g} | {ours:.3g} | {record.speedup(PUBLISHED):.2f} | {peak} |"


def put(text: str, made: str) -> str:
    """Return ``text`` with the table ``made`` between the marks. Raises UsageError if the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{README} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
