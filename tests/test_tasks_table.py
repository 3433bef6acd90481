"""docs/tasks_table.md: each row is computed again, and its numbers are near what theory and the published files say."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from tasks.families.lopt_training import LoptTraining
from tasks.fixed import TASKS
from tests.test_docs import table

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "initial_losses.py"
spec = importlib.util.spec_from_file_location("benchmarks_initial_losses", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script
spec.loader.exec_module(script)

ROWS = {row["task"]: row for row in table(script.PAGE.read_text(), "task")}
EXACT = ("kind", "data", "batch", "parameters", "forward MFLOPs", "expected", "published", "worst")
NUMBERS = ("loss", "moved", "meta-loss")
ZERO_HEADS = ("resnet", "vit", "mlp_mixer")


def costly(static):
    """Whether a row takes more than about half a second of one core."""
    inner = next((part for part in (static, getattr(static, "task", None)) if isinstance(part, LoptTraining)), None)
    return static.work().parameters > 1_500_000 or (inner is not None and inner.work().flops > 3e8)


BIG = {name for name, static in TASKS.items() if costly(static)}


def check(name):
    """The row of the page, computed again; what was rounded to four digits may differ by rounding and by processor."""
    cells = script.row(name).markdown().strip("| ").split("|")
    found = dict(zip(ROWS[name], (cell.strip() for cell in cells), strict=True))
    assert {column: found[column] for column in EXACT} == {column: ROWS[name][column] for column in EXACT}
    for column in NUMBERS:
        assert float(found[column]) == pytest.approx(float(ROWS[name][column]), rel=1e-4, abs=2e-4), column


def test_every_fixed_task_has_a_row():
    assert list(ROWS) == list(TASKS)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in BIG])
def test_a_row_is_what_the_task_gives(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BIG))
def test_a_row_is_what_a_large_task_gives(name):
    check(name)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["expected"]])
def test_the_first_loss_is_near_that_of_knowing_nothing(name):
    row = ROWS[name]
    excess = float(row["loss"]) - script.value(row["expected"])
    if row["kind"] in ZERO_HEADS:
        least, most = -1e-4, 1e-4
    elif row["expected"].startswith("1/"):
        least, most = 0.0, 0.003 if row["kind"] == "mlp_ae" else 0.9
    else:
        least, most = -0.03, 3.5 if "IRNN" in name else 0.5
    assert least <= excess <= most


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["published"]])
def test_the_first_loss_is_near_the_published_one(name):
    """Which is the lowest of many means, and on real data: so ours may be a little higher, but not lower.

    Auto-encoders and squared errors depend on the data more than on the model, and learned optimizers learn in a loss.
    """
    row = ROWS[name]
    if row["expected"].startswith("1/"):
        return
    assert 0.98 <= float(row["loss"]) / float(row["published"]) <= (1.08 if "LOpt" in name else 1.05)


def test_meta_losses_are_finite_and_at_most_the_worst():
    for row in ROWS.values():
        assert math.isfinite(float(row["meta-loss"]))
        assert float(row["meta-loss"]) <= float(row["worst"])
