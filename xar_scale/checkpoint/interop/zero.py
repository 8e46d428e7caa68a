"""DeepSpeed's own checkpoints: ZeRO-1, 2 and 3, from any number of ranks, in the layout of 0.19.8."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xar_scale.checkpoint.chunks import Chunk, ChunkReader, full_spans
from xar_scale.checkpoint.interop.pickled import Pickled, read_pickled
from xar_scale.checkpoint.interop.source import Source
from xar_scale.errors import DataError, is_damage

OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def is_zero(folder: Path) -> bool:
    return any(OPTIMIZER.fullmatch(path.name) for path in folder.iterdir())


def open_zero(folder: Path, trust_pickle: bool) -> Source:
    """Raises DataError naming what is missing, or what xAR does not use."""
    ranks = [read_pickled(path, trust_pickle) for path in _rank_files(folder)]
    common = read_common(folder, trust_pickle)
    try:
        return _open(folder, ranks, common)
    except Exception as error:
        if not is_damage(error):
            raise
        missing = f"{type(error).__name__} {error}".partition("\n")[0]
        raise DataError(f"{folder} is not laid out as DeepSpeed 0.19.8 writes ZeRO checkpoints ({missing})") from None


def read_common(folder: Path, trust_pickle: bool) -> dict[str, Any]:
    """Return what rank 0 saved of the model. Raises DataError if there is no such file."""
    for name in MODEL:
        if (folder / name).is_file():
            common = read_pickled(folder / name, trust_pickle).value
            if isinstance(common, dict):
                return common
            raise DataError(f"{folder / name} holds a {type(common).__name__}, not DeepSpeed's model states")
    raise DataError(f"{folder} has neither {MODEL[0]} nor {MODEL[1]}")


def _rank_files(folder: Path) -> list[Path]:
    """The file of each rank, in rank order."""
    found = {}
    for path in folder.iterdir():
        if match := OPTIMIZER.fullmatch(path.name):
            if int(match[2]):
                raise DataError(f"{path}: model-parallel checkpoints are not supported")
            found[int(match[1])] = path
    if len(found) <= max(found):
        missing = next(rank for rank in range(len(found)) if rank not in found)
        raise DataError(f"{folder} lacks zero_pp_rank_{missing}_mp_rank_00_optim_states.pt")
    return [found[rank] for rank in sorted(found)]


def _open(folder: Path, ranks: list[Pickled], common: dict[str, Any]) -> Source:
    states = [rank.value["optimizer_state_dict"] for rank in ranks]
    stage = int(states[0].get("zero_stage", 1))  # the bf16 optimizer does not record it, and is stage 1
    inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    updates = optimizer_steps(ranks[0], states[0][inner])
    for rank, state in zip(ranks, states, strict=True):
        count = state["partition_count"]
        if (world := max(count) if isinstance(count, list) else count) != len(ranks):
            raise DataError(f"{rank.path} was written by one of {world} ranks, but there are files of {len(ranks)}")
        if (steps := optimizer_steps(rank, state[inner])) != updates:
            raise DataError(
                f"{rank.path} is at step {steps}, {ranks[0].path.name} at {updates}: they belong to different checkpoints"
            )
    for key in ("frozen_param_shapes", "shared_params"):
        if common.get(key):
            raise DataError(f"{folder}: {key} are not supported; xAR has none")
    fragments = _stage3(ranks, common["param_shapes"]) if stage == 3 else _stage12(ranks)
    parameters = {name: torch.Size(shape) for group in common["param_shapes"] for name, shape in group.items()}
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for rank, group, name, start, first, length in fragments:
        state = rank.value["optimizer_state_dict"]
        flat = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"][group]
        tensors = {"model": flat}
        moments = state[inner]["state"].get(group, {})  # none before the first step
        tensors |= {kind: moments[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in moments}
        for kind, tensor in tensors.items():
            chunks[f"{kind}/{name}"].append(rank.chunk(tensor, start, first, length))
    shapes = {f"{kind}/{name}": shape for kind in _kinds(chunks) for name, shape in parameters.items()}
    if lacking := set(shapes) - set(chunks):
        raise DataError(f"{folder} lacks {len(lacking)} tensors, first {min(lacking)}")
    reader = ChunkReader(chunks, full_spans(shapes))
    return Source(
        folder,
        f"DeepSpeed ZeRO-{stage}, {len(ranks)} ranks",
        shapes,
        reader,
        reader.files,
        step=int(common["global_steps"]),
        updates=updates,
        groups=settings(states[0][inner]["param_groups"]),
    )


def optimizer_steps(file: Pickled, optimizer: dict[str, Any]) -> int:
    """Return the steps that an optimizer's moments have seen; it counts them per tensor or per group."""
    entries = [*optimizer.get("state", {}).values(), *optimizer.get("param_groups", [])]
    return int(max((file.number(entry["step"]) for entry in entries if "step" in entry), default=0))


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings of the optimizer's parameter groups, without the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _kinds(chunks: dict[str, list[Chunk]]) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in chunks))


class _Fragment(NamedTuple):
    """A rank's part of a parameter."""

    file: Pickled
    group: int
    name: str
    start: int  # in the parameter
    first: int  # in the rank's partition of the group
    length: int


def _stage12(ranks: list[Pickled]) -> Iterator[_Fragment]:
    """A group's parameters are concatenated and split into equal partitions; each rank records which part of each it has."""
    seen: dict[str, int] = defaultdict(int)
    for rank in ranks:
        for group, addresses in enumerate(rank.value["optimizer_state_dict"]["param_slice_mappings"]):
            for name, address in addresses.items():
                yield _Fragment(rank, group, name, seen[name], address.start, address.numel)
                seen[name] += address.numel


def _stage3(ranks: list[Pickled], groups: list[dict[str, Any]]) -> Iterator[_Fragment]:
    """Every parameter is split into equal chunks, the last padded; a rank's chunks of a sub-group are concatenated."""
    for at, rank in enumerate(ranks):
        for group, shapes in enumerate(groups):
            first = 0
            for name, shape in shapes.items():
                total = torch.Size(shape).numel()
                chunk = -(-total // len(ranks))
                start = min(at * chunk, total)
                yield _Fragment(rank, group, name, start, first, min(chunk, total - start))
                first += chunk
