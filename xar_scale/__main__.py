"""Entry point of ``python -m xar_scale``, which launchers start, and of the command ``xar-scale``."""

import sys
from typing import NoReturn

from xar_scale.cli import main
from xar_scale.dist import run


def command() -> NoReturn:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as stderr: a path may hold any bytes
    run(main)


if __name__ == "__main__":
    command()
