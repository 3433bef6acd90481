"""Records of optimizers can be looked at: few tensors and many, one optimizer and several."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

import lopt
from lopt import figures
from lopt.checkpoint import ARCHITECTURES
from lopt.hand_designed import HandDesigned
from lopt.per_parameter import PerParameterRule
from tests.optimizers import RULES, make, problem, train, with_grad

LEARNED = [name for name in RULES if not issubclass(ARCHITECTURES[RULES[name][0]], HandDesigned)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*LEARNED, "adam", "muon"])
def test_every_rule_can_be_drawn(tmp_path, name):
    model, loss_of = problem()
    opt = make(name, model.named_parameters())
    with lopt.record(opt, directions=True) as recorded:
        train(model, loss_of, opt, 3)
    figure = lopt.plot(recorded, tmp_path / "inside.png")
    with Image.open(tmp_path / "inside.png") as picture:
        assert picture.size > (700, 300)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles[0].startswith(f"{opt.lopt.name}: ")
    kinds = recorded.arrays().keys() | {"relative_step"}
    assert len(titles) == len([panel for panel in figures.PANELS if panel.kind in kinds]) >= 3
    assert any("schedule" in title for title in titles) == (name in ("celo", "celo_adam"))
    assert any("mean |d|" in title for title in titles) == issubclass(ARCHITECTURES[RULES[name][0]], PerParameterRule)
    assert any("predicted step size c" in title for title in titles) == (name == "velo")


def recorded_of(count, steps=4, names="layer.{}"):
    shapes = [(3,), (3, 2), (2, 1, 3, 3), ()]
    params = [(names.format(i), with_grad(torch.full(shapes[i % 4], 1.0 + i))) for i in range(count)]
    opt = make("velo", params)
    with lopt.record(opt) as recorded:
        for _ in range(steps):
            opt.step(loss=2.0)
    return recorded


def legend(figure):
    (found,) = figure.legends
    return [text.get_text().strip() for text in found.get_texts()]


@pytest.mark.filterwarnings("error")
def test_few_tensors_have_a_line_each_by_any_name(tmp_path):
    figure = lopt.plot(recorded_of(5, names="_orig_mod.$x_{}^$"), tmp_path / "few.png")
    assert legend(figure) == [f"_orig_mod.$x_{i}^$" for i in range(5)]
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    lines = by_title["step size: mean |Δp| (units of p)"].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 5


@pytest.mark.filterwarnings("error")
def test_many_tensors_are_drawn_as_quantiles_of_their_kinds(tmp_path):
    recorded = recorded_of(150)
    figure = lopt.plot(recorded, tmp_path / "many.png")
    assert legend(figure) == ["vectors (75)", "matrices (38)", "kernels (37)"]
    axes = next(axes for axes in figure.axes if "mean |Δp|" in axes.get_title(loc="left"))
    assert len(axes.lines) == 3
    found = recorded.arrays()
    medians = np.median(found["step_mean_abs"][:, found["dimensions"] == 2], axis=1)
    np.testing.assert_allclose(axes.lines[1].get_ydata(), medians, rtol=1e-6)
    assert lopt.plot(recorded_of(8)).legends[0].get_title().get_text() == ""


@pytest.mark.filterwarnings("error")
def test_records_are_compared_on_equal_axes(tmp_path):
    traces = []
    for name in ("celo", "adam"):
        model, loss_of = problem()
        opt = make(name, model.named_parameters())
        with lopt.record(opt) as recorded:
            train(model, loss_of, opt, 3)
        traces.append(recorded)
    figure = lopt.plot(traces, tmp_path / "both.png")
    left, right = figure.axes[:2]
    assert left.get_title(loc="left").startswith("celo: step size")
    assert right.get_title(loc="left").startswith("adam: step size")
    assert left.get_ylim() == right.get_ylim()


@pytest.mark.filterwarnings("error")
def test_factors_of_both_signs_are_drawn_around_zero(tmp_path):
    arrays = recorded_of(5).arrays()
    arrays["step_factor"][:2] *= -1
    figure = lopt.plot(arrays, tmp_path / "signed.png")
    axes = next(axes for axes in figure.axes if "step size c" in axes.get_title(loc="left"))
    assert axes.get_yscale() == "symlog"
    low, high = axes.get_ylim()
    assert low < arrays["step_factor"].min() < 0 < arrays["step_factor"].max() < high


@pytest.mark.filterwarnings("error")
def test_a_step_that_stands_still_or_is_not_a_number_can_be_drawn(tmp_path):
    p, other = with_grad(torch.ones(3, 2)), with_grad(torch.zeros(2), 0.0)
    opt = make("adam", [p, other], lr=0.0)
    with lopt.record(opt) as recorded:
        opt.step()
        p.grad.fill_(torch.nan)
        opt.step()
    lopt.plot(recorded, tmp_path / "still.png")
    with lopt.record(opt) as recorded:
        opt.step()
    lopt.plot(recorded, tmp_path / "once.png")
    assert (tmp_path / "once.png").stat().st_size > 10_000


def test_a_record_is_drawn_from_its_file_as_from_memory(tmp_path):
    recorded = recorded_of(5)
    recorded.save(tmp_path / "trace")
    lopt.plot(recorded, tmp_path / "memory.png")
    with np.load(tmp_path / "trace", allow_pickle=False) as loaded:
        lopt.plot(loaded, tmp_path / "file.png")
    assert (tmp_path / "memory.png").read_bytes() == (tmp_path / "file.png").read_bytes()


def test_nothing_recorded_is_said_so():
    opt = make("celo", [with_grad(torch.ones(2))])
    with lopt.record(opt) as recorded:
        pass
    for nothing in (recorded, [recorded], []):
        with pytest.raises(ValueError, match="nothing was recorded"):
            lopt.plot(nothing)


def test_drawing_is_imported_by_who_draws():
    code = (
        "import sys, lopt; assert 'matplotlib' not in sys.modules; lopt.plot; lopt.figures; assert callable(lopt.plot)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'plots'"):
        _ = lopt.plots


def test_matplotlib_is_left_as_it_was():
    before = dict(mpl.rcParams)
    lopt.plot(recorded_of(3))
    assert dict(mpl.rcParams) == before
