"""Read a run's folder for its report: config, log, heartbeat, times."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xar_scale.config import Config, read_yaml
from xar_scale.errors import ConfigError, UsageError
from xar_scale.files import parse_json
from xar_scale.metrics import METRICS_FILE, TENSORBOARD_FOLDER, read_log
from xar_scale.startup import CONFIG_FILE
from xar_scale.validation import MAX_COUNT, validated
from xar_scale.watchdog import HEARTBEAT_FILE

LARGEST = 3.5e38  # just above float32's
Entries = list[dict[str, Any]]  # of the log, a dictionary per logged step


@dataclass(frozen=True)
class RunFolder:
    """Times are seconds since 1970."""

    config: Config
    config_text: str  # the file as it is
    entries: Entries
    started: float | None  # from the names of TensorBoard's files
    written: float  # modification time of the log
    heartbeat: dict[str, Any] | None  # current step, its start time, host, pid


def read_run(path: Path) -> RunFolder:
    """Read the folder. Raises UsageError if it is not a run, ConfigError if this version cannot read its config."""
    if not path.is_dir():
        raise UsageError(f"no run at {path}")
    config, log = path / CONFIG_FILE, path / METRICS_FILE
    if missing := [file.name for file in (config, log) if not file.is_file()]:
        raise UsageError(f"{path} is not a run's folder: it has no {missing[0]}")
    values = read_yaml(config)
    return RunFolder(
        config=validated(Config, values, ConfigError, f"{config}: "),
        config_text=config.read_text(encoding="utf-8"),
        entries=[_typed(entry) for entry in read_log(path)],
        started=_started(path),
        written=log.stat().st_mtime,
        heartbeat=_heartbeat(path / HEARTBEAT_FILE),
    )


def _typed(entry: dict[str, Any]) -> dict[str, Any]:
    """Return those values of a log's entry that have the types that training logs."""
    typed = {name: value for name, value in entry.items() if _is_number(value) and name != "forward_s"}
    if isinstance(precision := entry.get("precision"), str):
        typed["precision"] = precision
    seconds = entry.get("forward_s")
    if isinstance(seconds, list) and all(_is_number(value) and 0 < value < math.inf for value in seconds):
        typed["forward_s"] = seconds
    return typed


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be plotted: within float32's range, or not finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not LARGEST < abs(value) < math.inf


def _started(run: Path) -> float | None:
    """Return the earliest start time in the names of TensorBoard's files."""
    names = (file.name for file in (run / TENSORBOARD_FOLDER).glob("events.*"))
    times = [float(found[1]) for name in names if (found := re.search(r"tfevents\.(\d+\.\d+)\.", name))]
    return min(times, default=None)


def _heartbeat(path: Path) -> dict[str, Any] | None:
    try:
        beat = parse_json(path.read_text())
        step = int(beat["step"])
        found = {"step": step, "time": float(beat["time"]), "host": str(beat["host"]), "pid": str(beat["pid"])}
        return found if 0 <= step < MAX_COUNT else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # optional: a run that has just started has none
