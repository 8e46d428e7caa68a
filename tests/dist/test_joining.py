"""Joining the process group."""

from tests.processes import launch

PROGRAM = """
import sys, time
from pathlib import Path
import torch, torch.distributed
from xar_scale import dist

if dist.rank() == 1:  # late, when the other has all it needs of it
    join = torch.distributed.init_process_group
    def slowly(*words, **named):
        join(*words, **named)
        time.sleep(2)
        Path(sys.argv[1]).touch()
    torch.distributed.init_process_group = slowly
dist.init(torch.device("cpu"))
dist.leave(3 + Path(sys.argv[1]).exists())
"""


def test_nobody_goes_on_before_all_have_joined(tmp_path):
    ended = launch(2, ["-c", PROGRAM, str(tmp_path / "joined")], tmp_path)
    assert ended.codes == [4, 4], ended.text
