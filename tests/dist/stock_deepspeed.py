"""A plain torch network under stock DeepSpeed, which knows nothing of this project but the names and shapes of parameters.

``python tests/dist/stock_deepspeed.py FOLDER`` on each rank reads FOLDER/stock.json, a list of {"stage", "groups", "universal",
"own"}: loads the universal checkpoint, compares it with ours of the same state, and takes a step. FOLDER/stock-N.json says what
came of number N. Then it trains and saves in bf16, in FOLDER/bf16-STAGE.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from tests.unit.foreign_checkpoints import values
from xar_scale.dist import leave


def network(shapes: dict[str, torch.Size]) -> nn.Module:
    """Parameters by name; its output is the sum of their squares, of which the gradient is twice the weights."""

    class Squares(nn.Module):
        def forward(self) -> Tensor:
            return torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()

    made = Squares()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module: nn.Module = made
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.full(shape, 9.0)))
    return made


def optimizer(parameters: list[nn.Parameter], groups: int) -> torch.optim.Optimizer:
    """Its settings are others than those of the checkpoint."""
    sorts = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]] if groups == 2 else [parameters]
    return torch.optim.AdamW([{"params": sort, "weight_decay": 0.3} for sort in sorts], lr=0.5)


def differing(model: nn.Module, expected: dict[str, Tensor]) -> list[str]:
    """Keys of what is not as expected, to the bit."""
    found = []
    for name, parameter in model.named_parameters():
        state = {"model": safe_get_full_fp32_param(parameter)}
        state |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")}
        found += [f"{kind}/{name}" for kind, t in state.items() if not torch.equal(t.flatten(), expected[f"{kind}/{name}"].flatten())]
    return found


def run(stage: int, groups: int, universal: str, own: str) -> dict[str, Any]:
    expected = values(Path(own))
    shapes = {key.partition("/")[2]: tensor.shape for key, tensor in expected.items() if key.startswith("model/")}
    model = network(shapes)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": True},
    }
    engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer(list(model.parameters()), groups), config=config)
    engine.load_checkpoint(universal)
    inner = zero.optimizer
    came = {
        "differing": differing(model, expected),
        "global_steps": engine.global_steps,
        "steps": [float(state["step"]) for state in inner.state.values()],
        "groups": [[group["lr"], group["weight_decay"], list(group["betas"])] for group in inner.param_groups],
    }
    if stage == 3:  # 0.19.8 has given all sub-groups the same tensor: docs/checkpoints.md
        for state in inner.state.values():
            state["step"] = state["step"].clone()
    engine.backward(engine())
    engine.step()
    came["after_a_step"] = differing(model, stepped(expected, shapes, inner.param_groups, came["steps"][0]))
    return came


def stepped(state: dict[str, Tensor], shapes: dict[str, torch.Size], groups: list[dict[str, Any]], step: float) -> dict[str, Tensor]:
    """The state after a step of torch's AdamW without DeepSpeed."""
    model = network(shapes)
    plain = optimizer(list(model.parameters()), len(groups))
    for group, other in zip(plain.param_groups, groups, strict=True):
        group |= {key: value for key, value in other.items() if key != "params"}
    for name, parameter in model.named_parameters():
        parameter.data = state[f"model/{name}"].clone()
        moments = {kind: state[f"{kind}/{name}"].clone() for kind in ("exp_avg", "exp_avg_sq")}
        plain.state[parameter] = moments | {"step": torch.tensor(step)}
    model().backward()
    plain.step()
    weights = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    moments = {f"{kind}/{n}": plain.state[p][kind] for n, p in model.named_parameters() for kind in ("exp_avg", "exp_avg_sq")}
    return weights | moments


def save_in_bf16(folder: Path, stage: int) -> None:
    """What DeepSpeed saves of its own mixed precision: stage 1 has another optimizer, stage 2 another order of parameters."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "round_robin_gradients": stage == 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"} if stage == 1 else {},
    }
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer(list(model.parameters()), 2), config=config)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 7, dtype=torch.bfloat16)).float().sum())
        engine.step()
    engine.save_checkpoint(str(folder / f"bf16-{stage}"), tag="saved")


def main(folder: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 0.19.8: it would be compiled, for a minute
    deepspeed.init_distributed(dist_backend="gloo")
    for number, job in enumerate(json.loads((folder / "stock.json").read_text())):
        deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # 0.19.8: made once a process
        came = run(**job)
        if torch.distributed.get_rank() == 0:
            (folder / f"stock-{number}.json").write_text(json.dumps(came))
    for stage in (1, 2, 3):
        save_in_bf16(folder, stage)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
