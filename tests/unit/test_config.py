"""The configuration: where values come from, what is refused with which message, and that every field is used."""

import ast
import copy
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import yaml

import xar_scale
from tests.conftest import digits_config
from xar_scale.config import Config, KernelConfig, SampleConfig, TrainConfig, merge, micro_batches, override, read_yaml
from xar_scale.errors import ConfigError, UsageError
from xar_scale.presets import MODELS, RECIPES, model_values, recipe
from xar_scale.sampler import SAMPLERS, SCHEDULES, sample


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config(name):
    config = Config.from_dict(recipe(name))
    assert isinstance(config, Config)
    for section, values in RECIPES[name].items():
        for key, value in values.items():
            got = getattr(getattr(config, section), key)
            assert got == (tuple(value) if isinstance(value, list) else value), f"{section}.{key}"


def test_unknown_recipe_and_model_are_refused_with_the_known_names():
    with pytest.raises(UsageError, match="no recipe 'digit'; available: digits"):
        recipe("digit")
    with pytest.raises(UsageError, match="no model 'xar_z'; available: nano, xar_b"):
        model_values("xar_z")


def test_changing_a_recipe_leaves_the_table_unchanged():
    values = recipe("digits")
    values["seed"] = 1
    model_values("nano")["width"] = 1
    override(values, ["train.steps=7"])
    assert "seed" not in RECIPES["digits"] and RECIPES["digits"]["train"]["steps"] != 7
    assert MODELS["nano"]["width"] != 1


def test_overrides_reach_their_field_and_no_other():
    config = digits_config("optim.lr=0.5", "train.steps=77", "data.flip=true", "data.path=some/where", "model.grid=[8, 4]")
    base = digits_config()
    assert config.optim.lr == 0.5 and config.train.steps == 77 and config.data.flip is True
    assert config.data.path == "some/where" and config.model.grid == (8, 4)
    undone = {"optim": {"lr": base.optim.lr}, "train": {"steps": base.train.steps}, "model": {"grid": [4, 4]}}
    undone["data"] = {"flip": False, "path": base.data.path}
    assert Config.from_dict(merge(config.to_dict(), undone)) == base


def test_of_two_overrides_the_last_one_counts():
    assert digits_config("train.steps=60", "train.steps=70").train.steps == 70


@pytest.mark.parametrize("assignment", ["train.steps", "steps=3", "=3"])
def test_an_override_that_is_not_an_assignment_is_refused(assignment):
    with pytest.raises(UsageError, match="is not of the form section.key=value"):
        override({}, [assignment])


def test_an_override_whose_value_is_not_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"override 'model.grid=\[4' is not YAML: expected .* in line 1"):
        override({}, ["model.grid=[4"])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1.e-4", "0.0001", "+1e-4"])
def test_a_number_with_an_exponent_is_a_number(text, tmp_path):
    assert digits_config(f"optim.lr={text}").optim.lr == 1e-4
    path = tmp_path / "config.yaml"
    path.write_text(f"optim:\n  lr: {text}\n")
    assert read_yaml(path) == {"optim": {"lr": 1e-4}}


@pytest.mark.parametrize("text", ["1e", "e4", "1e-4x", "a1e4"])
def test_text_that_only_looks_like_a_number_stays_text(text):
    assert override({}, [f"data.path={text}"]) == {"data": {"path": text}}


def test_a_yaml_file_overrides_a_recipe_key_by_key(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lr: 3e-4}\ntrain:\n  steps: 123\n")
    config = Config.from_dict(merge(recipe("digits"), read_yaml(path)))
    expected = recipe("digits")
    assert (config.optim.lr, config.train.steps) == (3e-4, 123)
    assert config.optim.warmup_steps == expected["optim"]["warmup_steps"]
    assert config.train.global_batch == expected["train"]["global_batch"]


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("train:\n#  steps: 1\noptim: {lr: 1e-3}")
    assert read_yaml(path) == {"optim": {"lr": 1e-3}}


def test_config_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="no config file at .*absent.yaml"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match=f"no config file at {tmp_path}"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [1", " is not YAML"),
        ("model:\n\t- 1", " is not YAML"),
        ("- 1\n- 2", " holds a list"),
        ("text", " holds a str"),
        ("train: 5", ": train is 5, not a section of keys"),
        ("modle: {width: 64}", ": unknown key modle; known keys: model, data, optim"),
        ("modle: 5", ": unknown key modle; known keys: model, data, optim"),
        ("train: {steps: 1}\noptim: {rate: 1}", ": unknown key optim.rate; known keys: lr, final_lr"),
        ("optim: {5: 1}", ": unknown key optim.5; known keys: lr, final_lr"),
        ("train: {steps: 1}\nmodel: {}\ntrain: {}", " is not YAML: train appears twice in line 3"),
        ("train:\n  steps: 1\n  steps: 2", " is not YAML: steps appears twice in line 3"),
    ],
)
def test_a_config_file_that_is_not_sections_of_keys_is_refused_by_name(tmp_path, text, says):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"config.yaml{says}"):
        read_yaml(path)


def test_unknown_keys_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown key modle; known keys: model, data, optim, train, sample"):
        Config.from_dict(merge(recipe("digits"), {"modle": {"width": 64}}))
    with pytest.raises(ConfigError, match="unknown key optim.learning_rate; known keys: lr, final_lr"):
        digits_config("optim.learning_rate=1")


@pytest.mark.parametrize(
    "assignment",
    [
        "optim.lr=true",  # a bool is not a number
        "train.steps=true",
        "train.steps=100.0",  # a float is not an int
        "train.steps=1e3",
        "optim.lr='0.1'",  # text is not a number
        "train.steps='100'",
        "data.flip=1",  # a number is not a bool
        "data.path=3",  # nor text
        "model.grid=[4, 4, 4]",
        "model.width=",
        "train.engine=horovod",
        "optim.lr=-1",
        "optim.lr=.nan",
        "train.label_drop=1.5",
    ],
)
def test_a_value_of_a_wrong_type_or_range_is_refused_by_key(assignment):
    with pytest.raises(ConfigError, match=rf"^{assignment.partition('=')[0]}\b"):
        digits_config(assignment)


def test_an_int_serves_as_a_float():
    config = digits_config("optim.lr=1", "sample.guidance=2")
    assert config.optim.lr == 1.0 and config.sample.guidance == 2.0


def test_a_missing_key_or_section_is_named():
    values = copy.deepcopy(recipe("digits"))
    del values["optim"]["lr"]
    with pytest.raises(ConfigError, match="key optim.lr is missing"):
        Config.from_dict(values)
    values = recipe("digits")
    del values["sample"]
    with pytest.raises(ConfigError, match="key sample is missing"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.width=130"], "model.width 130 is not divisible by model.heads 4"),
        (["model.width=24"], "model.width 24 / model.heads 4 = 6 channels per head"),
        (["optim.warmup_steps=101", "train.steps=100"], "optim.warmup_steps 101 is more than train.steps 100"),
        (
            ["train.steps=100000000000000000"],
            r"train.steps 1\d+ x train.global_batch 128 is not below 2\^63: samples are numbered",
        ),
        (["train.global_batch=100", "data.lanes=8"], "train.global_batch 100 is not divisible by data.lanes 8"),
    ],
)
def test_impossible_combinations_are_refused_with_their_numbers(overrides, says):
    with pytest.raises(ConfigError, match=says):
        digits_config(*overrides)


def test_warmup_of_the_whole_run_is_allowed():
    assert digits_config("optim.warmup_steps=100", "train.steps=100").optim.warmup_steps == 100


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [
        (2048, None, 64, (32, 1)),
        (2048, 8, 64, (8, 4)),
        (2048, 32, 64, (32, 1)),
        (6, 1, 2, (1, 3)),
        (6, 2, 1, (2, 3)),
        (5, None, 1, (5, 1)),
    ],
)
def test_micro_batches_make_up_the_global_batch(batch, micro, world, expected):
    assert micro_batches(TrainConfig(steps=1, global_batch=batch, micro_batch=micro), world) == expected


def test_batches_that_do_not_divide_are_refused_with_the_numbers():
    with pytest.raises(ConfigError) as caught:
        micro_batches(TrainConfig(steps=1, global_batch=2048, micro_batch=24), 64)
    assert str(caught.value) == "global_batch 2048 is not divisible by micro_batch 24 x world 64 = 1536"
    with pytest.raises(ConfigError) as caught:
        micro_batches(TrainConfig(steps=1, global_batch=2048), 24)
    assert str(caught.value) == "global_batch 2048 is not divisible by world 24"


def test_a_config_survives_its_yaml(tmp_path):
    config = digits_config(
        "optim.lr=1e-5", "optim.eps=1e-12", "train.micro_batch=32", "data.path='a b: c'", "model.grid=[8, 4]"
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert Config.from_dict(read_yaml(path)) == config
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()  # other readers see the same values
    assert Config.from_dict(config.to_dict()) == config


def test_fp16_needs_the_guard_which_manages_its_loss_scale():
    digits_config("train.precision=fp16", "train.engine=single")
    with pytest.raises(ConfigError, match=r"train\.precision fp16 needs guard\.enabled"):
        digits_config("train.precision=fp16", "train.engine=single", "guard.enabled=false")


@pytest.mark.parametrize("key", ["data.path", "train.upload"])
def test_a_password_in_a_url_is_refused_and_not_shown(key):
    with pytest.raises(ConfigError, match=rf"{key} holds a user or a password") as refused:
        digits_config(f"{key}=https://user:secret@store/set")
    assert "secret" not in str(refused.value)
    digits_config(f"{key}=s3://bucket/a@b/set", "data.cache=/cache")


def test_fp16_is_refused_under_deepspeed_whose_loss_scale_does_not_work():
    with pytest.raises(ConfigError, match=r"train\.precision fp16 needs a loss scale, .* use train\.engine=ddp"):
        digits_config("train.precision=fp16", "train.engine=deepspeed")


def test_a_config_is_frozen():
    config = digits_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = None


SECTIONS = typing.get_type_hints(Config)


def _last_name(node: ast.AST) -> str | None:
    """``train`` of ``train`` and of ``self.config.train``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _aliases(tree: ast.AST) -> dict[str, set[str]]:
    """Sections by the names that a file has for them: their own, those of annotated arguments and fields, those assigned to."""
    found = {section: {section} for section in SECTIONS}
    classes = {kind.__name__: section for section, kind in SECTIONS.items()}
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.arg | ast.AnnAssign) and isinstance(node.annotation, ast.Name):
            target = ast.Name(node.arg) if isinstance(node, ast.arg) else node.target
            pairs = [(target, classes.get(node.annotation.id))]
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                parts = zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]
                pairs += [(each, _last_name(value)) for each, value in parts]
        for target, section in pairs:
            if section in SECTIONS and (name := _last_name(target)):
                found.setdefault(name, set()).add(section)
    return found


def _fields_read(source: str) -> set[tuple[str, str]]:
    """(section, field) of ``train.steps``, ``config.train.steps``, and what other names of sections a file has."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {(section, node.attr) for node in nodes for section in aliases.get(_last_name(node.value) or "", ())}


def test_every_field_is_read_somewhere():
    root = Path(xar_scale.__file__).parent
    files = [path for path in root.rglob("*.py") if path.name not in ("config.py", "presets.py")]
    read = set().union(*(_fields_read(path.read_text()) for path in files))
    fields = {(name, field.name) for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
    # the sample section goes to sample() as keywords
    as_keywords = {("sample", name) for name in inspect.signature(sample).parameters}
    assert {f"{section}.{name}" for section, name in fields - as_keywords - read} == set()


def test_the_sample_section_is_what_sampling_takes():
    takes, section = inspect.signature(sample).parameters, SampleConfig()
    shared = [field.name for field in dataclasses.fields(section) if field.name in takes]
    assert {name: getattr(section, name) for name in shared} == {name: takes[name].default for name in shared}
    types = typing.get_type_hints(SampleConfig)
    assert typing.get_args(types["sampler"]) == tuple(SAMPLERS)
    assert typing.get_args(types["guidance_schedule"]) == tuple(SCHEDULES)


def test_kernels_are_chosen_unless_named():
    assert digits_config().kernels == KernelConfig(attention="auto", library="auto")


@pytest.mark.parametrize("interval", [[0, 1], [0.25, 0.5], [0.5, 0.5]])
def test_an_interval_of_times_is_taken(interval):
    assert digits_config(f"sample.guidance_interval={interval}").sample.guidance_interval == tuple(interval)


@pytest.mark.parametrize("interval", [[-0.1, 1], [0, 1.1], [0.5, 0.2], [0.5]])
def test_an_invalid_interval_is_refused(interval):
    with pytest.raises(ConfigError, match="sample.guidance_interval"):
        digits_config(f"sample.guidance_interval={interval}")


@pytest.mark.parametrize(
    "assignment",
    [
        "optim.lr=.inf",
        "optim.lr=.nan",
        "optim.betas=[0.9,1.5]",
        "model.grid=[0,0]",
        "model.grid=[1000000,1000000]",
        "model.width=1000000000",
        "optim.lr=1e38",
        "optim.final_lr=1e38",
        "kernels.attention=fused",
        "kernels.library=cuda",
    ],
)
def test_impossible_numbers_are_refused(assignment):
    with pytest.raises(ConfigError, match=assignment.split("=")[0]):
        Config.from_dict(override(recipe("digits"), [assignment]))


def test_a_value_of_a_type_that_no_key_takes_is_refused():
    with pytest.raises(ConfigError, match=r"datetime.date\(2024, 1, 1\) is a date: no key takes one"):
        Config.from_dict(override(recipe("digits"), ["data.path=2024-01-01"]))


def test_text_that_looks_like_a_number_survives_yaml(tmp_path):
    config = Config.from_dict(override(recipe("digits"), ["data.path='1e4'"]))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.from_dict(read_yaml(tmp_path / "config.yaml")) == config


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_yaml(tmp_path / "config.yaml")


def test_a_recipe_is_a_copy():
    del recipe("digits")["optim"]["lr"]
    assert "lr" in recipe("digits")["optim"]


@pytest.mark.parametrize(("name", "steps", "guidance"), [("b", 40, 2.7), ("l", 50, 2.3), ("h", 50, 2.2)])
def test_the_imagenet_recipes_are_the_published_ones(name, steps, guidance):
    config = Config.from_dict(recipe(f"imagenet256_{name}"))
    epoch = 1_281_167 / config.train.global_batch
    assert config.train.global_batch == 2048
    assert config.train.steps == pytest.approx(800 * epoch, abs=1)
    assert config.optim.warmup_steps == pytest.approx(100 * epoch, abs=1)
    assert config.optim.decay_share * config.train.steps == pytest.approx(200 * epoch, abs=1)
    assert (config.optim.lr, config.optim.final_lr) == (5e-5 * 2048 / 256, 1e-5)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.clip) == ((0.9, 0.96), 0.02, 1.0)
    assert (config.optim.ema_decay, config.model.dropout, config.train.label_drop) == (0.9999, 0.1, 0.1)
    assert (config.sample.steps, config.sample.guidance) == (steps, guidance)
    assert config.model.entity == "cell" and config.model.grid == (16, 16) and config.data.flip


@pytest.mark.parametrize("value", ["2024-13-45", "1" * 5000])
def test_a_value_that_yaml_cannot_construct_is_refused(value):
    with pytest.raises(ConfigError, match="cannot be read"):
        override({}, [f"optim.lr={value}"])


def test_values_that_contain_themselves_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("data: &a {path: *a}")
    with pytest.raises(ConfigError):
        Config.from_dict(read_yaml(tmp_path / "config.yaml"))
