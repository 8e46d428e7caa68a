"""Runs engines through jobs, one after another in one process group: starting DeepSpeed takes longer than a small job does.

``python tests/dist/jobs.py FOLDER`` on each rank reads FOLDER/jobs.json, a list of {"name", "overrides", "actions"}, and writes
what came of each to FOLDER/NAME.json. An action is a list of words, of what ``Job`` does.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import digits_config, random_batch
from tests.processes import launch
from tests.unit.tiny_run import Run
from xar_scale import dist
from xar_scale.checkpoint.load import load, load_weights, state_vectors
from xar_scale.checkpoint.manifest import KINDS, read_manifest
from xar_scale.config import micro_batches
from xar_scale.engines import Verdict

BATCH = 24
COMMON = ["model.width=32", "model.heads=2", "model.depth_encoder=1", "model.depth_decoder=1"]
COMMON += [f"train.global_batch={BATCH}", "optim.clip=0.5", "train.precision=fp32"]
ROOT = Path(__file__).parent.parent.parent
SMALL = {"reduce_bucket_size": 10000, "allgather_bucket_size": 10000, "stage3_prefetch_bucket_size": 10000}
SMALL3 = {
    "stage3_param_persistence_threshold": 100,
    "sub_group_size": 10000,
}  # of all kinds: some parameters, several sub-groups

STEPS = 20
HALF = STEPS // 2
BEFORE, AFTER = 5, 3  # steps in bf16, then in fp32
TRAINED = [["taken", HALF, "first"], ["saved"], ["taken", HALF, "second"], ["saved"]]
MICRO = {1: 12, 2: 6, 3: 4, 4: 6}  # samples a pass, by the number of ranks: 2, 2, 2 and 1 passes a step


def write_ds_configs(folder: Path) -> None:
    """Ours, with sizes at which a small model has several buckets and sub-groups, and is cut at all."""
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        settings = json.loads(path.read_text())
        settings["zero_optimization"] |= SMALL | (SMALL3 if settings["zero_optimization"]["stage"] == 3 else {})
        (folder / path.name).write_text(json.dumps(settings))


def run_jobs(world: int, folder: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """On ``world`` ranks. Returns what came of each, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ended = launch(world, ["-m", "tests.dist.jobs", str(folder)], folder / "logs")
    assert ended.codes == [0] * world, ended.text
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


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


class Job(Run):
    def __init__(self, folder: Path, overrides: list[str]) -> None:
        super().__init__(folder, keep_last=9, config=digits_config(*COMMON, *overrides))
        self.came: dict[str, Any] = {}

    def attempt(self) -> Verdict:
        passes = micro_batches(self.config.train, dist.world())[1]
        mine = random_batch(self.step, BATCH, self.config.model.channels).split(dist.world())[dist.rank()]
        return self.engine.attempt(self.step, mine.split(passes))

    def discarded(self) -> None:
        """A step that is attempted and not taken."""
        self.attempt()
        self.engine.discard()
        self.came["left"] = len(self.engine.gradients())

    def precision(self, mode: str, splits: int = 1) -> None:
        self.engine.set_precision(mode, splits)

    def taken(self, steps: int, name: str) -> None:
        """Steps, and what came of them: losses, norms, and of each rank a digest of its state."""
        verdicts = []
        for _ in range(steps):
            verdicts.append(self.attempt())
            self.engine.step(1e-3, verdicts[-1])
            self.step += 1
            self.ema.update(self.step)
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in self.state())).hexdigest()
        curve = {"loss": [verdict.loss for verdict in verdicts], "grad_norm": [verdict.grad_norm for verdict in verdicts]}
        self.came[name] = {**curve, "digests": dist.gather_objects(digest)}

    def saved(self) -> None:
        self.save()

    def native(self, folder: str) -> None:
        """What DeepSpeed itself saves."""
        self.engine.engine.save_checkpoint(folder, tag="native")

    def loaded(self, path: str) -> None:
        """A checkpoint of any job."""
        checkpoint = read_manifest(Path(path))
        self.bytes_read = load(checkpoint, self.engine, self.ema)
        self.step = checkpoint.manifest.step

    def compared(self, path: str, name: str) -> None:
        """What was loaded with the checkpoint that it is of: of each rank, vectors that differ, bytes, optimizer's settings."""
        checkpoint = read_manifest(Path(path))
        whole = {f"{kind}/{key}": tensor for kind in KINDS for key, tensor in load_weights(checkpoint, kind).items()}
        owned = [(key, start, tensor) for key, start, tensor in state_vectors(self.engine, self.ema)]
        optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)  # DeepSpeed wraps it
        of_rank = {
            "differ": [
                key
                for key, start, tensor in owned
                if not torch.equal(tensor, whole[key].view(-1)[start : start + tensor.numel()])
            ],
            "elements": sum(tensor.numel() for _, _, tensor in owned),
            "bytes_read": self.bytes_read,
            "steps": sorted({int(state["step"]) for state in optimizer.state.values()}),
            "settings": sorted(
                {(group["weight_decay"], *group["betas"], group["eps"]) for group in optimizer.param_groups}
            ),
        }
        self.came[name] = dist.gather_objects(of_rank)


def main(folder: Path) -> None:
    dist.init(torch.device("cpu"))
    for values in json.loads((folder / "jobs.json").read_text()):
        if groups := sys.modules.get("deepspeed.utils.groups"):  # it takes long to import, for those who need it
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # 0.19.8: made once a process, and taken up by engines without hpZ too
        job = Job(folder / values["name"], values["overrides"])
        for name, *words in values["actions"]:
            getattr(job, name)(*words)
        if dist.rank() == 0:
            (folder / f"{values['name']}.json").write_text(json.dumps(job.came))
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.leave(0)
