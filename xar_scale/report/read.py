"""Read a run's folder for its report: config, log, heartbeat, times."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xar_scale.config import Config, read_yaml, validated
from xar_scale.errors import ConfigError, UsageError
from xar_scale.files import parse_json
from xar_scale.metrics import METRICS_FILE, TENSORBOARD_FOLDER, read_log
from xar_scale.startup import CONFIG_FILE
from xar_scale.watchdog import HEARTBEAT_FILE

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
        entries=read_log(path),
        started=_started(path),
        written=log.stat().st_mtime,
        heartbeat=_heartbeat(path / HEARTBEAT_FILE),
    )


def _started(run: Path) -> float | None:
    """Return the earliest start time in the names of TensorBoard's files."""
    names = (file.name for file in (run / TENSORBOARD_FOLDER).glob("events.*"))
    times = [float(found[1]) for name in names if (found := re.search(r"tfevents\.(\d+\.\d+)\.", name))]
    return min(times, default=None)


def _heartbeat(path: Path) -> dict[str, Any] | None:
    try:
        beat = parse_json(path.read_text())
        return {"step": int(beat["step"]), "time": float(beat["time"]), "host": beat["host"], "pid": beat["pid"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # optional: a run that has just started has none
