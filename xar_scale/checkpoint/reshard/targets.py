"""The layout of each output format: which files, and what lies where in them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xar_scale.checkpoint.files import FLOAT32, SUFFIX, Fingerprint, file_name, header_of, safetensors_header
from xar_scale.checkpoint.interop.official import their_names, their_shape
from xar_scale.checkpoint.interop.open import SUMS
from xar_scale.checkpoint.interop.source import Source
from xar_scale.checkpoint.interop.universal import LAYOUT, OPTIMIZER
from xar_scale.checkpoint.interop.weights import INDEX, PTH
from xar_scale.checkpoint.interop.zero import MODEL
from xar_scale.checkpoint.manifest import MANIFEST, Manifest, bare_manifest
from xar_scale.checkpoint.reshard.parts import Fixed, Output, Plan, Slice
from xar_scale.checkpoint.reshard.torchzip import Placeholder, small_torch_file, torch_file
from xar_scale.errors import DataError, UsageError
from xar_scale.guard import GuardState

DEEPSPEED = "0.19.8"  # the version whose universal layout is written
SAFETENSORS_BYTES = 5 * 10**9  # per file, as Hugging Face splits them


def plan(source: Source, target: str, weights: str | None = None, files: int = 8) -> Plan:
    """Plan a conversion. ``target``: of TARGETS. ``weights``: model or ema, for safetensors and pth. ``files``: for xar-scale.

    Raises UsageError if the source lacks what the target needs.
    """
    if weights is not None:
        _need(source, target, weights)
    return TARGETS[target](source, weights, files)


def _need(source: Source, target: str, *kinds: str) -> None:
    if missing := [kind for kind in kinds if kind not in source.kinds]:
        raise UsageError(f"{source.path} holds {', '.join(source.kinds)}; --to {target} needs {missing[0]}")


def _xar_scale(source: Source, _: str | None, files: int) -> Plan:
    """Split every vector into equal ranges, so that each of as many ranks reads one file and almost nothing of others."""
    names = source.names("model")
    for kind in source.kinds:
        if lacking := set(names) ^ set(source.names(kind)):
            raise DataError(f"{source.path}: {min(lacking)} is not in both model and {kind}")
    outputs = []
    for number in range(files):
        slices = [Slice(key, *(n * at // files for at in (number, number + 1))) for key, n in _sizes(source).items()]
        slices = [part for part in slices if part.size]
        header = header_of({part.key: (part.start, part.stop) for part in slices})
        outputs.append(Output(file_name(number), [Fixed(header), *slices]))

    def last(written: Mapping[str, Fingerprint]) -> tuple[str, bytes]:
        values = vars(source.manifest or _manifest(source, files))
        return MANIFEST, Manifest(**(values | {"files": dict(written)})).to_json()

    return Plan(outputs, last)


def _sizes(source: Source) -> dict[str, int]:
    return {key: shape.numel() for key, shape in source.shapes.items()}


def _manifest(source: Source, files: int) -> Manifest:
    step, updates = source.step or 0, source.updates or 0
    shapes = {name: list(shape) for name, shape in source.names("model").items()}
    return bare_manifest(step=step, guard=GuardState(skipped=step - updates), world=files, shapes=shapes, kinds=source.kinds)


def _safetensors(source: Source, weights: str | None, _: int) -> Plan:
    """Files of whole tensors and their index, as Hugging Face's libraries read them."""
    kind = weights or source.best_kind
    groups: list[dict[str, torch.Size]] = [{}]
    space = SAFETENSORS_BYTES
    for name, shape in source.names(kind).items():
        size = FLOAT32 * shape.numel()
        if size > space and groups[-1]:
            groups.append({})
            space = SAFETENSORS_BYTES
        groups[-1][name] = shape
        space -= size
    outputs, files = [], dict[str, str]()
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}{SUFFIX}"
        files |= dict.fromkeys(group, file)
        slices = [Slice(f"{kind}/{name}", 0, shape.numel()) for name, shape in group.items()]
        outputs.append(Output(file, [Fixed(safetensors_header(group, {})), *slices]))
    index = {"metadata": {"total_size": sum(part.size for output in outputs for part in output.parts[1:])}, "weight_map": files}
    outputs.append(Output(INDEX, [Fixed(json.dumps(index, indent=2).encode())]))
    return Plan(outputs, _sums)


def _pth(source: Source, weights: str | None, _: int) -> Plan:
    """The published layout: both sets of weights by name, or only the one asked for.

    The constants among the published entries (mask, rope.freqs*) are not written: the published network makes its own.
    """
    kinds = {"model": "model", "model_ema": "ema"}
    states = {key: _published(source, kind) for key, kind in kinds.items() if kind in source.kinds}
    return Plan([torch_file(PTH, states if weights is None else _published(source, weights))], _sums)


def _published(source: Source, kind: str) -> dict[str, Placeholder]:
    """A state dict, in the order of the published ones."""
    shapes = source.names(kind)
    return {
        theirs: Placeholder(f"{kind}/{ours}", their_shape(ours, shapes[ours])) for ours, theirs in their_names(shapes).items()
    }


def _universal(source: Source, weights: str | None, files: int) -> Plan:
    """A folder that DeepSpeed's ``engine.load_checkpoint`` loads, in every ZeRO stage, on any number of ranks."""
    _need(source, "universal", "model", "exp_avg", "exp_avg_sq")
    if unfit := [name for name in source.names("model") if "/" in name or name.startswith(".")]:
        raise DataError(f"{source.path}: parameter {unfit[0]!r} is not a valid folder name")
    step, updates = source.step or 0, source.updates or 0
    tag, names = f"global_step{step}", source.names("model")
    outputs = []
    for kind in source.kinds:
        parent, file = LAYOUT[kind]
        for name, shape in source.names(kind).items():
            value = {"cat_dim": 0, "param": Placeholder(f"{kind}/{name}", shape)}
            outputs.append(torch_file(f"{tag}/{parent}/{name}/{file}", value))
    outputs += [small_torch_file(f"{tag}/zero/{name}/step.pt", torch.tensor(float(updates))) for name in names]
    outputs.append(small_torch_file(f"{tag}/{OPTIMIZER}", _optimizer_state(source, updates, len(names))))
    common: dict[str, Any] = {
        "module": {},  # the weights are in zero/
        "param_shapes": [names],
        "lr_scheduler": None,
        "global_steps": step,
        "skipped_steps": step - updates,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": DEEPSPEED,
    }
    outputs += [small_torch_file(f"{tag}/{name}", common) for name in MODEL]  # for stages 1 and 2, and for 3
    outputs.append(Output("latest_universal", [Fixed(tag.encode())]))
    return Plan(outputs, _sums)


def _optimizer_state(source: Source, updates: int, parameters: int) -> dict[str, Any]:
    """For all stages. Under ZeRO-3, 0.19.8 gives every group the first one's settings: list only those that all groups share.

    In stages 1 and 2 it loads as many groups as are listed: if they are not known, list as many as there can be.
    """
    groups = source.groups or [{}] * parameters
    shared = {key: value for key, value in groups[0].items() if all(key in group and group[key] == value for group in groups)}
    return {
        "ds_version": DEEPSPEED,
        "param_groups": [{**group, "params": []} for group in groups],
        "optimizer_state_dict": {
            "state": {0: {"step": torch.tensor(float(updates))}},
            "param_groups": [{**shared, "params": []}],
        },
    }


def _sums(written: Mapping[str, Fingerprint]) -> tuple[str, bytes]:
    """The format that ``sha256sum -c`` reads."""
    return SUMS, "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(written.items())).encode()


TARGETS: dict[str, Callable[[Source, str | None, int], Plan]] = {
    "universal": _universal,
    "safetensors": _safetensors,
    "pth": _pth,
    "xar-scale": _xar_scale,
}
