"""Static configurations: written by hand, printed, hashed, and read again."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.checks import ConfigError, at_least
from tasks.static import KINDS, StaticConfig, Work, static_from_dict, static_from_json


@dataclass(frozen=True, kw_only=True)
class Leaf(StaticConfig, kind="test_leaf"):
    width: int
    rate: float = 0.5
    hidden: tuple[int, ...] = ()
    name: str = "x"
    flag: bool = False
    limit: int | None = None

    def __post_init__(self):
        at_least("width", self.width, 1)

    def build(self, library):
        raise NotImplementedError

    def work(self):
        return Work(10, 20, 30)


@dataclass(frozen=True, kw_only=True)
class Wrap(StaticConfig, kind="test_wrap"):
    task: StaticConfig
    factor: float

    build = Leaf.build
    work = Leaf.work


@pytest.fixture(autouse=True, scope="module")
def leave_no_kinds():
    yield
    KINDS.pop("test_leaf"), KINDS.pop("test_wrap")


LEAVES = st.builds(
    Leaf,
    width=st.integers(1, 10**6),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    hidden=st.lists(st.integers(), max_size=4).map(tuple),
    name=st.text(max_size=5),
    flag=st.booleans(),
    limit=st.none() | st.integers(),
)
STATICS = st.recursive(LEAVES, lambda inner: st.builds(Wrap, task=inner, factor=st.floats(0, 1)), max_leaves=4)


@given(STATICS)
def test_what_is_written_is_read_again_and_has_the_same_identity(static):
    again = static_from_json(static.to_json())
    assert again == static
    assert hash(again) == hash(static)
    assert again.digest() == static.digest()
    assert static_from_dict(static.to_dict()) == static


@given(STATICS, STATICS)
def test_digests_are_equal_exactly_where_configs_are(one, two):
    assert (one.digest() == two.digest()) == (one.to_json() == two.to_json())
    assert (one == two) == (one.to_dict() == two.to_dict())


def test_the_digest_is_pinned():
    assert Leaf(width=3).digest() == static_from_dict({"kind": "test_leaf", "width": 3}).digest() == "e78d2d0390d7ab48"


def test_whole_numbers_serve_as_numbers_and_lists_as_tuples():
    read = static_from_dict({"kind": "test_leaf", "width": 3, "rate": 1, "hidden": [1, 2]})
    assert read == Leaf(width=3, rate=1.0, hidden=(1, 2))
    assert isinstance(read.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kind": "test_leef", "width": 1},
            r"^task\.kind = 'test_leef': expected one of .* \(did you mean 'test_leaf'\?\)$",
        ),
        ({"width": 1}, r"^task\.kind = None: expected one of"),
        ({"kind": ["x"], "width": 1}, r"^task\.kind = \['x'\]: expected one of"),
        (
            {"kind": "test_leaf", "widht": 1},
            r"^task\.widht = 1: expected a field of test_leaf \(did you mean 'width'\?\)$",
        ),
        ({"kind": "test_leaf"}, r"^task\.width = None: expected a value, which test_leaf needs$"),
        ({"kind": "test_leaf", "width": 0}, r"^task\.width = 0: expected a number >= 1$"),
        ({"kind": "test_leaf", "width": 2.0}, r"^task\.width = 2\.0: expected a whole number$"),
        ({"kind": "test_leaf", "width": True}, r"^task\.width = True: expected a whole number$"),
        ({"kind": "test_leaf", "width": 1, "flag": 1}, r"^task\.flag = 1: expected true or false$"),
        ({"kind": "test_leaf", "width": 1, "limit": "a"}, r"^task\.limit = 'a': expected a whole number or null$"),
        ({"kind": "test_leaf", "width": 1, "hidden": [1, "a"]}, r"^task\.hidden\[1\] = 'a': expected a whole number$"),
        ({"kind": "test_leaf", "width": 1, "hidden": 4}, r"^task\.hidden = 4: expected a list$"),
        ({"kind": "test_leaf", "width": 1, "rate": float("nan")}, r"^task\.rate = nan: expected a finite number$"),
        (
            {
                "kind": "test_wrap",
                "factor": 1,
                "task": {"kind": "test_wrap", "factor": 1, "task": {"kind": "test_leaf", "width": -1}},
            },
            r"^task\.task\.task\.width = -1: expected a number >= 1$",
        ),
        (
            {"kind": "test_wrap", "factor": 1, "task": "leaf"},
            r"^task\.task = 'leaf': expected a task \(a mapping with kind\)$",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_its_path(values, message):
    with pytest.raises(ConfigError, match=message):
        static_from_dict(values)


def test_memory_counts_parameters_gradients_moments_and_activations():
    assert Leaf(width=1).work().bytes == 4 * (4 * 10 + 2 * 30)
