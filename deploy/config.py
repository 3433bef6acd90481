"""From Hydra's YAML groups and a command line to a checked ``configs.schema.Config``, and from there to YAML and back.

Owns: how the groups are composed, what an override may say, and how plain YAML values become the typed schema.
Never states a limit of its own (those are the schema's and, for ``lopt.arguments``, the architectures'), never resolves
interpolations, never leaves Hydra's global state behind and never writes a file. Every error is a ``ConfigError`` that
names the full dotted path.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from importlib import resources
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from configs.checks import ConfigError, did_you_mean
from configs.schema import Config, EvaluationConfig, LoptConfig, TaskConfig

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_PRIVATE = re.compile(r"(storage|data)\.options|secret|token|password|credential|(^|[\W_])key\b", re.IGNORECASE)


class _UniqueKeysLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself would let the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                name = repr(key.value) if isinstance(key, yaml.ScalarNode) else "that is not text"
                problem = f"a key appears twice or is no name: {name}"
                raise yaml.constructor.ConstructorError(problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(overrides: Sequence[str]) -> Config:
    """The configuration that ``overrides`` describe, in Hydra's override grammar.

    ``lopt=celo_phase2`` chooses an option of a group, ``run.meta_steps=500`` changes a field,
    ``+task.families.mine={dataset: digits}`` adds a named entry and ``~task.families.mine`` removes one. Groups are
    chosen first, then fields are changed from left to right. A mapping changes the fields it names in a section, and
    replaces a table of named entries (``task.families``, ``evaluation.tasks``, ``lopt.arguments``,
    ``storage.options``).

    Raises ConfigError, which names field, value and expectation.
    """
    groups = group_options()
    choices: dict[str, str | None] = {}
    changes: list[Override] = []
    for text in overrides:
        override = _parse(text)
        if override.key_or_group in groups and not isinstance(override.value(), dict):
            choices[override.key_or_group] = _choice(override, groups[override.key_or_group])
        else:
            changes.append(override)
    tree = _compose([f"{group}={choice}" for group, choice in choices.items() if choice is not None])
    for override in changes:
        _apply(tree, override)
    return _config(tree)


def group_options() -> dict[str, tuple[str, ...]]:
    """The groups under ``configs/`` and their options, both sorted."""
    folders = (folder for folder in resources.files("configs").iterdir() if folder.is_dir())
    options = {
        folder.name: tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")))
        for folder in folders
    }
    return {group: options[group] for group in sorted(options) if options[group]}


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars; a copy."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The whole configuration, every field written out; ``from_yaml`` gives an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(text: str) -> Config:
    """The configuration that ``to_yaml`` wrote; a field that is left out has the schema's default.

    Raises ConfigError on bad YAML, unknown or doubled keys, wrong types and values out of range.
    """
    try:
        tree = _UniqueKeysLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: impossible dates, numbers of 5000 digits
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f"line {mark.line + 1}" if mark else "text"
        raise ConfigError("config", where, f"YAML of plain values ({str(error).splitlines()[0]})") from None
    return _config(tree)


def _parse(text: str) -> Override:
    key, equals, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):
        try:
            OverridesParser.create().parse_override(f"{key}=0")
        except HydraException:
            equals = ""  # the key is no key either
        if not equals:
            raise _refuse("override", text, "key=value, for example run.name=first") from None
        quoted = "..." if _PRIVATE.search(text) or '"' in value else value
        raise _refuse(
            key, value, f"one value; text with special characters needs quotes: {key}='\"{quoted}\"'"
        ) from None
    if override.type is OverrideType.FORCE_ADD or override.package is not None or not override.key_or_group:
        raise _refuse("override", text, "key=value, +table.name=value or ~table.name")
    if override.is_sweep_override():
        raise _refuse(key, value, "one value, because sweeps are not run (a list is written [1,2])")
    return override


def _choice(override: Override, options: tuple[str, ...]) -> str | None:
    group, choice = override.key_or_group, override.value()
    if override.type is not OverrideType.CHANGE:
        raise _refuse("override", override.input_line, f"{group}=option: a group is neither added nor removed")
    if group == "experiment" and choice is None:
        return None
    if choice not in options:
        raise _unknown(group, choice, "one of", str(choice), options)
    return str(choice)


def _compose(selections: list[str]) -> dict[str, Any]:
    """Plain containers from the groups alone. A Hydra that the caller has set up is left as it was."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_module("configs", version_base="1.3"):
            composed = compose("config", overrides=selections)
    finally:
        GlobalHydra.instance().hydra = outer
    tree = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(tree, dict)  # noqa: S101 - config.yaml is a mapping
    return {str(name): value for name, value in tree.items()}


def _apply(tree: dict[str, Any], override: Override) -> None:
    """Changes, adds or removes in ``tree`` what the override names, after checking each name on the way."""
    path, value = override.key_or_group, override.value()
    names = path.split(".")
    last = names[-1]
    adding = override.type is OverrideType.ADD
    kind: Any = Config
    node: Any = tree
    added = False
    for depth, name in enumerate(names, start=1):
        parent = ".".join(names[: depth - 1])
        inner = _inner(kind, parent, path, name, value)
        if not isinstance(node, dict):
            raise _refuse(parent, node, _named(kind))
        table = get_origin(kind) is dict
        new = table and name not in node
        if new and not adding and (depth < len(names) or override.is_delete() or inner is not Any):
            raise _unknown(path, value, f"a name that {parent} has (+ adds one):", name, node)
        added |= new
        if depth < len(names):
            kind, node = inner, node.setdefault(name, {})
    if override.is_delete():
        if not table or "=" in str(override.input_line):
            raise _refuse("override", override.input_line, "~table.name: a field cannot be removed, only a named entry")
        del node[last]
        return
    if adding and not added:
        raise _refuse("override", override.input_line, f"{path}=value without +, because {path} exists")
    if isinstance(value, int | float) and str in (inner, *get_args(inner)):
        value = str(override.input_line).partition("=")[2].strip()  # run.name=2026 and run.name=1e3 are texts
    node[last] = _merged(inner, node.get(last), value)


def _inner(kind: Any, parent: str, path: str, name: str, value: object) -> Any:
    """The type of ``name`` in a section or table of type ``kind``; ``path`` is what the user wrote."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    if kind is Any:
        return Any  # what is written by hand there is checked by those whom it is for
    if not is_dataclass(kind):
        raise _refuse(path, value, f"nothing below {parent}, which is {_named(kind)}")
    hints = get_type_hints(kind)
    if name not in hints:
        extra = () if parent else ("experiment",)
        raise _unknown(path, value, f"a field of {parent or 'the configuration'}:", name, [*hints, *extra])
    return hints[name]


def _merged(kind: Any, old: object, new: object) -> object:
    """A section keeps the fields that ``new`` does not name; everything else is replaced."""
    if not (is_dataclass(kind) and isinstance(old, dict) and isinstance(new, dict)):
        return new
    hints = get_type_hints(kind)
    return old | {name: _merged(hints.get(name), old.get(name), value) for name, value in new.items()}


def _config(tree: object) -> Config:
    config = _typed(Config, tree, "")
    assert isinstance(config, Config)  # noqa: S101 - for the type checker
    return replace(
        config, lopt=_constructible(config.lopt), task=_drawable(config.task), evaluation=_fixed(config.evaluation)
    )


def _drawable(chosen: TaskConfig) -> TaskConfig:
    """``chosen``, with every family known to ``tasks`` and every task that is written by hand in full."""
    import tasks  # late, because torch takes a second to import

    families = {}
    for name, family in chosen.families.items():
        path = f"task.families.{name}"
        if family.sample is None:
            families[name] = replace(family, task=_in_full(family.task, name, f"{path}.task"))
        elif family.sample in tasks.FAMILIES:
            families[name] = family
        else:
            raise _unknown(f"{path}.sample", family.sample, "one of", family.sample, tasks.FAMILIES)
        tasks.check_augmentations(family.augment, f"{path}.augment")
    tasks.check_augmentations(chosen.augment, "task.augment")
    return replace(chosen, families=families)


def _fixed(chosen: EvaluationConfig) -> EvaluationConfig:
    """``chosen``, with every task that is written by hand in full."""
    found = {
        name: replace(entry, task=_in_full(entry.task, name, f"evaluation.tasks.{name}.task"))
        for name, entry in chosen.tasks.items()
    }
    return replace(chosen, tasks=found)


def _in_full(task: Any, name: str, path: str) -> Any:
    """A static config written by hand with all its fields, so that later defaults do not change it; a name as it is."""
    import tasks

    static = tasks.resolve_task(task, name, path)
    return static.to_dict() if isinstance(task, dict) else task


def _constructible(chosen: LoptConfig) -> LoptConfig:
    """``chosen``, with arguments of the types that its architecture's constructor names and that it has accepted."""
    from lopt.checkpoint import ARCHITECTURES  # late, because torch takes a second to import

    if chosen.name not in ARCHITECTURES:
        raise _unknown("lopt.name", chosen.name, "one of", chosen.name, ARCHITECTURES)
    kind = ARCHITECTURES[chosen.name]
    takes, hints = inspect.signature(kind).parameters, get_type_hints(kind.__init__)
    arguments = {}
    for name, value in chosen.arguments.items():
        if name not in takes:
            raise _unknown(f"lopt.arguments.{name}", value, f"an argument of {chosen.name}:", name, takes)
        arguments[name] = _typed(hints[name], value, f"lopt.arguments.{name}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in arguments:
            expected = f"{_named(hints[name])}, because {chosen.name} has no default for it"
            raise _refuse(f"lopt.arguments.{name}", None, expected)
    try:
        kind(**arguments)
    except ConfigError as error:
        raise _refuse(f"lopt.arguments.{error.field}", error.value, error.expected) from None
    return replace(chosen, arguments=arguments)


def _typed(kind: Any, value: Any, path: str) -> Any:
    """``value`` as the type ``kind`` of the field at ``path``, or ConfigError. Nothing is coerced but int to float."""
    if type(None) in get_args(kind):
        return None if value is None else _typed(get_args(kind)[0], value, path)
    if value == "???":
        raise _refuse(path, value, f"{_named(kind)}; this setup has no default, give {path}=...")
    if is_dataclass(kind):
        return _section(kind, value, path)
    if get_origin(kind) is list and isinstance(value, list):
        return [_typed(get_args(kind)[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {
            _typed(str, name, path): _typed(get_args(kind)[1], item, f"{path}.{name}") for name, item in value.items()
        }
    if kind is Any and isinstance(value, list | dict):
        kind = list[Any] if isinstance(value, list) else dict[str, Any]
        return _typed(kind, value, path)
    if kind is Any and (value is None or type(value) in (str, int, float, bool)):
        kind = type(value)
    if kind is float and (type(value) is int or (isinstance(value, str) and _NUMBER.fullmatch(value))):
        value = float(str(value))  # through text, so that a huge whole number becomes inf and is refused
    if kind is type(None):
        return None
    if kind not in (str, int, float, bool) or type(value) is not kind:
        hint = f", written {int(value)}" if kind is int and isinstance(value, float) and value.is_integer() else ""
        raise _refuse(path, value, _named(kind) + hint)
    if kind is float and not math.isfinite(value):
        raise _refuse(path, value, "a finite number")
    if kind is str and "${" in value:
        raise _refuse(path, value, "plain text, because interpolations are not resolved")
    return value


def _section(kind: Any, value: Any, path: str) -> Any:
    """A dataclass from a mapping. What its own checks raise is given its full path."""
    hints = get_type_hints(kind)
    dot = f"{path}." if path else ""
    if not isinstance(value, dict):
        raise _refuse(path or "config", value, _named(kind))
    for name, item in value.items():
        _inner(kind, path, f"{dot}{name}", name, item)
    for field in fields(kind):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise _refuse(f"{dot}{field.name}", None, _named(hints[field.name]))
    arguments = {name: _typed(hints[name], item, f"{dot}{name}") for name, item in value.items()}
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise _refuse(f"{dot}{error.field}", error.value, error.expected) from None


def _named(kind: Any) -> str:
    """The type in a user's words."""
    if is_dataclass(kind):
        return f"a section with {', '.join(get_type_hints(kind))}"
    if type(None) in get_args(kind):
        return f"{_named(get_args(kind)[0])} or null"
    if get_origin(kind) is list:
        return f"a list of {_named(get_args(kind)[0]).removeprefix('a ')}s"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "a table of named entries" if get_origin(kind) is dict else "a plain value")


def _unknown(path: str, value: object, expected: str, name: str, choices: Iterable[object]) -> ConfigError:
    names = [str(choice) for choice in choices]
    return _refuse(path, value, f"{expected} {', '.join(names) or '(none)'}{did_you_mean(name, names)}")


def _refuse(path: str, value: object, expected: str) -> ConfigError:
    """The error for the user; a value that may be a secret is not repeated."""
    return ConfigError(path, "<not shown>" if _PRIVATE.search(f"{path} {value}") else value, expected)
