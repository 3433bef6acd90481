"""The report: complete and honest in every state of a run, one file, nothing from the network."""

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from evaluator.queue import Books
from evaluator.report import ReportData, TaskPanel, render
from evaluator.results import TaskResult, Yardstick
from evaluator.scores import Aggregate, Scores

RC_PARAMS = dict(mpl.rcParams)  # before any page was rendered
CHROMIUM = shutil.which("chromium")
NASTY = "<script>alert('$x$ & more')</script>"


def curves(seeds, floor, rate, steps=300):
    rng = np.random.default_rng(seeds * 100 + int(rate * 1000))
    x = np.arange(steps)
    return [
        ((2.3 - floor) * np.exp(-rate * x) + floor + rng.normal(0, 0.05, steps) * (floor + 0.2)).clip(0.01).tolist()
        for _ in range(seeds)
    ]


def results(task, version, floor, rate, diverged=False):
    return [
        TaskResult(task, seed, version, f"c{version}", curve, floor, floor + 0.01 * seed, diverged and seed == 2)
        for seed, curve in enumerate(curves(3, floor, rate))
    ]


def scores(final, speedup):
    return Scores(Aggregate(final, final, max(0.0, 1 - final)), Aggregate(speedup, speedup, max(0.0, 1 - speedup)))


def panel(task, floor=0.33):
    adam = Yardstick(task, 0.01, [[0.001, 1.0], [0.01, 0.41], [1.0, None]], curves(3, 0.41, 0.03), [0.39, 0.42, 0.41])
    return TaskPanel(task, results(task, 400, floor, 0.05), results(task, 0, 2.25, 0.01), adam)


def full(**changes):
    rng = np.random.default_rng(0)
    steps = np.arange(1, 401)
    families = ["digits_mlp32", "digits_mlp16x16", "fashion_mnist_mlp32"]
    loss = {
        family: (steps.tolist(), (1.2 + index * 0.3 + np.exp(-steps / 90) + rng.normal(0, 0.1, 400)).tolist())
        for index, family in enumerate(families)
    }
    seconds = np.linspace(0, 1100, 120)
    fields = {
        "run": "digits-celo-phase1",
        "lopt": "celo",
        "state": "finished",
        "written": "23 November 2026, 10:14 UTC",
        "meta_steps": 400,
        "planned_meta_steps": 400,
        "seconds": 1104.2,
        "workers_replaced": 1,
        "received": dict(zip(families, (612, 598, 403), strict=True)),
        "applied": dict(zip(families, (605, 592, 403), strict=True)),
        "dropped": {families[0]: {"stale": 6, "duplicate": 1}, families[1]: {"stale": 5}},
        "waiting": 1,
        "inner_steps": dict(zip(families, (3_060_000, 2_990_000, 2_015_000), strict=True)),
        "meta_loss": loss,
        "scores": {
            v: scores(f, s)
            for v, f, s in ((0, 0.18, 0.0), (100, 0.62, 0.0), (200, 0.94, 0.6), (300, 1.07, 1.2), (400, 1.16, 1.42))
        },
        "tasks": [panel("digits_mlp48x48_tanh"), panel("digits_mlp24_gelu", 0.37)],
        "evaluations": Books(added=36, done=30, leased=0, waiting=0, dead=0, skipped=6),
        "schedule": {
            f"loss falling, {n} steps": (
                np.linspace(0, 1, 50).tolist(),
                (np.cos(np.linspace(0, 1.4, 50)) * n / 200).tolist(),
            )
            for n in (100, 300)
        },
        "staleness": {0: 700, 1: 640, 2: 190, 3: 50, 4: 22, 5: 11},
        "throughput": (seconds.tolist(), (1.45 + rng.normal(0, 0.1, 120)).tolist()),
        "workers": {
            "alive": ([0, 10, 400, 412, 1100], [0, 4, 3, 4, 4]),
            "desired": ([0, 1100], [4, 4]),
        },
        "config": "run:\n  name: digits-celo-phase1\n  seed: 0\nlopt:\n  name: celo\n  arguments:\n    phase: 1\n",
        "usage": 'import lopt\nopt = lopt.load("optimizer.safetensors")(model.parameters(), num_steps=300)\n'
        "opt.step(loss=loss)",
    }
    return ReportData(**{**fields, **changes})


@pytest.fixture(scope="module")
def page():
    return render(full())


class Page(HTMLParser):
    """Well-formedness (every element closed in order), ids and links of a page."""

    VOID = frozenset(["meta", "link", "br", "line", "path", "use", "rect"])

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.refs.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def prose(text):
    """The page without its figures, spaces made plain."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text.replace("\N{NARROW NO-BREAK SPACE}", " "))


def test_a_finished_run_tells_its_verdict_and_its_numbers(page):
    text = prose(page)
    assert "Better than tuned Adam" in text
    assert (
        "After 400 meta-steps, celo has a final-loss score of 1.16; tuned Adam has 1 and the untrained start 0.18."
        in text
    )
    assert "Its speed-up is 1.42: tuned Adam&#39;s final training loss takes it about 70 % of the steps." in text
    assert "<dd>400 <small>of 400</small></dd>" in text
    assert "18 min 24 s" in text
    assert "8 065 000" in text
    assert "opt.step(loss=loss)" in text
    assert "36 queued = 30 done + 0 under way + 0 waiting + 0 given up + 6 skipped" in text


def test_the_books_are_shown_by_family_and_reason_and_balance(page):
    text = prose(page)
    assert "The books balance: 1 613 received = 1 600 applied + 1 waiting + 12 dropped." in text
    assert text.index("Dropped:<br>duplicate") < text.index("Dropped:<br>stale")
    row = re.search("<td>digits_mlp32</td>(.*?)</tr>", text[text.index("The books balance") :]).group(1)
    assert re.findall(">([^<]+)</td>", row) == ["612", "605", "1", "6", "0", "3 060 000"]


@pytest.mark.parametrize(
    ("received", "applied", "waiting"),
    [({"a": 3}, {"a": 2}, 4), ({"a": 2, "b": 2}, {"a": 3, "b": 1}, 0)],
    ids=["in total", "by family"],
)
def test_books_that_do_not_balance_are_called_out(received, applied, waiting):
    data = ReportData(run="r", received=received, applied=applied, waiting=waiting)
    assert "The books do not balance:" in prose(render(data))


def test_a_run_without_anything_says_so_in_sentences():
    text = prose(render(ReportData(run="empty")))
    for sentence in (
        "Not scored yet",
        "No checkpoint has been scored",
        "No evaluation has finished.",
        "No meta-step was taken",
        "has no learned schedule",
        "No meta-gradient was received.",
    ):
        assert sentence in text
    assert "<figure" not in text


def test_a_run_interrupted_after_three_steps_shows_what_it_has():
    data = ReportData(
        run="short",
        state="interrupted",
        meta_steps=3,
        planned_meta_steps=400,
        meta_loss={"a": ([1, 2, 3], [2.3, math.nan, 2.2]), "b": ([2], [1.0]), "c": ([], [])},
        received={"a": 3, "b": 1},
        applied={"a": 3, "b": 1},
        scores={0: scores(0.18, 0.0)},
        tasks=[TaskPanel("t", untrained=results("t", 0, 2.2, 0.01)), TaskPanel("u")],
        throughput=([1.0], [0.5]),
        workers={"alive": ([], [])},
    )
    text = prose(render(data))
    assert "interrupted" in text
    assert "<dd>3 <small>of 400</small></dd>" in text
    assert "Only the untrained start has been scored" in text
    assert "Not evaluated yet." in text


@pytest.mark.parametrize(
    ("final", "untrained", "title"),
    [
        (1.3, 0.2, "Better than tuned Adam"),
        (1.01, 0.2, "Level with tuned Adam"),
        (0.7, 0.2, "Behind tuned Adam"),
        (0.2, 0.2, "Behind tuned Adam, and meta-training has not helped"),
    ],
)
def test_the_verdict_follows_the_scores(final, untrained, title):
    text = render(ReportData(run="r", scores={0: scores(untrained, 0.0), 400: scores(final, 0.0)}))
    assert f"<strong>{title}</strong>" in text
    assert "Its speed-up is 0: most runs never reach tuned Adam&#39;s final training loss." in text


def test_a_diverged_seed_is_shown():
    task = TaskPanel("t", results("t", 400, 0.3, 0.05, diverged=True), [], panel("t").yardstick)
    assert '<td class="bad">1</td>' in render(ReportData(run="r", tasks=[task]))


def test_names_are_escaped_everywhere():
    one = ([1.0, 2.0], [1.0, 2.0])
    data = full(
        run=NASTY, lopt=NASTY, state=NASTY, written=NASTY, config=NASTY, usage=NASTY, tasks=[panel(NASTY)],
        received={NASTY: 1}, applied={}, inner_steps={NASTY: 1}, dropped={NASTY: {NASTY: 1}}, waiting=0,
        meta_loss={NASTY: one}, schedule={NASTY: one}, workers={NASTY: one},
    )  # fmt: skip
    page = Page(text := render(data))
    assert "script" not in page.tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 13


@pytest.mark.parametrize("state", ["full", "empty"])
def test_the_page_is_one_well_formed_file_that_links_nowhere(page, state):
    parsed = Page(page if state == "full" else render(ReportData(run="empty")))
    assert len(set(parsed.ids)) == len(parsed.ids)
    outside = [ref for ref in parsed.refs if ref != "data:," and not ref.startswith("#")]
    assert outside == []
    assert {ref[1:] for ref in parsed.refs if ref.startswith("#")} <= set(parsed.ids)
    assert not {"script", "img", "iframe"} & set(parsed.tags)


def test_every_colour_of_a_figure_is_declared_for_light_and_dark(page):
    text = page
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark")
    for variable in set(re.findall(r"var\((--[\w-]+)\)", text)) - {"--tone"}:
        assert f"{variable}:" in light
        assert f"{variable}:" in dark
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_the_three_roles_look_the_same_in_legend_and_figures(page):
    text = page
    for role, dashes in (("trained", ""), ("adam", "6 2"), ("untrained", "2 2")):
        assert f'style="stroke: var(--{role})" stroke-width="2.4" stroke-dasharray="{dashes}"' in text
        assert text.count(f"stroke: var(--{role})") >= 5  # two legends, scores, two learning curves


def test_the_same_data_give_the_same_page_and_matplotlib_is_left_as_it_was(page):
    assert render(full()) == page
    assert dict(mpl.rcParams) == RC_PARAMS


def test_long_runs_stay_small():
    long = (list(range(100_000)), [1.0] * 100_000)
    assert len(render(ReportData(run="r", meta_loss={"a": long, "b": long}))) < 500_000


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("state", ["full", "empty"])
def test_chromium_shows_the_page_without_a_request_or_a_complaint(page, state, tmp_path):
    html, shot, log = tmp_path / "report.html", tmp_path / "shot.png", tmp_path / "net.json"
    html.write_text(page if state == "full" else render(ReportData(run="empty")), encoding="utf-8")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--net-log-capture-mode=Default",
        "--window-size=1200,1600", "--virtual-time-budget=12000", f"--screenshot={shot}",
    ]  # fmt: skip
    run = subprocess.run([CHROMIUM, *flags, html.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in run.stderr.splitlines() if "CONSOLE" in line] == []
    # Chromium itself calls home ("not an origin"); a page from a file has the opaque origin "null"
    assert '"initiator":"null"' not in log.read_text()
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
    assert pixels.std() > 5
