"""``python -m xar_scale``: what launchers start."""

import atexit
import os
import sys
import traceback
from pathlib import Path

from torch.distributed import is_initialized

from xar_scale.cli import main

try:
    code = main()
except (Exception, KeyboardInterrupt) as error:  # a defect, or Ctrl-C
    traceback.print_exc()
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
if (
    note := os.environ.get("XAR_SCALE_EXIT_FILE")
) and code != 1:  # for the scripts in launchers/: torchrun says 1 for all, srun 137
    Path(note).write_text(str(code))
if not (code and is_initialized()):  # the process group is not left where something failed
    atexit._run_exitfuncs()
# An interpreter that is taken down around the threads of PyTorch may abort: then the exit code would be SIGABRT's. And where
# another rank is gone it may wait for good.
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
