"""Entry point of ``python -m xar_scale``, which launchers start, and of the command ``xar-scale``."""

from typing import NoReturn

from xar_scale.cli import main
from xar_scale.dist import run


def command() -> NoReturn:
    run(main)


if __name__ == "__main__":
    command()
