"""Imports point one way; importing the package is cheap in what it drags along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "xar_scale"

# From the bottom up: a room imports from those below it, never beside or above.
LAYERS = [
    ["errors", "version", "files", "slurm", "tables"],
    ["validation"],
    ["rng", "config", "posthoc"],
    ["presets"],
    ["model"],
    ["dist"],
    ["flow", "sampler", "tokenizers"],
    ["data"],
    ["optim", "ema", "precision", "staging", "background", "stopping", "stragglers", "watchdog"],
    ["guard", "diagnosis", "memory", "graphs"],
    ["engines"],
    ["checkpoint", "snapshots", "reports"],
    ["recovery"],
    ["metrics"],
    ["startup", "evaluate"],
    ["train", "report", "replay", "doctor"],
    ["plan", "environment"],
    ["bench", "program"],
    ["cli"],
    ["__main__", "tools"],
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "tools" if parts[0] == "tools" else parts[1]


def wrong_imports(path: Path) -> list[str]:
    """Imports of this file that do not point down. ``xar_scale/__init__`` shows the public names and is under no rule."""
    here = room(path)
    if here == "__init__":
        return []
    found = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "xar_scale" and parts[1] != here and HEIGHT[parts[1]] >= HEIGHT[here]:
            found.append(f"{here} imports {name}")
    return found


FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert wrong_imports(path) == []


def test_the_rule_sees_a_forbidden_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    upward = tmp_path / "xar_scale" / "model" / "upward.py"
    upward.parent.mkdir(parents=True)
    upward.write_text("def f():\n    from xar_scale.engines import create_engine\n")
    assert wrong_imports(upward) == ["model imports xar_scale.engines.create_engine"]
    upward.write_text("import xar_scale.train\n")
    assert wrong_imports(upward) == ["model imports xar_scale.train"]


def test_every_room_has_a_place():
    assert {room(path) for path in FILES} - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize(("library", "user"), [("deepspeed", "engines/deepspeed"), ("diffusers", "tokenizers/kl16.py")])
def test_a_library_that_one_file_or_folder_alone_imports(library, user):
    users = {path for path in FILES if any(name.split(".")[0] == library for name in imports(path))}
    assert users and all(path == PACKAGE / user or PACKAGE / user in path.parents for path in users)


def test_the_model_knows_no_processes():
    for path in (PACKAGE / "model").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("torch.distributed")], path


def test_importing_the_package_brings_no_library_that_only_some_commands_need():
    program = (
        "import sys, xar_scale, xar_scale.cli, xar_scale.evaluate.generate, xar_scale.data.loader; "
        "print([m for m in ('deepspeed', 'tensorboard', 'sklearn', 'diffusers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=400, cwd=ROOT)
    assert done.stdout.strip() == "[]"
