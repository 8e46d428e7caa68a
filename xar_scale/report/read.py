"""A run's folder as it is read for its report: config, log, heartbeat and when it was written."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xar_scale.config import Config, read_yaml, validated
from xar_scale.errors import ConfigError, UsageError
from xar_scale.metrics import METRICS_FILE, TENSORBOARD_FOLDER, read_log
from xar_scale.startup import CONFIG_FILE
from xar_scale.watchdog import HEARTBEAT_FILE

Entries = list[dict[str, Any]]  # of the log, a dictionary a logged step


@dataclass(frozen=True)
class RunFolder:
    """Times are seconds since 1970."""

    config: Config
    config_text: str  # as it lies there
    entries: Entries
    begun: float | None  # where TensorBoard's files tell
    written: float  # the log, the last time
    heartbeat: dict[str, Any] | None  # step under way, time it was begun, host, pid


def read_run(path: Path) -> RunFolder:
    """Raises UsageError where there is no run, ConfigError where its config is none that this version knows."""
    if not path.is_dir():
        raise UsageError(f"no run at {path}")
    config, log = path / CONFIG_FILE, path / METRICS_FILE
    if missing := [file.name for file in (config, log) if not file.is_file()]:
        raise UsageError(f"{path} is no run's folder: it has no {missing[0]}")
    values = read_yaml(config)
    return RunFolder(
        config=validated(Config, values, ConfigError, f"{config}: "),
        config_text=config.read_text(encoding="utf-8"),
        entries=read_log(path),
        begun=_begun(path),
        written=log.stat().st_mtime,
        heartbeat=_heartbeat(path / HEARTBEAT_FILE),
    )


def _begun(run: Path) -> float | None:
    """TensorBoard's files have the time at which they were begun in their names."""
    names = (file.name for file in (run / TENSORBOARD_FOLDER).glob("events.*"))
    times = [float(found[1]) for name in names if (found := re.search(r"tfevents\.(\d+\.\d+)\.", name))]
    return min(times, default=None)


def _heartbeat(path: Path) -> dict[str, Any] | None:
    try:
        beat = json.loads(path.read_text())
        return {"step": int(beat["step"]), "time": float(beat["time"]), "host": beat["host"], "pid": beat["pid"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a run that has only begun has none, and none is needed
