"""What a value of a configuration must be: the error that says so, and the checks that raise it.

Owns: ``ConfigError`` and the checks that several dataclasses share, here and in ``tasks`` and ``lopt``.
Never imports anything of paceline: every room may read it. ``field`` is the name for the message, up to whatever
knows the full path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

CLIENT_OPTIONS = ("endpoint_url", "region", "anon")


class ConfigError(ValueError):
    """A configuration that cannot be run; ``str()`` is one paragraph for the user."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(field, value, expected)  # as given, so that it crosses process boundaries unharmed
        self.field = field
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: expected {self.expected}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a near miss, else an empty string."""
    close = get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(field, value, f"one of {', '.join(choices)}{did_you_mean(value, choices)}")


def at_least(field: str, value: float, minimum: float) -> None:
    """Raise ConfigError unless ``value`` is finite and at least ``minimum``."""
    if not minimum <= value < math.inf:
        raise ConfigError(field, value, f"a number >= {minimum}")


def positive(field: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is finite and above zero."""
    if not 0 < value < math.inf:
        raise ConfigError(field, value, "a number > 0")


def below_one(field: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(field, value, "a number in [0, 1)")


def label(field: str, value: str) -> None:
    """Names of families, evaluation tasks and suites: they become metric labels and parts of file names."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", value):
        raise ConfigError(field, value, "names of 1 to 64 letters, digits, dashes or underscores, a letter first")


def location(field: str, value: str) -> None:
    """A path or URL. One with credentials is refused (and not repeated): configurations are stored and shown."""
    if re.search(r"://[^/]*@", value):
        raise ConfigError(field, "<not shown>", "a URL without credentials (they come from the environment)")
    if not value.strip():
        raise ConfigError(field, value, "a path or URL")


def split_text(field: str, text: str) -> tuple[str, str]:
    """The corpus and the vocabulary of ``corpus/vocabulary``; either may hold slashes of its own."""
    found = re.fullmatch(r"(.+)/(bytes|32k|(?:bpe|sentencepiece):.+)", text)
    if found is None:
        expected = "corpus/vocabulary, for example pydoc/bytes, lm1b/32k or text:a.txt/bpe:tokenizer.json"
        raise ConfigError(field, text, expected)
    return found[1], found[2]


def client_options(options: dict[str, Any]) -> None:
    """The options of an fsspec client that a configuration may hold."""
    for name, value in options.items():
        if name not in CLIENT_OPTIONS:  # the value may be a secret
            known = f"one of {', '.join(CLIENT_OPTIONS)}{did_you_mean(name, CLIENT_OPTIONS)}"
            raise ConfigError(f"options.{name}", "<not shown>", f"{known}; secrets come from the environment")
        if type(value) is not (bool if name == "anon" else str):
            raise ConfigError(f"options.{name}", "<not shown>", "true or false" if name == "anon" else "text")
    location("options.endpoint_url", options.get("endpoint_url", "default"))


def ascending(field: str, versions: list[int]) -> None:
    """The points of a schedule, in order."""
    if any(later <= earlier for earlier, later in pairwise(versions)):
        raise ConfigError(field, versions, "versions that ascend")
