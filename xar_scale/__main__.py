"""``python -m xar_scale``: what launchers start."""

import atexit
import os
import sys

from torch.distributed import is_initialized

from xar_scale.cli import main

code = main()
if not (code and is_initialized()):  # the process group is not left where something failed
    atexit._run_exitfuncs()
# An interpreter that is taken down around the threads of PyTorch may abort: then the exit code would be SIGABRT's
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
