"""FSDP2, whose ranks share one copy of the model or have one each, and DDP on two ranks: steps and state are those of one."""

from tests.dist.jobs import Job, Runs, job_name, overrides
from tests.dist.states import assert_near, assert_same_curve, state
from xar_scale.checkpoint.manifest import read_manifest

STEPS = 3


def test_two_ranks_take_the_steps_of_one(tmp_path):
    alone = Job(tmp_path / "single", overrides(tmp_path, "single", 1))
    alone.saved()
    alone.taken(STEPS, "steps")
    alone.saved()
    assert max(alone.came["steps"]["grad_norm"]) > 0.5  # what is clipped
    runs, kinds = Runs(tmp_path, 2), ("fsdp2", "fsdp2/1", "ddp")
    for kind in kinds:
        loaded = ["loaded", str(tmp_path / "single" / "checkpoints" / "step-00000000")]
        compared = ["compared", loaded[1], "read"]
        runs.add(job_name(kind), kind, [["taken", STEPS, "steps"], ["saved"], loaded, compared, ["taken", STEPS, "again"]])
    came = runs.run()
    everything = read_manifest(tmp_path / "single" / "checkpoints" / "step-00000000").manifest.bytes
    for name in map(job_name, kinds):
        # also where both ranks own everything
        assert [rank["differ"] for rank in came[name]["read"]] == [[], []]
        assert everything * 0.9 < sum(rank["bytes_read"] for rank in came[name]["read"]) < everything
        assert max(rank["bytes_read"] for rank in came[name]["read"]) < 0.6 * everything
        for steps in ("steps", "again"):
            assert_same_curve(came[name][steps], alone.came["steps"])
        assert_near(state(runs.at / name, STEPS), state(tmp_path / "single", STEPS))
