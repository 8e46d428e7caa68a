"""How programs exit: with their code, and without a normal interpreter shutdown, which PyTorch's threads may abort."""

import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

TAKEN_DOWN = """
import os, runpy, signal, sys

class Last:
    def __del__(self, abort=os.abort):
        abort()

last = Last()
"""


def ended(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TAKEN_DOWN + program, *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)


def test_a_program_s_code_is_the_process_s():
    assert ended("sys.exit(0)").returncode == -6  # a normal shutdown does abort here
    done = ended("import atexit; from xar_scale.dist import run; atexit.register(print, 'at last'); run(lambda: 75)")
    assert done.returncode == 75 and done.stdout == "at last\n"
    done = ended("from xar_scale.dist import run; run(lambda: 1 // 0)")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ZeroDivisionError")
    done = ended("from xar_scale.dist import run; run(lambda: signal.default_int_handler(2, None))")
    assert done.returncode == 130
    closed = "sys.stdout = None; from xar_scale.cli import main; from xar_scale.dist import run; run(main)"
    done = ended(closed, "train", "--recipe", "digits", "--print-config")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "program",
    [
        "runpy.run_module('xar_scale', run_name='__main__')",
        "from importlib.metadata import entry_points; (own,) = entry_points(name='xar-scale'); own.load()()",
        "runpy.run_path('tools/bench.py', run_name='__main__')",
        "runpy.run_path('tools/sweep.py', run_name='__main__')",
    ],
    ids=["module", "command", "bench", "sweep"],
)
def test_programs_that_join_a_process_group_end_at_once(program):
    done = ended(program, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    done = ended(program, "--no-such-option")
    assert done.returncode == 64 and done.stderr.count("\n") == 1
