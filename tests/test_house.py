"""Rules of the house that a reader relies on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # room -> what it may import of ours, itself apart
    "kernels": set(),
    "playground.config": set(),
    "playground.families": {"playground.config"},
    "playground.model": {"kernels", "playground.config"},
    "playground.engine": {"kernels", "playground.config", "playground.model", "playground.tokenizer"},
    "playground.inspect": {
        "kernels",
        "playground.config",
        "playground.engine",
        "playground.model",
        "playground.tokenizer",
    },
    "playground.ui": {"playground", "playground.chat", "playground.engine", "playground.inspect", "playground.shelf"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "kernels" else ".".join(parts[:2])


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_in_one_direction(room):
    path = ROOT / room.replace(".", "/")
    for file in [path.with_suffix(".py")] if path.with_suffix(".py").exists() else path.rglob("*.py"):
        for module in imports_of(file):
            if module.split(".")[0] in ("kernels", "playground"):
                allowed = ALLOWED[room] | {room}
                assert room_of(module) in allowed, f"{file.relative_to(ROOT)} imports {module}"
            if room == "playground.ui":
                assert module.split(".")[0] not in ("torch", "triton"), f"{file.relative_to(ROOT)} imports {module}"


def test_the_readme_map_names_every_python_room_and_nothing_that_is_gone():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```text\n(app\.py.*?)```", readme, re.S).group(1)
    named = set(re.findall(r"[\w/]+\.py|[\w]+/", block))
    for file in [*ROOT.glob("kernels/*.py"), *ROOT.glob("playground/*.py")]:
        if not file.name.startswith("__init__"):
            assert file.name in named, f"{file.relative_to(ROOT)} is missing in README's map"
    existing = {p.name for p in ROOT.rglob("*.py")} | {p.name + "/" for p in ROOT.rglob("*") if p.is_dir()}
    assert named <= existing, f"README's map names {named - existing}"


def test_every_file_fits_a_plain_push_to_a_space():
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert all((ROOT / f).stat().st_size < 9_500_000 for f in files if f and (ROOT / f).exists())
