"""Measure time and memory of parts of training on this machine; prints Markdown tables.

python tools/bench.py step --model xar_b --batch 4 --precision bf16
python tools/bench.py sample --model xar_b --batch 4 --steps 8
python tools/bench.py attention --model xar_h --grid 16 --batch 8 --precision bf16
python tools/bench.py recompute --model xar_b --batch 4
python tools/bench.py guard --model xar_b --batch 4
python tools/bench.py build --model xar_7b --ranks 64
python tools/bench.py loader --data /tmp/loader
python tools/bench.py reshard --model xar_h --data /tmp/reshard
python tools/bench.py memory --model xar_h --ranks 512
python tools/bench.py launches --model xar_h --engine fsdp2 --compile
torchrun --nproc-per-node 2 tools/bench.py scaling --model xar_b
torchrun --nproc-per-node 2 tools/bench.py checkpoint --model xar_b --data /tmp/checkpoint
python tools/bench.py order --shards 100000 --samples-per-shard 1000
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from xar_scale import dist
from xar_scale.bench.checkpoint import bench_checkpoint
from xar_scale.bench.guard import bench_guard
from xar_scale.bench.launches import bench_launches
from xar_scale.bench.loader import bench_loader, bench_order
from xar_scale.bench.model import bench_attention, bench_build, bench_recompute
from xar_scale.bench.plan import bench_memory, bench_scaling
from xar_scale.bench.reshard import bench_reshard
from xar_scale.bench.step import add_options, bench_sample, bench_step
from xar_scale.config import AttentionBackend, EngineName, Recompute, TrainConfig
from xar_scale.errors import UsageError
from xar_scale.model.entities import kinds
from xar_scale.precision import MODES, apply_matmul_mode
from xar_scale.program import Parser, tool_parser


def create_parser() -> Parser:
    parser = tool_parser(__file__, __doc__)
    parser.set_defaults(batch=1, grid=16, precision="fp32", shard_ranks=None)  # of commands without these options
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, work: Callable[[argparse.Namespace], None], help: str) -> Parser:
        command = commands.add_parser(name, help=help)
        command.set_defaults(command=work)
        return command

    attention = add("attention", bench_attention, "every attention backend on every kind of entity, forward and backward")
    attention.add_argument("--dropout", type=float, default=0.0, help="probability, where a backward pass follows")
    recompute = add("recompute", bench_recompute, "every mode of activation checkpointing: time and peak memory")
    recompute.add_argument(
        "--mode", choices=get_args(Recompute), help="measure only this mode, in this process, and print a line of JSON"
    )
    guard = add("guard", bench_guard, "overhead of the guard in a step without faults")
    build = add("build", bench_build, "memory and time to build one simulated ZeRO-3 rank of many")
    build.add_argument("--model", default="xar_b")
    build.add_argument("--ranks", type=int, default=64)
    loader = add(
        "loader", bench_loader, "reading the same latents in one process: our shards, MAR's folder of .npz, stock webdataset"
    )
    loader.add_argument("--data", type=Path, required=True, help="folder for the latents, which are created once")
    loader.add_argument("--samples", type=int, default=8192)
    checkpoint = add(
        "checkpoint", bench_checkpoint, "saving and loading a run's state: our checkpoints, and DeepSpeed's universal ones"
    )
    checkpoint.add_argument("--data", type=Path, required=True, help="folder to create and remove")
    checkpoint.add_argument("--model", default="xar_b")
    order = add("order", bench_order, "memory and time to open a data set and locate samples, at cluster scale")
    order.add_argument("--shards", type=int, default=100_000)
    order.add_argument("--samples-per-shard", type=int, default=1000)
    reshard = add("reshard", bench_reshard, "time and memory to convert a checkpoint of a model's size to each other format")
    reshard.add_argument("--model", default="xar_b")
    reshard.add_argument("--data", type=Path, required=True, help="folder with space for three such checkpoints")
    memory = add("memory", bench_memory, "estimated and measured memory of a rank's training steps")
    scaling = add("scaling", bench_scaling, "a step on these ranks: predicted from its parts, and measured")
    launches = add("launches", bench_launches, "CPU time to launch a micro-batch's kernels, for `plan --launch`")
    launches.add_argument("--ranks", type=int, default=8, help="size of the fake process group, of which this is rank 0")
    launches.add_argument("--compile", action="store_true", help="compile the blocks")
    for command in (memory, scaling, launches):
        command.add_argument("--model", default="xar_b")
        command.add_argument("--batch", type=int, default=1, help="samples per rank and micro-batch")
        command.add_argument("--engine", choices=get_args(EngineName), default="deepspeed")
        command.add_argument("--precision", choices=MODES, default="fp32")
        command.add_argument("--recompute", choices=get_args(Recompute), default="none")
    memory.add_argument("--shard-ranks", type=int, help="ranks per sharding group (default: all)")
    memory.add_argument("--ranks", type=int, help="size of a fake process group, of which this is rank 0")
    for command in (attention, recompute):
        command.add_argument("--entity", help=f"one of {', '.join(kinds())} (attention: default all; recompute: cell)")
    step = add("step", bench_step, "a training step, against a baseline of PyTorch layers and the published code")
    step.add_argument("--engine", choices=get_args(EngineName), default="single")
    step.add_argument("--ds-config", default=TrainConfig.ds_config, help="settings file for --engine deepspeed")
    step.add_argument("--recompute", choices=get_args(Recompute), default="none")
    step.add_argument("--dropout", type=float, default=0.1)
    step.add_argument("--trace", type=Path, help="file for a trace of one step, for chrome://tracing or Perfetto")
    sampling = add("sample", bench_sample, "sampling latents, against the same")
    sampling.add_argument("--steps", type=int, default=8, help="per entity")
    sampling.add_argument("--guidance", type=float, default=2.7)
    step.add_argument("--attention", choices=get_args(AttentionBackend), default="auto")
    for command in (step, sampling):
        command.add_argument("--compile", action="store_true", help="compile our model")
        add_options(command)
    for command in (attention, recompute, guard, step, sampling):
        command.add_argument("--model", default="xar_b")
        command.add_argument("--grid", type=int, default=16, help="tokens per side: 16 is 256 px, 32 is 512 px")
        command.add_argument("--batch", type=int, default=4)
        command.add_argument("--precision", choices=MODES, default="fp32")
    return parser


def main() -> int:
    return create_parser().run(run)


def run(options: argparse.Namespace) -> None:
    if min(options.batch, options.grid) < 1:
        raise UsageError("--batch and --grid must be at least 1")
    apply_matmul_mode(options.precision)
    options.command(options)


if __name__ == "__main__":
    dist.run(main)
