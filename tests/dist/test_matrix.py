"""Any to any: what every engine saves on any number of ranks, every engine loads on any number, exactly, and goes on from it."""

import pytest
import torch

from tests.dist.jobs import Runs, job_name, write_ds_configs

pytestmark = pytest.mark.long  # whichever test comes first starts all the launches
# odd shapes: parameters of 1, 10 and 33 elements, which neither 2 nor 3 ranks divide; decay that a lost group would show
ODD = ["model.width=20", "model.heads=1", "model.mlp_ratio=1.65", "model.channels=1", "optim.weight_decay=3.0"]
KINDS = ["zero1", "zero2", "zero3", "fsdp2", "ddp"]
PLACES = [(1, "single"), *((world, kind) for world in (1, 2, 3) for kind in KINDS), (2, "fsdp2/1")]  # the last: both hold all
STEPS = 2


def name(world: int, kind: str) -> str:
    return f"{kind}-on-{world}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    write_ds_configs(folder)
    return folder


@pytest.fixture(scope="module")
def saved(folder):
    """Where each engine has left a checkpoint on each number of ranks, by its name."""
    paths = {}
    for world in (1, 2, 3):
        runs = Runs(folder, world)
        for kind in [kind for at, kind in PLACES if at == world]:
            runs.add(job_name(kind), kind, [["taken", STEPS, "first"], ["saved"]], *ODD)
            paths[name(world, job_name(kind))] = runs.checkpoint(job_name(kind), STEPS)
        runs.run()
    return paths


@pytest.fixture(scope="module")
def loaded(folder, saved):
    """What came of loading each of them in each engine on each number of ranks, and of a step from there."""
    came = {}
    for world in (1, 2, 3):
        runs = Runs(folder, world)
        for kind in [kind for at, kind in PLACES if at == world]:
            actions = []
            for source, path in saved.items():
                actions += [["loaded", path], ["compared", path, source], ["taken", 1, f"{source}, and a step"]]
            runs.add(f"{job_name(kind)}-loads", kind, actions, *ODD)
        for job, of_job in runs.run().items():
            came[name(world, job.removesuffix("-loads"))] = of_job
    return came


def pairs(loaded: dict, saved: dict) -> list[tuple[str, list[dict]]]:
    return [(f"{source} -> {target}", of_target[source]) for target, of_target in loaded.items() for source in saved]


def test_weights_moments_averages_steps_and_settings_are_those_that_were_saved(saved, loaded):
    seen = pairs(loaded, saved)
    assert len(seen) == len(PLACES) ** 2
    for pair, ranks in seen:
        for rank in ranks:
            assert rank["differ"] == [], pair
            if rank["elements"]:
                assert rank["steps"] == [STEPS], pair
        settings = {tuple(group) for rank in ranks for group in rank["settings"]}
        assert settings == {(0.0, 0.9, 0.96, 1e-8), (3.0, 0.9, 0.96, 1e-8)}, pair


def test_nothing_is_owned_twice_or_by_nobody_and_everything_is_read_once(saved, loaded):
    owned = {pair: sum(rank["elements"] for rank in ranks) for pair, ranks in pairs(loaded, saved)}
    (whole,) = {elements for pair, elements in owned.items() if not pair.endswith("fsdp2-of-1-on-2")}
    assert whole > 0 and set(owned.values()) == {whole, 2 * whole}
    for pair, ranks in pairs(loaded, saved):
        assert sum(rank["bytes_read"] for rank in ranks) == 4 * whole, pair
        if owned[pair] == whole:
            assert [rank["bytes_read"] for rank in ranks] == [4 * rank["elements"] for rank in ranks], pair


def test_the_step_after_is_the_same_whatever_came_from_where(saved, loaded):
    """Of one source in two engines only rounding differs; between sources, what their own two steps made of it too."""
    for source in saved:
        reference = loaded["single-on-1"][f"{source}, and a step"]
        for of_target in loaded.values():
            for number in ("loss", "grad_norm"):
                values = torch.tensor([of_target[f"{source}, and a step"][number], reference[number]])
                torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
