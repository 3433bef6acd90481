"""The house's plan: who may import whom, and what works without Ray, Hydra and gRPC."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("configs", "tasks", "lopt", "worker", "learner", "evaluator", "protos", "deploy")
SERVICES = {"ray", "hydra", "grpc", "omegaconf"}
MAY_IMPORT = {
    "configs": {"configs"},
    "tasks": {"tasks", "configs"},
    "lopt": {"lopt", "configs"},
    "worker": {"worker", "tasks", "lopt", "configs"},
    "learner": {"learner", "lopt", "configs"},
    "evaluator": {"evaluator", "tasks", "lopt", "learner", "configs"},
    "protos": {"protos"},
    "deploy": set(ROOMS),
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in path.name]


def imported(path):
    """Dotted names of all modules that the file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_it_may(path):
    room = path.relative_to(ROOT).parts[0]
    names = imported(path)
    if path.match("tasks/families/lopt_*.py"):  # the one task whose subject is a learned optimizer
        names = {name for name in names if name.split(".")[0] != "lopt"}
    assert {name.split(".")[0] for name in names} & set(ROOMS) <= MAY_IMPORT[room]
    if room == "evaluator":
        assert {name for name in names if name.startswith("learner")} <= {"learner.checkpoints"}
    if room not in ("deploy", "protos") and path.name != "actor.py":
        assert not {name.split(".")[0] for name in names} & SERVICES


def test_the_cores_import_without_ray_hydra_and_grpc():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path.relative_to(ROOT).parts[0] not in ("deploy", "protos") and path.name not in ("actor.py", "__init__.py")
    ]
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(SERVICES)!r}))"
    code = "; ".join([block, *(f"import {module}" for module in modules)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
