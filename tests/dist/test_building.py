"""A model is built shard by shard: no rank ever holds all of it."""

import json
import sys

import pytest

from tests.processes import launch
from xar_scale.evaluate.digits import cache_digits

WORLD = 2
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from xar_scale import dist
from xar_scale.config import Config, override
from xar_scale.engines import create_engine
from xar_scale.model.xar import initial_weights, meta_model
from xar_scale.presets import recipe

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

sizes = ["model.width=768", "model.heads=12", "model.depth_encoder=4", "model.depth_decoder=4"]
config = Config.from_dict(override(recipe("digits"), [*sizes, f"train.engine={sys.argv[1]}"]))
device = torch.device("cpu")
dist.init(device)
import deepspeed
model = meta_model(config.model)
parameters = [parameter.numel() * 4 for parameter in model.parameters()]
seen = []

def watched():
    for weight in initial_weights(model, 0):
        seen.append(resident())
        yield weight
    seen.append(resident())

engine = create_engine(model, watched(), config, device)
owned = sum(shard.stop - shard.start for shard in engine.shards()) * 4
print("RESULT", json.dumps({"whole": sum(parameters), "owned": owned, "grown": max(seen) - seen[0]}))
dist.leave(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_ranks_hold_their_shards_and_one_parameter_at_a_time(tmp_path, engine):
    ended = launch(WORLD, ["-c", PROGRAM, engine], tmp_path)
    assert ended.codes == [0] * WORLD, ended.text
    for output in ended.outputs:
        found = json.loads(output.split("RESULT ")[1].splitlines()[0])
        assert found["owned"] == pytest.approx(found["whole"] / WORLD, rel=1e-2)
        # of memory that is freed a part stays with the process; whoever builds first and cuts then grows by more than the whole
        assert 0.9 * found["owned"] < found["grown"] < 0.8 * found["whole"]


REFUSED_ON_RANK_1 = """
import os
from xar_scale.errors import ConfigError
from xar_scale.model import xar

def refuse(wanted, device):
    if os.environ["RANK"] == "1":
        raise ConfigError("this node has other kernels")
    return "torch"

xar.choose_library = refuse
from xar_scale.__main__ import command
command()
"""


def test_kernels_that_one_node_lacks_end_all_ranks_with_the_reason(tmp_path):
    cache_digits(tmp_path / "data", samples_per_shard=500)
    words = ["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), f"data.path={tmp_path / 'data'}"]
    ended = launch(WORLD, ["-c", REFUSED_ON_RANK_1, *words], tmp_path / "logs")
    assert ended.codes == [78] * WORLD, ended.text
    assert ended.text.count("xar-scale: this node has other kernels") == 1
