"""What DeepSpeed itself saves, on 1, 2 and 3 ranks, is read to the bit; what is written for it, it loads and trains on."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from tests.dist.jobs import run_jobs, write_ds_configs
from tests.processes import launch
from tests.unit.foreign_checkpoints import assert_bitwise, reshard, values
from xar_scale.checkpoint.interop import open_source

pytestmark = pytest.mark.long
STAGES = (1, 2, 3)
STEPS = 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For a number of ranks: the folder of three runs, of a stage each, saved by DeepSpeed and by us at the same moment."""
    folder = tmp_path_factory.mktemp("reshard")
    write_ds_configs(folder)
    made = {}

    def on(world: int):
        if world not in made:
            made[world] = folder / str(world)
            jobs = [
                {
                    "name": f"zero{stage}",
                    "overrides": ["train.engine=deepspeed", f"train.ds_config={folder}/zero{stage}.json", "train.micro_batch=4"],
                    "actions": [["taken", STEPS, "steps"], ["saved"], ["native", str(made[world] / f"native{stage}")]],
                }
                for stage in STAGES
            ]
            run_jobs(world, made[world], jobs)
        return made[world]

    return on


def own(folder, stage: int):
    return folder / f"zero{stage}" / "checkpoints" / f"step-{STEPS:08d}"


def without_averages(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.startswith("ema/")}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_deepspeed_saves_is_what_we_save_at_the_same_moment(saved, world, stage):
    folder = saved(world)
    native = folder / f"native{stage}"
    assert_bitwise(values(native), without_averages(values(own(folder, stage))))
    with open_source(native) as source, open_source(own(folder, stage)) as ours:
        assert source.format == f"DeepSpeed ZeRO-{stage}, {world} ranks"
        assert (source.step, source.updates) == (ours.step, ours.updates) == (STEPS, STEPS)
        assert [group["weight_decay"] for group in source.groups] == [group["weight_decay"] for group in ours.groups]


def converted(native: Path, universal: Path, tag: str) -> Path:
    """By DeepSpeed's own program."""
    from deepspeed.checkpoint import ds_to_universal

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(native / tag), "output_folder": str(universal / tag)}
    ds_to_universal.main(argparse.Namespace(**folders, **settings, inject_missing_state=True))
    return universal


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_tools_read_the_same_of_it(saved, stage):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    native = saved(3) / f"native{stage}"
    state = values(native)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(native), tag="native")
    assert_bitwise({f"model/{name}": t for name, t in weights.items()}, {k: t for k, t in state.items() if k.startswith("model/")})
    universal = converted(native, native.with_name(f"universal{stage}"), "native")
    assert_bitwise(values(universal), state)
    with open_source(universal) as source:
        assert (source.step, source.updates, len(source.groups)) == (STEPS, STEPS, 2)


def test_stock_deepspeed_loads_what_is_made_for_it_and_trains_on_and_its_bf16_is_read(saved, tmp_path):
    folder = saved(3)
    assert reshard(folder / "native3", tmp_path / "of_zero3", "--to", "universal") == 0
    assert reshard(own(folder, 3), tmp_path / "of_ours", "--to", "universal") == 0
    jobs = [
        {"stage": 1, "groups": 2, "universal": "of_zero3"},
        {"stage": 2, "groups": 1, "universal": "of_ours"},
        {"stage": 3, "groups": 2, "universal": "of_ours"},
    ]
    for job in jobs:
        job |= {"universal": str(tmp_path / job["universal"]), "own": str(own(folder, 3))}
    (tmp_path / "stock.json").write_text(json.dumps(jobs))
    ended = launch(2, ["-m", "tests.dist.stock_deepspeed", str(tmp_path)], tmp_path / "logs")
    assert ended.codes == [0, 0], ended.text
    came = [json.loads((tmp_path / f"stock-{number}.json").read_text()) for number in range(len(jobs))]
    for entry in came:
        assert entry["differing"] == [] and entry["after_a_step"] == []
        assert entry["global_steps"] == STEPS and set(entry["steps"]) == {STEPS}
    assert came[0]["groups"] == [[1e-3, 0.02, [0.9, 0.96]], [1e-3, 0.0, [0.9, 0.96]]]
    # of ZeRO-3's groups it gives all the settings of one: what the groups do not share is left as the optimizer had it
    assert came[2]["groups"] == [[3e-3, 0.3, [0.9, 0.96]]] * 2
    for stage in STAGES:
        native = tmp_path / f"bf16-{stage}"
        assert_bitwise(values(native), values(converted(native, tmp_path / f"universal-{stage}", "saved")))
