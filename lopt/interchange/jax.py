"""Weights of the JAX originals, by their own names.

Owns the step from learned_optimization's and Celo's parameter trees to paceline's theta: every architecture states its
originals' names in ``jax_names``, and a set of leaves says by names and shapes which architecture it belongs to.
Never reads files.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.checks import did_you_mean
from lopt.base import Argument, LearnedOptimizer, Theta, ThetaError
from lopt.checkpoint import ARCHITECTURES, CheckpointError

Array = npt.NDArray[Any]
JaxNames = Mapping[str, str | tuple[str, ...]]
"""Entry of theta -> path of the original's leaf; several leaves are concatenated along axis -2."""

PUBLISHED: dict[str, dict[str, Argument]] = {"celo": {"phase": 2}, "velo": {"compat": True}}
"""Arguments that leaves cannot tell: Celo's last phase is the one published; an original's VeLO has its defects."""
MAX_SIZE = 2**16
MAX_CANDIDATES = 4096


def names_of(kind: type[LearnedOptimizer] | LearnedOptimizer) -> JaxNames:
    """Where the original keeps each entry of theta; empty for an architecture that has none."""
    names: JaxNames = getattr(kind, "jax_names", {})
    return names


def theta_from_jax(lopt: LearnedOptimizer, leaves: Mapping[str, Array]) -> Theta:
    """theta of ``lopt`` from the original's leaves, named by their path (``/`` or ``|`` between parts, ``~`` ignored).

    A leading axis of size one that theta does not have (a bank of one rule, a batch of one state) is dropped.
    Raises ``ThetaError`` for an architecture without a known original, and where a leaf is missing, unknown or of
    another shape.
    """
    found = _by_path(leaves)
    if problem := _naming_problem(type(lopt), found):
        raise ThetaError(problem)
    theta, problem = _converted(lopt, found)
    if problem is not None:
        raise ThetaError(problem)
    return theta


def identify(
    leaves: Mapping[str, Array], architecture: str | None, arguments: Mapping[str, Argument]
) -> tuple[LearnedOptimizer, Theta]:
    """The one architecture that has these leaves, with the arguments that give their shapes, and its theta.

    ``architecture`` and ``arguments`` narrow the choice. Raises ``CheckpointError`` where nothing or too much fits.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        expected = ", ".join(sorted(ARCHITECTURES)) + did_you_mean(architecture, ARCHITECTURES)
        raise CheckpointError(f"architecture {architecture!r}: expected one of {expected}")
    # a variant inherits its names (muLO is small_fc_lopt's weights used otherwise), and has to be asked for
    every = [kind for kind in ARCHITECTURES.values() if "jax_names" in vars(kind)]
    found = _by_path(leaves)
    fitting, reason, closest = [], "", -1
    for kind in every if architecture is None else [ARCHITECTURES[architecture]]:
        problem = _naming_problem(kind, found)
        closeness = len(_wanted(kind) & found.keys())
        if closeness > closest:
            closest, reason = closeness, problem or f"{kind.name} does not take the arguments {dict(arguments)}"
        for rule in _candidates(kind, arguments, found) if problem is None else ():
            theta, problem = _converted(rule, found)
            if problem is None:
                fitting.append((rule, theta))
                break
            if (closeness := 1 + len(found) + len(theta)) > closest:
                closest, reason = closeness, problem
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        both = " and ".join(rule.name for rule, _ in fitting)
        raise CheckpointError(f"the leaves fit {both}: say which with architecture=")
    raise CheckpointError(reason)


def _candidates(
    kind: type[LearnedOptimizer], arguments: Mapping[str, Argument], found: Mapping[str, Array]
) -> Iterator[LearnedOptimizer]:
    """Optimizers of this kind: whole-number arguments that are not given may be any size that occurs in the leaves."""
    known = PUBLISHED.get(kind.name, {}) | dict(arguments)
    parameters = inspect.signature(kind).parameters
    if not known.keys() <= parameters.keys():
        return
    sizes = sorted({size for leaf in found.values() for size in leaf.shape if size <= MAX_SIZE})
    choices: dict[str, list[Any]] = {}
    for name, parameter in parameters.items():
        if name in known:
            choices[name] = [known[name]]
        elif parameter.annotation in (int, "int"):
            default = [] if parameter.default is parameter.empty else [parameter.default]
            choices[name] = [*default, *(size for size in sizes if size not in default)]
    for values in itertools.islice(itertools.product(*choices.values()), MAX_CANDIDATES):
        try:
            yield kind(**dict(zip(choices, values, strict=True)))
        except (TypeError, ValueError):
            continue  # the constructor's own limits


def _naming_problem(kind: type[LearnedOptimizer], found: Mapping[str, Array]) -> str | None:
    """Why leaves of these names cannot be this architecture's."""
    wanted = _wanted(kind)
    if not wanted:
        return f"no JAX original is known for {kind.name!r}"
    if wanted != found.keys():
        missing, unknown = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
        return f"leaves of another architecture than {kind.name}: missing {missing}, unknown {unknown}"
    return None


def _converted(lopt: LearnedOptimizer, found: Mapping[str, Array]) -> tuple[Theta, str | None]:
    """The entries of theta that the leaves give, and the first problem where they do not give all."""
    names = names_of(lopt)
    theta: Theta = {}
    problems = []
    for entry in lopt.spec.entries:
        paths = _paths(names[entry.name])
        leaf = _concatenated([found[path] for path in paths])
        if leaf is None or leaf.shape not in (entry.shape, (1, *entry.shape)):
            shapes = [found[path].shape for path in paths]
            problems.append(f"leaves {list(paths)} have shapes {shapes}: expected {entry.shape} together")
        elif leaf.dtype != np.float32:
            problems.append(f"leaves {list(paths)} have dtype {leaf.dtype}: expected float32")
        elif not np.isfinite(leaf).all():
            problems.append(f"leaves {list(paths)} hold numbers that are not finite")
        else:
            theta[entry.name] = torch.from_numpy(np.array(leaf, np.float32).reshape(entry.shape))
    return theta, problems[0] if problems else None


def _wanted(kind: type[LearnedOptimizer]) -> set[str]:
    return {path for source in names_of(kind).values() for path in _paths(source)}


def _by_path(leaves: Mapping[str, Array]) -> dict[str, Array]:
    found = {re.sub(r"[|/]+", "/", name.replace("~", "")).strip("/"): leaf for name, leaf in leaves.items()}
    if len(found) != len(leaves):
        raise ThetaError(f"{len(leaves)} leaves have only {len(found)} different paths")
    return found


def _paths(source: str | tuple[str, ...]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else source


def _concatenated(parts: list[Array]) -> Array | None:
    """One leaf, or several along axis -2; None where their shapes do not allow it."""
    if len(parts) == 1:
        return parts[0]
    outer = {(*part.shape[:-2], part.shape[-1]) for part in parts if part.ndim >= 2}
    if len(outer) != 1 or any(part.ndim < 2 for part in parts):
        return None
    return np.concatenate(parts, axis=-2)
