"""DeepSpeed's universal checkpoints: a folder per parameter, with one file each for its weight and moments."""

from pathlib import Path
from typing import Any

import torch

from xar_scale.checkpoint.chunks import ChunkReader, full_spans
from xar_scale.checkpoint.interop.pickled import Pickled, read_pickled
from xar_scale.checkpoint.interop.source import Source
from xar_scale.checkpoint.interop.zero import optimizer_steps, read_common, settings
from xar_scale.errors import DataError, is_damage

# kind -> parent folder, file. DeepSpeed has no EMA: ours is in a folder that it ignores
LAYOUT = {
    "model": ("zero", "fp32.pt"),
    "ema": ("ema", "fp32.pt"),
    "exp_avg": ("zero", "exp_avg.pt"),
    "exp_avg_sq": ("zero", "exp_avg_sq.pt"),
}
OPTIMIZER = "zero/optimizer_state.pt"


def is_universal(folder: Path) -> bool:
    return (folder / OPTIMIZER).is_file()


def open_universal(folder: Path, trust_pickle: bool) -> Source:
    """Raises DataError naming a file that is missing or not as DeepSpeed 0.19.8 writes it."""
    common, optimizer = read_common(folder, trust_pickle), read_pickled(folder / OPTIMIZER, trust_pickle)
    try:
        return _open(folder, common, optimizer, trust_pickle)
    except Exception as error:
        if not is_damage(error):
            raise
        reason = str(error).partition("\n")[0]
        raise DataError(f"{folder} is not laid out as DeepSpeed 0.19.8's universal checkpoints ({reason})") from None


def _open(folder: Path, common: dict[str, Any], optimizer: Pickled, trust_pickle: bool) -> Source:
    known = {name: torch.Size(shape) for group in common.get("param_shapes") or () for name, shape in group.items()}
    chunks, shapes = {}, {}
    for kind, (parent, name) in LAYOUT.items():
        for path in sorted((folder / parent).glob(f"*/{name}")):
            file = read_pickled(path, trust_pickle)
            tensor = file.value.get("param") if isinstance(file.value, dict) else file.value  # ZeRO-3's are bare, and flat
            if not isinstance(tensor, torch.Tensor):
                raise DataError(f"{path} holds a {type(tensor).__name__}, not a tensor")
            key = f"{kind}/{path.parent.name}"
            chunks[key], shapes[key] = [file.chunk(tensor)], known.get(path.parent.name, tensor.shape)
    kinds = {"model", *(key.partition("/")[0] for key in shapes)}
    lacking = {f"{kind}/{name}" for kind in kinds for name in known} - set(shapes)
    if lacking or not shapes:
        raise DataError(f"{folder} lacks {len(lacking)} tensors, first {min(lacking, default='of all')}")
    reader = ChunkReader(chunks, full_spans(shapes))
    return Source(
        folder,
        "DeepSpeed universal",
        shapes,
        reader,
        reader.files,
        step=int(common["global_steps"]),
        updates=_steps(folder, optimizer, trust_pickle),
        groups=settings(optimizer.value["param_groups"]),
    )


def _steps(folder: Path, optimizer: Pickled, trust_pickle: bool) -> int:
    """Return the steps that the moments have seen: stages 1 and 2 have a file per parameter, stage 3 the optimizer's state."""
    for path in sorted((folder / "zero").glob("*/step.pt")):
        file = read_pickled(path, trust_pickle)
        return int(file.number(file.value))
    return optimizer_steps(optimizer, optimizer.value.get("optimizer_state_dict", {}))
