"""Every engine, and every way of cutting that DeepSpeed, FSDP2 and DDP have: the same steps, the same state, whatever the precision
was before.
"""

from pathlib import Path

import pytest
import torch

from tests.dist.jobs import run_jobs, write_ds_configs
from tests.dist.states import assert_near, state

pytestmark = pytest.mark.long  # whichever test comes first starts all the launches
STEPS = 20
HALF = STEPS // 2
BEFORE, AFTER = 5, 3  # steps in bf16, then in fp32
ALONE = ["zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "ddp"]
TRAINED = [["taken", HALF, "first"], ["saved"], ["taken", HALF, "second"], ["saved"]]
MICRO = {1: 12, 2: 6, 3: 4, 4: 6}  # samples a pass, by the number of ranks: 2, 2, 2 and 1 passes a step


def overrides(folder: Path, kind: str, world: int, *more: str) -> list[str]:
    """Of a kind, "ENGINE or file of ds_configs[/shard_ranks]"."""
    name, _, ranks = kind.partition("/")
    own = [f"train.engine={name}"] if name in ("single", "ddp", "fsdp2") else [f"train.ds_config={folder / name}.json"]
    shared = [f"train.shard_ranks={ranks}"] if ranks else []
    return [*own, *shared, f"train.micro_batch={MICRO[world]}", *more]


def job_name(kind: str) -> str:
    return kind.replace("/", "-of-")


class Runs:
    """Jobs of one launch; a kind in bf16 and in fp32 are engines of their own."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world, self.jobs = folder, world, []
        self.at = folder / str(world)

    def add(self, name: str, kind: str, actions: list, *more: str) -> None:
        self.jobs.append({"name": name, "overrides": overrides(self.folder, kind, self.world, *more), "actions": actions})

    def add_trained(self, kinds: list[str]) -> None:
        for kind in kinds:
            self.add(job_name(kind), kind, TRAINED)

    def add_lowered(self, kinds: list[str]) -> None:
        """Engines that begin in bf16, go over to fp32 and back, with steps that are attempted and not taken; and undisturbed
        ones."""
        before, lowered, back = ["taken", BEFORE, "before"], ["taken", AFTER, "fp32"], ["taken", AFTER, "bf16"]
        for kind in kinds:
            name = job_name(kind)
            saved = ["loaded", self.checkpoint(f"{name}-lowered", BEFORE)]
            actions = [before, ["saved"], ["discarded"], ["precision", "fp32"], lowered]
            actions += [saved, ["precision", "bf16"], ["discarded"], back]
            actions += [saved, ["discarded"], ["precision", "fp32", 2], ["taken", AFTER, "split"]]
            self.add(f"{name}-lowered", kind, actions, "train.precision=bf16")
            self.add(f"{name}-bf16", kind, [before, back], "train.precision=bf16")

    def add_fresh(self, kinds: list[str]) -> None:
        for kind in kinds:
            saved = ["loaded", self.checkpoint(f"{job_name(kind)}-lowered", BEFORE)]
            self.add(f"{job_name(kind)}-fp32", kind, [saved, ["taken", AFTER, "fp32"]])

    def checkpoint(self, name: str, step: int) -> str:
        return str(self.at / name / "checkpoints" / f"step-{step:08d}")

    def run(self) -> dict[str, dict]:
        jobs, self.jobs = self.jobs, []
        return run_jobs(self.world, self.at, jobs)


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


def assert_same_curve(came: dict, expected: dict) -> None:
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(torch.tensor(came[name]), torch.tensor(expected[name]), rtol=1e-5, atol=0)


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
