"""The config that DeepSpeed gets: the user's file merged with ours, or the reason for refusing it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import torch_autocast
from torch import nn

from tests.conftest import digits_config
from tests.unit.conftest import nano_model
from xar_scale.engines.deepspeed import deepspeed_settings
from xar_scale.errors import ConfigError, UsageError

OURS = sorted((Path(__file__).parent.parent.parent / "ds_configs").glob("*.json"))


def settings_of(tmp_path, values: dict, *overrides: str, world: int = 2) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    return deepspeed_settings(digits_config(f"train.ds_config={path}", *overrides), world)


ZERO3 = {"zero_optimization": {"stage": 3}}


def test_deepspeed_gets_our_batch_and_precision(tmp_path):
    settings = settings_of(
        tmp_path, {**ZERO3, "steps_per_print": 7}, "train.global_batch=128", "train.micro_batch=16", "train.precision=bf16"
    )
    assert settings["train_batch_size"] == 128
    assert settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["torch_autocast"].items() >= {"enabled": True, "dtype": "bfloat16"}.items()
    assert settings["gradient_clipping"] == 0  # Engine.step clips
    assert settings["steps_per_print"] == 7  # the file's own keys stay
    assert "torch_autocast" not in settings_of(tmp_path, ZERO3, "train.precision=fp32")


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"train_batch_size": 64}, ["train_batch_size 64", "train.global_batch 128"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu 3", "train.micro_batch 64"]),
        ({"gradient_accumulation_steps": 5}, ["gradient_accumulation_steps 5", "global_batch / micro_batch / world 1"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping 0.5", "optim.clip 1.0"]),
        ({"fp16": {"enabled": True}}, ["fp16 contradicts", "train.precision fp32"]),
        ({"bf16": {"enabled": True}}, ["bf16 contradicts", "train.precision fp32"]),
        ({"bf16": True}, ["bf16 contradicts", "train.precision fp32"]),
        ({"communication_data_type": "bf16"}, ["communication_data_type contradicts", "train.precision fp32"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types contradicts", "train.precision fp32"]),
        ({"elasticity": {}}, ["does not accept elasticity", "zero_optimization"]),
        ({"zero_optimization": 3}, ["zero_optimization.stage None"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "optim.*"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optim.warmup_steps"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage 0", "stages 1, 2 and 3"]),
    ],
)
def test_a_contradiction_names_both_sides(tmp_path, extra, names):
    with pytest.raises(ConfigError) as caught:
        settings_of(tmp_path, {**ZERO3, **extra})
    assert all(name in str(caught.value) for name in [str(tmp_path / "ds.json"), *names]), caught.value


def test_keys_that_agree_are_no_contradiction(tmp_path):
    settings_of(tmp_path, {**ZERO3, "train_batch_size": 128, "gradient_clipping": 1.0, "fp16": {"enabled": False}})


def test_selective_recomputation_turns_deepspeeds_linear_off(tmp_path):
    """It adds the bias twice to a saved product."""
    wanted = {"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}
    for mode in ("none", "full", "offload"):
        for values in (ZERO3, wanted):
            zero = settings_of(tmp_path, values, f"train.recompute={mode}")["zero_optimization"]
            assert zero == values["zero_optimization"]
    zero = settings_of(tmp_path, ZERO3, "train.recompute=selective")["zero_optimization"]
    assert zero == {"stage": 3, "memory_efficient_linear": False}
    with pytest.raises(ConfigError, match="memory_efficient_linear contradicts train.recompute selective"):
        settings_of(tmp_path, wanted, "train.recompute=selective")


@pytest.mark.parametrize(
    ("content", "complaint", "error"),
    [
        (None, "no DeepSpeed config at", UsageError),
        ("{", "is not JSON", ConfigError),
        ("[]", "holds a list", ConfigError),
        ('{"zero_optimization": {"stage": 3, "stage": 1}}', "stage appears twice", ConfigError),
    ],
)
def test_an_unreadable_deepspeed_config_is_named(tmp_path, content, complaint, error):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=complaint):
        deepspeed_settings(digits_config(f"train.ds_config={path}"), world=1)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_the_shipped_configs_are_accepted(path):
    given = json.loads(path.read_text())
    assert (
        deepspeed_settings(digits_config(f"train.ds_config={path}"), world=2)["zero_optimization"] == given["zero_optimization"]
    )


def test_there_is_a_config_for_each_stage_and_for_offload():
    zero = {path.stem: json.loads(path.read_text())["zero_optimization"] for path in OURS}
    assert {name: settings["stage"] for name, settings in zero.items()} == {
        "zero1": 1,
        "zero2": 2,
        "zero3": 3,
        "zero3_offload": 3,
    }
    offloaded = [name for name in zero if zero[name].keys() & {"offload_optimizer", "offload_param"}]
    assert offloaded == ["zero3_offload"]


def test_torchs_adamw_may_step_offloaded_state(tmp_path):
    assert settings_of(tmp_path, ZERO3)["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shard_ranks_is_hpz_and_in_stage_3_only(tmp_path, stage):
    values = {"zero_optimization": {"stage": stage}}
    for given in ("null", "4"):  # all ranks
        zero = settings_of(tmp_path, values, f"train.shard_ranks={given}", world=4)["zero_optimization"]
        assert zero == values["zero_optimization"]
    if stage == 3:
        zero = settings_of(tmp_path, values, "train.shard_ranks=2", world=4)["zero_optimization"]
        assert zero == {"stage": 3, "zero_hpz_partition_size": 2}
    else:
        with pytest.raises(ConfigError, match=rf"train.shard_ranks 2 .*stage {stage} does not"):
            settings_of(tmp_path, values, "train.shard_ranks=2", world=4)


@pytest.mark.parametrize(
    ("shard_ranks", "key", "value"),
    [
        ("null", "zero_hpz_partition_size", 2),
        (4, "zero_hpz_partition_size", 2),
        (2, "zero_hpz_partition_size", 4),
        ("null", "mics_shard_size", 2),
    ],
)
def test_another_hpz_size_in_the_file_is_a_contradiction(tmp_path, shard_ranks, key, value):
    values = {"zero_optimization": {"stage": 3, key: value}}
    with pytest.raises(ConfigError) as caught:
        settings_of(tmp_path, values, f"train.shard_ranks={shard_ranks}", world=4)
    ours = "None" if shard_ranks == "null" else shard_ranks
    assert f"zero_optimization.{key} {value} contradicts train.shard_ranks {ours}" in str(caught.value)


def test_the_same_hpz_size_in_the_file_is_accepted(tmp_path):
    values = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert settings_of(tmp_path, values, "train.shard_ranks=2", world=4)["zero_optimization"] == values["zero_optimization"]


def test_all_linear_layers_send_weights_and_gradients_in_16_bits(tmp_path, monkeypatch):
    """DeepSpeed's own function chooses the parameters, by the class of their layer."""
    monkeypatch.setattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED", False)  # both restored afterwards
    monkeypatch.setattr(torch_autocast, "TORCH_AUTOCAST_DTYPE", None)
    given = settings_of(tmp_path, ZERO3, "train.precision=bf16")["torch_autocast"]
    model = nano_model()
    engine = SimpleNamespace(module=model, zero_quantized_weights=lambda: False)
    torch_autocast.init_autocast_params(engine, torch.bfloat16, given["lower_precision_safe_modules"])
    linear = {weight for layer in model.modules() if isinstance(layer, nn.Linear) for weight in layer.parameters()}
    assert {weight for weight in model.parameters() if hasattr(weight, "comm_dtype")} == linear


def test_sizes_that_hpz_does_not_support_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="train.shard_ranks 1 .*ZeRO stage 2"):
        settings_of(tmp_path, ZERO3, "train.shard_ranks=1", world=4)
    with pytest.raises(ConfigError, match="world 4 is not divisible by train.shard_ranks 3"):
        settings_of(tmp_path, ZERO3, "train.shard_ranks=3", world=4)
    settings_of(tmp_path, ZERO3, "train.shard_ranks=1", world=1)


@pytest.mark.parametrize(
    ("stage", "key", "value", "complaint"),
    [
        (1, "offload_optimizer", {"device": "cpu"}, "offload_optimizer.device cpu with stage 1.*stage 3 only"),
        (2, "offload_optimizer", {"device": "cpu"}, "offload_optimizer.device cpu with stage 2.*stage 3 only"),
        (3, "offload_optimizer", {"device": "nvme"}, "offload_optimizer.device nvme.*only cpu offload is supported"),
        (3, "offload_param", {"device": "nvme"}, "offload_param.device nvme.*only cpu offload is supported"),
        (3, "offload_param", "cpu", "offload_param 'cpu' is not an object"),
        (3, "offload_optimizer", {"device": "cpu", "ratio": 0.5}, "ratio and super_offload are for DeepSpeed's own Adam"),
        (3, "offload_optimizer", {"device": "cpu", "super_offload": True}, "ratio and super_offload"),
    ],
)
def test_unsupported_offload_is_refused(tmp_path, stage, key, value, complaint):
    with pytest.raises(ConfigError, match=complaint):
        settings_of(tmp_path, {"zero_optimization": {"stage": stage, key: value}})


def test_supported_offload_is_passed_on(tmp_path):
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "pin_memory": False}}
    zero = settings_of(tmp_path, {"zero_optimization": {"stage": 3, **offload}})["zero_optimization"]
    assert zero == {"stage": 3, **offload}
    settings_of(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})
