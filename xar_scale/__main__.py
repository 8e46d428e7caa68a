"""``python -m xar_scale``: what launchers start."""

import atexit
import traceback

from torch.distributed import is_initialized

from xar_scale.cli import main
from xar_scale.dist import leave

try:
    code = main()
except (Exception, KeyboardInterrupt) as error:  # a defect, or Ctrl-C
    traceback.print_exc()
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
if not (code and is_initialized()):  # the process group is not left where something failed
    atexit._run_exitfuncs()
leave(code)
