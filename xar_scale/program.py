"""The frame of every program: its options; maps each deliberate exit to one line and a code."""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from xar_scale.errors import INTERRUPTED, OK, UNREAD, ProcessError, UsageError

# Launchers end all ranks when the first one exits: silent ranks wait this long for the reporting one
PATIENCE_S = 5.0


class Parser(argparse.ArgumentParser):
    """Accepts no abbreviated options, because launchers pass options too; raises UsageError on errors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def run(self, work: Callable[[argparse.Namespace], None]) -> int:
        """Call ``work`` with the options of the command line and return the exit code."""
        return exit_code_of(self.prog, lambda: work(self.parse_args()))


def _path(word: str) -> Path:
    """A path. Refuses an empty one, which Path would take for the current folder: it comes from an unset shell variable."""
    if not word:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(word)


def nonempty(word: str) -> str:
    """A path or another name, as text. Refuses an empty one."""
    return str(_path(word))


def tool_parser(file: str, description: str | None, **settings: Any) -> Parser:
    """Return the parser of the tool in ``file``, after which it is named. Its ``description`` is printed as it is written."""
    how = argparse.RawDescriptionHelpFormatter
    return Parser(prog=Path(file).stem, description=description, formatter_class=how, **settings)


def exit_code_of(program: str, run: Callable[[], None]) -> int:
    """Call ``run`` and return the exit code, printing its error as one line on standard error. Among several ranks, the one
    with the error prints it, or rank 0 if all have it."""
    from xar_scale import dist

    dist.adopt_launcher()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may hold any bytes
    try:
        run()
    except BrokenPipeError:  # as when `head` has its lines: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output that is still to be flushed
        return UNREAD
    except KeyboardInterrupt:
        if dist.rank() == 0:
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as caught:
        error = dist.known_error(caught)
        if error is None and dist.is_lost_rank(caught):
            message = f"rank {dist.rank()} has lost another rank, which was killed or reports its own error"
            print(f"{program}: {message}", file=sys.stderr, flush=True)
            return ProcessError.exit_code
        if error is None:
            raise
        if error is not caught:  # on this rank alone: errors that ranks share are XarScaleErrors by now
            error.rank = dist.rank()
        if dist.rank() == (error.rank or 0):
            print(f"{program}: {error}", file=sys.stderr, flush=True)
            dist.reported()
        elif dist.has_joined():
            dist.await_report(PATIENCE_S)
        else:
            time.sleep(PATIENCE_S)
        dist.keep_store()
        return error.exit_code  # without leaving the process group: other ranks may wait in it until the launcher ends them
    dist.close()
    return OK
