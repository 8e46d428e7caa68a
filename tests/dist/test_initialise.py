"""Several ranks start from other weights: each value is read by one rank, and all have it."""

import json

from tests.conftest import digits_config
from tests.processes import launch
from tests.unit.tiny_run import Run
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import read_manifest

SMALL = ["model.width=16", "model.heads=2", "train.global_batch=24", "train.engine=fsdp2"]
PROGRAM = """
import json, os, sys
import torch
from tests.conftest import digits_config
from xar_scale import dist
from xar_scale.checkpoint import initialise
from xar_scale.checkpoint.initialise import Initialisation
from xar_scale.model.xar import meta_model
from xar_scale.startup import first_weights

config = digits_config(*json.loads(sys.argv[1]))
dist.init(torch.device("cpu"))
read, value = [], Initialisation.value
Initialisation.value = lambda found, name: read.append(name) or value(found, name)
opened, open_source = [], initialise.open_source
initialise.open_source = lambda path: opened.append(str(path)) or open_source(path)
with first_weights(meta_model(config.model), config, None) as weights:
    sums = [weight.value.double().sum().item() for weight in weights]
print(json.dumps({"opened": opened, "read": read, "sums": sums, "kernels": os.environ["TRITON_CACHE_DIR"]}))
"""


def test_initial_weights_are_read_once_by_all_ranks_together(tmp_path):
    run = Run(tmp_path / "run", config=digits_config(*SMALL[:2], "train.engine=single"))
    run.train(2)
    checkpoint = read_manifest(run.save())
    words = ["-c", PROGRAM, json.dumps([*SMALL, f"train.init_from={tmp_path / 'run'}"])]
    ended = launch(3, words, tmp_path / "logs", TMPDIR=str(tmp_path))
    assert ended.codes == [0, 0, 0], ended.text
    ranks = [json.loads(output.splitlines()[-1]) for output in ended.outputs]
    weights = load_weights(checkpoint, "ema")
    # the checkpoint that rank 0 chose: a run that is training writes a newer one at any moment
    assert [rank["opened"] for rank in ranks] == [[str(tmp_path / "run")], *[[str(checkpoint.path)]] * 2]
    assert sorted(name for rank in ranks for name in rank["read"]) == sorted(weights)
    assert all(len(rank["read"]) >= len(weights) // 3 for rank in ranks)
    assert all(rank["sums"] == [value.double().sum().item() for value in weights.values()] for rank in ranks)
    # on this node, not in the home directory
    assert all(rank["kernels"].startswith(f"{tmp_path}/xar_scale-") for rank in ranks)
