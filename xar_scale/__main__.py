"""``python -m xar_scale``: what launchers start."""

import sys

from xar_scale.cli import main

sys.exit(main())
