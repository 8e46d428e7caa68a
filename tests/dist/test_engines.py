"""Every engine, and every way of cutting that DeepSpeed, FSDP2 and DDP have: the same steps, the same state, whatever the precision
was before.
"""

from pathlib import Path

import pytest
import torch

from tests.dist.jobs import AFTER, BEFORE, STEPS, TRAINED, Runs, write_ds_configs
from tests.dist.states import assert_near, assert_same_curve, state

pytestmark = pytest.mark.long  # whichever test comes first starts all the launches
ALONE = ["zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "ddp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    write_ds_configs(folder)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    runs = Runs(folder, 2)
    runs.add_lowered(ALONE)
    lowered = runs.run()
    runs.add_fresh(ALONE)  # in processes that never saw bf16
    runs.add_trained([*ALONE, "fsdp2/1"])
    for kind in ("fsdp2", "ddp"):
        runs.add(f"{kind}-compiled", kind, TRAINED, "kernels.compile=true")
    return lowered | runs.run()


@pytest.fixture(scope="module")
def three(folder, two):
    runs = Runs(folder, 3)
    runs.add_trained(["zero1", "zero2", "zero3_offload", "ddp"])  # zero3 and fsdp2 are trained on 3 in test_training.py
    return runs.run()


@pytest.fixture(scope="module")
def four(folder):
    runs = Runs(folder, 4)
    for kind in ("fsdp2/2", "zero3/2"):  # FSDP2's all first: ZeRO-3 leaves a process with a Linear of its own, which rounds its own way
        runs.add_lowered([kind])
        runs.add_fresh([kind])
        runs.add_trained([kind])
    return runs.run()


@pytest.fixture(scope="module")
def one(folder, two, four):
    runs = Runs(folder, 1)
    runs.add_trained(["single", *ALONE])
    runs.add_lowered(["single"])
    runs.add_fresh(["single"])
    return runs.run()


def test_every_engine_takes_the_same_steps_on_any_number_of_ranks(one, two, three, four):
    reference = one["single"]
    assert reference["second"]["loss"][-1] < 0.9 * reference["first"]["loss"][0]  # they learn at all
    assert max(reference["second"]["grad_norm"]) > 0.5  # and are clipped
    for runs in (one, two, three, four):
        for came in runs.values():
            for half in came.keys() & {"first", "second"}:  # from a checkpoint of another engine there is no first
                assert_same_curve(came[half], reference[half])


def test_every_engine_comes_to_the_same_state(folder, one, two, three, four):
    reference = state(Runs(folder, 1).at / "single", STEPS)
    for world, runs in ((1, one), (2, two), (3, three), (4, four)):
        for name, came in runs.items():
            if "second" in came:
                assert_near(state(Runs(folder, world).at / name, STEPS), reference)


def lowered_pairs(runs: dict[str, dict], mode: str) -> list[tuple[dict, dict]]:
    names = [name.removesuffix("-lowered") for name in runs if name.endswith("-lowered")]
    return [(runs[f"{name}-lowered"], runs[f"{name}-{mode}"]) for name in names]


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_an_engine_whose_precision_changes_is_one_that_never_had_another(one, two, four, mode):
    """Bitwise: losses, norms, and each rank's weights, moments and averages."""
    for runs in (one, two, four):
        for changed, fresh in lowered_pairs(runs, mode):
            assert changed[mode] == fresh[mode]
            assert changed["fp32"]["loss"] != changed["bf16"]["loss"]


def test_the_same_is_computed_in_bf16_by_every_engine(one, two, four):
    """What is added block by block is float32: the first loss differs by the order of a sum over ranks."""
    (first, *_) = one["single-bf16"]["before"]["loss"]
    found = {name: came["before"]["loss"][0] for runs in (two, four) for name, came in runs.items() if name.endswith("-bf16")}
    assert len(found) == 8 and found == pytest.approx(dict.fromkeys(found, first), rel=1e-6)


def test_what_is_discarded_is_let_go_of(one, two, four):
    for runs in (one, two, four):
        for name, came in runs.items():
            if name.endswith("-lowered") and "offload" not in name:  # DeepSpeed keeps its buffers in the host's memory
                assert came["left"] == 0, name


def test_a_pass_in_two_parts_is_the_same_pass(one, two, four):
    for runs in (one, two, four):
        for changed, fresh in lowered_pairs(runs, "fp32"):
            assert_same_curve(changed["split"], fresh["fp32"])
            assert changed["split"]["loss"] != fresh["fp32"]["loss"] or changed["split"]["digests"] != fresh["fp32"]["digests"]
