"""Work in which ranks communicate, and which fails on one of them."""

import pytest

from tests.processes import launch

BEGIN = """
import sys
import torch
from xar_scale import dist
from xar_scale.errors import NonFiniteError

dist.init(torch.device("cpu"))
sent = torch.ones(3)
"""

REPORT = """
import time
from xar_scale.program import exit_code_of
from xar_scale.errors import DataError

def work():
    if dist.rank() == 0:
        time.sleep(3)  # it has more to do at the end than the others
    raise DataError("planted")

code = exit_code_of("test", work)
print("exits at", time.monotonic(), flush=True)
sys.exit(code)
"""

DEFECT = """
def work():
    with dist.abort_on_error():
        if dist.rank() == 1:
            raise ERROR
        torch.distributed.all_reduce(sent)

def main():
    dist.on_all_ranks(work)
    return 0

dist.run(main)
"""

IMAGES = """
from xar_scale.evaluate.fidelity import Extractor

class Passthrough(Extractor):
    def __init__(self):
        pass

    def extract(self, images):
        return {"pooled": images}

class Images:
    parts = 6

    def read(self, part):
        torch.distributed.all_reduce(sent)
        if part == int(sys.argv[1]):
            raise NonFiniteError("planted")
        return torch.full((2,), part)

try:
    found = Passthrough().extract_all(Images())
except NonFiniteError as error:
    dist.leave(3)
assert dist.rank() or found["pooled"].tolist() == [part for part in range(6) for _ in range(2)]
dist.leave(4)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ('RuntimeError("planted")', 1, "RuntimeError: planted"),
        ('OSError("planted")', 74, "xar-scale: planted\n"),
        ('MemoryError("planted")', 71, "is out of memory: planted\n"),
    ],
)
def test_a_defect_is_reported_by_the_rank_that_has_it_which_exits_at_once(tmp_path, error, code, said):
    ended = launch(2, ["-c", BEGIN + DEFECT.replace("ERROR", error)], tmp_path)
    assert ended.codes[1] == code and said in ended.outputs[1] and "gloo" not in ended.outputs[1]
    assert ("Traceback" in ended.outputs[1]) == (code == 1)
    assert ended.codes[0] != 0


@pytest.mark.parametrize(("fails", "code"), [(0, 3), (3, 3), (5, 3), (9, 4)])
def test_features_cover_all_parts_and_no_rank_continues_after_a_failure(fails, code, tmp_path):
    ended = launch(2, ["-c", BEGIN + IMAGES, str(fails)], tmp_path)
    assert ended.codes == [code, code], ended.text


def test_ranks_exit_after_the_one_that_reports_their_error(tmp_path):
    """A launcher ends all ranks when the first one exits."""
    ended = launch(2, ["-c", BEGIN + REPORT], tmp_path)
    assert ended.codes == [65, 65] and ended.outputs[0].startswith("test: planted\n"), ended.text
    assert "frame #" not in ended.text  # rank 0's process hosts the store
    times = [float(output.split()[-1]) for output in ended.outputs]
    assert times[0] - 2 < times[1] < times[0], ended.text  # rank 0 sleeps for three seconds, and then keeps the store for one
