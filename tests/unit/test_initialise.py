"""Initial weights from another run: what is taken, how positions are converted to another grid, and what is reported."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, digits_config, golden_parameter
from tests.dist.states import assert_bitwise, state
from tests.unit.foreign_checkpoints import named_ours
from tests.unit.foreign_checkpoints import published as as_published
from tests.unit.tiny_run import Run
from xar_scale import cli
from xar_scale.checkpoint.initialise import SharedInitialisation, resize_positions
from xar_scale.checkpoint.interop import official_names
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import read_manifest
from xar_scale.config import ModelConfig
from xar_scale.errors import DataError
from xar_scale.evaluate.digits import cache_digits
from xar_scale.model.entities import EntityLayout, create_layout
from xar_scale.model.xar import create_model, initial_weights, meta_model

SMALL = ("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8")


def layout(entity: str, side: int, size: int | None = None) -> EntityLayout:
    return create_layout(dataclasses.replace(TINY, grid=(side, side), entity=entity, entity_size=size))


def initialised(path: Path, config: ModelConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A model's weights, and the report."""
    model = meta_model(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with SharedInitialisation(path, shapes, config) as given:
        for weight in initial_weights(model, 0, given.take):
            weight.place(torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, given.report


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint whose EMA weights differ from its weights."""
    run = Run(tmp_path / "before")
    run.train(3)
    return run.save()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A .pth of the tiny network, under published names."""
    shapes = {name: tuple(parameter.shape) for name, parameter in meta_model(TINY).named_parameters()}
    state = {ours: golden_parameter(theirs, shapes[ours]) for theirs, ours in official_names(TINY).items()}
    path = tmp_path_factory.mktemp("published") / "tiny.pth"
    torch.save(as_published(state, TINY), path)
    return path


def small(*more: str) -> ModelConfig:
    return digits_config(*SMALL, *more).model


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_ema_weights_of_another_run(saved):
    weights, report = initialised(saved, small())
    assert_same(weights, load_weights(read_manifest(saved), "ema"))
    assert len(report) == 1 and report[0].startswith(f"initialised from the EMA weights of {saved} (")
    assert report[0].endswith(f"{len(weights)} of {len(weights)} parameters, 24,884 of 24,884 elements")


def test_published_weights(published):
    weights, report = initialised(published, TINY)
    assert_same(weights, named_ours(torch.load(published)))
    assert len(report) == 1 and f"the weights of {published} (.pth)" in report[0]


def test_a_folder_of_safetensors(saved, tmp_path):
    from safetensors.torch import save_file

    averages = load_weights(read_manifest(saved), "ema")
    (tmp_path / "folder").mkdir()
    save_file(averages, tmp_path / "folder" / "model.safetensors")
    assert_same(initialised(tmp_path / "folder", small())[0], averages)


def test_what_does_not_match_is_newly_initialised_and_listed(saved):
    weights, report = initialised(saved, small("model.classes=7", "model.depth_encoder=3"))
    averages = load_weights(read_manifest(saved), "ema")
    drawn = create_model("nano", **dataclasses.asdict(small("model.classes=7", "model.depth_encoder=3"))).state_dict()
    for name in ("class_embed.weight", "encoder.2.attn.qkv.weight"):
        assert torch.equal(weights[name], drawn[name])
    assert torch.equal(weights["encoder.1.ada.weight"], averages["encoder.1.ada.weight"])
    assert "  newly initialised: class_embed.weight: (11, 16) in the source, (8, 16) here" in report
    assert "  newly initialised: encoder.2.attn.qkv.weight: not in the source" in report


def test_unused_parameters_of_the_source_are_counted(saved):
    _, report = initialised(saved, small("model.depth_encoder=1"))
    assert report[-1] == "  not used: 12 parameters of the source, first encoder.1.ada.bias"


@pytest.mark.parametrize("entity", ["patch", "subsample", "image", "scale"])
def test_positions_are_reordered_with_their_tokens(saved, entity):
    weights, report = initialised(saved, small(f"model.entity={entity}"))
    before, after = layout("cell", 4, 2), layout(entity, 4)
    averages = load_weights(read_manifest(saved), "ema")
    done = "resized" if entity == "scale" else "reordered"
    for name in ("encoder_pos", "decoder_pos"):
        assert torch.equal(after.from_entities(weights[name][None]), before.from_entities(averages[name][None]))
        assert f"  {done}: {name}: 4 entities on 4x4 in the source, {after.entities} entities on 4x4 here" in report
    assert torch.equal(weights["in_proj.weight"], averages["in_proj.weight"])


def ramp(layout: EntityLayout) -> torch.Tensor:
    """Positions (T, 2) that hold the centre of their token on the unit square."""
    rows, columns = layout.grid
    return (layout.coordinates + 0.5) / torch.tensor([rows, columns])


@pytest.mark.parametrize("kinds", [("cell", "cell"), ("cell", "subsample"), ("subsample", "patch"), ("patch", "cell")])
@pytest.mark.parametrize("sides", [(8, 16), (16, 8)])
def test_on_another_grid_positions_stay_where_they_were_on_the_image(kinds, sides):
    before, after = (layout(kind, side) for kind, side in zip(kinds, sides, strict=True))
    wanted = ramp(after)
    found = resize_positions(ramp(before), before, after)
    inside = ((wanted > 0.25) & (wanted < 0.75)).all(dim=1)
    torch.testing.assert_close(found[inside], wanted[inside], rtol=0, atol=1e-6)
    assert ((found - wanted).abs() < 0.05).all()  # at the edges


def test_pyramid_levels_that_both_layouts_have_keep_their_positions():
    before, after = layout("scale", 8), layout("scale", 16)
    positions = torch.randn(before.tokens, 3)
    found = resize_positions(positions, before, after)
    assert torch.equal(found[: before.tokens], positions)
    assert found.shape == (after.tokens, 3)


def test_published_positions_are_taken_as_cells(published):
    config = dataclasses.replace(TINY, grid=(32, 32), entity="subsample")
    weights, report = initialised(published, config)
    theirs = named_ours(torch.load(published))["encoder_pos"]
    expected = resize_positions(theirs, create_layout(TINY), create_layout(config))
    assert torch.equal(weights["encoder_pos"], expected)
    assert "  resized: encoder_pos: 4 entities on 16x16 in the source, 4 entities on 32x32 here" in report


def test_a_source_of_another_model_is_an_error(saved):
    message = r"matches 4 of this model's 51,732 elements: it is another model \(.*: \(.*16\) in the source, \(.*24\) here\)"
    with pytest.raises(DataError, match=message):
        initialised(saved, small("model.width=24"))


def test_init_from_starts_a_run_and_is_ignored_when_it_resumes(tmp_path, saved, capsys):
    cache_digits(tmp_path / "data", samples_per_shard=500)

    def train(*more: str) -> int:
        settings = [f"data.path={tmp_path / 'data'}", "data.workers=0", *SMALL, "train.checkpoint_every=1"]
        settings += ["optim.warmup_steps=0", "optim.lr=1e-30", "optim.ema_decay=0"]
        return cli.main(["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), *settings, *more])

    assert train("--init-from", str(saved), "train.steps=1") == 0
    assert f"initialised from the EMA weights of {saved}" in capsys.readouterr().out
    averages = load_weights(read_manifest(saved), "ema")
    first = state(tmp_path / "run", 1)
    assert_same({name: first[f"model/{name}"] for name in averages}, averages)
    assert f"init_from: {saved}" in (tmp_path / "run" / "config.yaml").read_text()
    assert train("--init-from", str(tmp_path / "gone"), "train.steps=2") == 0  # resumes
    assert "resumed from" in capsys.readouterr().out
    assert_bitwise(
        {key: value for key, value in state(tmp_path / "run", 2).items() if key.startswith("model")},
        {key: value for key, value in first.items() if key.startswith("model")},
    )


@pytest.mark.parametrize(
    ("damage", "code", "complaint"),
    [
        (lambda path: next(path.glob("*.safetensors")).write_bytes(b"x"), 65, "00001.safetensors"),
        (lambda path: (path / "manifest.json").write_text("{"), 65, "manifest.json is torn or changed"),
        (lambda path: path.rename(path.with_name("elsewhere")), 64, "no checkpoint at"),
    ],
)
def test_an_unreadable_source_is_refused_before_anything_is_written(tmp_path, saved, capsys, damage, code, complaint):
    cache_digits(tmp_path / "data", samples_per_shard=500)
    damage(saved)
    settings = [f"data.path={tmp_path / 'data'}", "data.workers=0", *SMALL]
    run = ["--run-dir", str(tmp_path / "run"), "--init-from", str(saved)]
    assert cli.main(["train", "--recipe", "digits", *run, *settings]) == code
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
