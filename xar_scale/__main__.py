"""``python -m xar_scale``: what launchers start."""

import os
import sys

from torch.distributed import is_initialized

from xar_scale.cli import main

code = main()
if code and is_initialized():
    # The process group is not left where something failed, and an interpreter that is taken down around its threads may
    # abort: then the exit code would be SIGABRT's
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
