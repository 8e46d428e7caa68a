"""kill -9 while checkpoints are written: whatever the moment, a whole one is there, and the run comes out the same."""

import json
import subprocess
import sys

import pytest

from tests.dist.states import assert_bitwise, state
from tests.e2e.kills import STEPS
from tests.processes import ROOT, environment
from xar_scale.evaluate.digits import cache_digits

KILLS = 50


@pytest.mark.long
def test_fifty_kills_while_saving_cost_nothing_but_the_steps_since_the_last_checkpoint(tmp_path):
    cache_digits(tmp_path / "data", samples_per_shard=500)
    command = [sys.executable, "-m", "tests.e2e.kills", tmp_path, tmp_path / "data", str(KILLS)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    kills = told["kills"]
    assert [kill["code"] for kill in kills] == [-9] * KILLS and told["end"] == 0
    assert all(kill["after"] >= kill["before"] for kill in kills)
    during = "\n".join(kill["during"] for kill in kills)
    for moment in (
        "before rename .step",
        "after rename .step",
        "before replace latest",
        "after replace latest",
        "before rmtree",
    ):
        assert moment in during, during
    assert during.count("at a random moment") == KILLS // 2
    assert_bitwise(state(tmp_path / "killed", STEPS), state(tmp_path / "undisturbed", STEPS))
    assert not [path for path in (tmp_path / "killed" / "checkpoints").iterdir() if "damaged" in path.name]
