"""Where a theta comes from, as its file says it: run, version, data, configuration and code.

Owns what a published optimizer tells about its making. Never holds a path or a user's name beyond what the
configuration says.
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config, TaskConfig

GIT_SECONDS = 10.0


def provenance(config: Config, config_yaml: str, version: int) -> dict[str, Any]:
    """What theta ``version`` of this run has to say, as JSON. Equal runs of equal code say the same."""
    return {
        "run": config.run.name,
        "version": version,
        "data": sorted(_data(config.task)),
        "config": config_yaml,
        "code": {
            "paceline": importlib.metadata.version("paceline"),
            "torch": torch.__version__,
            "revision": code_revision(),
        },
    }


def _data(config: TaskConfig) -> set[str]:
    """The names of the data sets that a configuration names, or of the fixed tasks and families that imply them."""
    found: set[str] = set()
    for name, family in config.families.items():
        if family.sample is not None:
            found |= {*config.images, *config.texts} or {family.sample}
        else:
            found |= _named(family.task) if isinstance(family.task, dict) else {family.task or name}
    return found


def _named(task: dict[str, Any]) -> set[str]:
    """The data sets that a static config written as a mapping names, at any depth."""
    found = {str(task[field]) for field in ("dataset", "corpus") if field in task}
    return found.union(*(_named(value) for value in task.values() if isinstance(value, dict)))


@functools.cache
def code_revision() -> str | None:
    """The git commit this code was checked out from, with ``-dirty`` where it was changed since; None without one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(  # noqa: S603  # the words of the command are fixed
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
