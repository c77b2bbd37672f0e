"""Rules of the house that a reader relies on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG, TOKENIZER = "playground.checkpoint.config", "playground.checkpoint.tokenizer"
PLAIN = tuple(f"playground.engine.{name}" for name in ("bar", "client", "events", "insight", "requests", "settings"))
"""What crosses between the engine and those who ask it: numbers, texts, arrays."""
ALLOWED = {  # room -> what it may import of ours, itself apart
    "kernels": set(),
    "playground.checkpoint.patterns": set(),
    CONFIG: {"playground.checkpoint.patterns"},
    "playground.checkpoint.fields": {CONFIG},
    "playground.checkpoint.formats": {CONFIG, "playground.checkpoint.fields"},
    "playground.checkpoint.positions": {CONFIG, "playground.checkpoint.fields"},
    "playground.checkpoint.families": {
        CONFIG,
        "playground.checkpoint.fields",
        "playground.checkpoint.formats",
        "playground.checkpoint.positions",
    },
    "playground.model": {"kernels", CONFIG},
    "playground.engine": {"kernels", "playground.checkpoint", "playground.model"},
    "playground.api": {"playground.checkpoint", "playground.engine"},
    "playground.inspect": {CONFIG, TOKENIZER, "playground.api", *PLAIN},
    "playground.ui": {"playground.checkpoint.chat", "playground.inspect", "playground.shelf", *PLAIN},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def belongs(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_in_one_direction(room):
    path = ROOT / room.replace(".", "/")
    for file in [path.with_suffix(".py")] if path.with_suffix(".py").exists() else path.rglob("*.py"):
        for module in imports_of(file):
            if module.split(".")[0] in ("kernels", "playground"):
                front = room == "playground.ui" and module == "playground"
                allowed = front or any(belongs(module, one) for one in ALLOWED[room] | {room})
                assert allowed, f"{file.relative_to(ROOT)} imports {module}"
            if room in ("playground.ui", "playground.inspect"):
                assert module.split(".")[0] not in ("torch", "triton"), f"{file.relative_to(ROOT)} imports {module}"


def test_the_readme_map_names_every_python_room_and_nothing_that_is_gone():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```text\n(app\.py.*?)```", readme, re.S).group(1)
    named = set(re.findall(r"[\w/]+\.py|[\w]+/", block))
    for file in [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("playground/*.py")]:
        if not file.name.startswith("__init__"):
            assert file.name in named, f"{file.relative_to(ROOT)} is missing in README's map"
    existing = {p.name for p in ROOT.rglob("*.py")} | {p.name + "/" for p in ROOT.rglob("*") if p.is_dir()}
    assert named <= existing, f"README's map names {named - existing}"


def test_every_file_fits_a_plain_push_to_a_space():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert all((ROOT / f).stat().st_size < 9_500_000 for f in files if f and (ROOT / f).exists())


def calls_of(function: ast.FunctionDef) -> set[str]:
    """Names of functions that it calls or hands on."""
    return {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)
    }


def test_every_kernel_that_may_begin_early_waits_and_lets_the_next_begin():
    """Itself or in one of its roles (see `kernels/launch.py`): behind one that did not, others would read too early."""
    kernels = 0
    for file in ROOT.glob("kernels/**/*.py"):
        functions = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        for name, function in functions.items():
            if not (name.endswith("_kernel") and "PDL" in {argument.arg for argument in function.args.args}):
                continue
            kernels += 1
            called = calls_of(function)
            for role in called & set(functions):
                called = called | calls_of(functions[role])
            assert called & {"wait_for_previous", "gdc_wait"}, f"{file.name}: {name} does not wait"
            assert called & {"let_next_start", "gdc_launch_dependents"}, f"{file.name}: {name} lets nobody begin"
    assert kernels > 25


def test_the_pages_process_imports_neither_torch_nor_triton():
    code = "import sys, app, playground.ui.page; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
