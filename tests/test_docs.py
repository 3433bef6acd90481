"""What the documentation says is so: its examples run, its numbers are computed, its links lead somewhere."""

import re
import shutil
from pathlib import Path

import pytest

import lopt
from lopt.checkpoint import ARCHITECTURES
from lopt.interchange.reading import PRESETS, presets
from lopt.per_parameter import PerParameterRule

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/optimizers.md").read_text()
PAGES = ["README.md", "docs/optimizers.md", "docs/architecture.md", "docs/tasks.md", "docs/tasks_table.md"]
BLOCK = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MOST_NOT_RUN = 5
"""Blocks of the page on optimizers that need a network, other processes or others' files."""
HEADINGS = ["name", "class", "meta-parameters", "needs", "state bytes per parameter", "paper", "preset"]


def table(text, first):
    """Rows of the table whose first column is called ``first``, each a dict by column."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


ROWS = {re.match(r"\[(\w+)\]", row["name"])[1]: row for row in table(PAGE, "name")}


def sections():
    """Text of every section of the page by its title, whatever its level."""
    outside = BLOCK.sub(lambda block: re.sub("^#", " ", block[0], flags=re.MULTILINE), PAGE)
    parts = re.split(r"^#{2,3} (.+)$", outside, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run(page, namespace):
    """Execute the page's Python in order, with errors that show the line of the page."""
    text = (ROOT / page).read_text()
    for block in BLOCK.finditer(text):
        assert block["mark"] in ("", " no-run"), f"{page}: unknown mark {block['mark']!r}"
        code = compile("\n" * text[: block.start("code")].count("\n") + block["code"], page, "exec")
        if not block["mark"]:
            exec(code, namespace)


def test_the_examples_for_practitioners_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    run("docs/optimizers.md", namespace)
    assert "35,649 trainable" in capsys.readouterr().out
    assert sum(block["mark"] == " no-run" for block in BLOCK.finditer(PAGE)) <= MOST_NOT_RUN


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quick").mkdir(parents=True)
    shutil.copy(PRESETS / "celo.safetensors", "runs/quick/optimizer.safetensors")
    namespace = {}
    first = BLOCK.search(PAGE)
    exec(first["code"], namespace)  # the model and the closure
    run("README.md", namespace)
    assert namespace["opt"].progress["steps"] > 0


def test_every_architecture_has_a_row_with_the_numbers_that_describe_computes():
    assert list(ROWS) == list(ARCHITECTURES)
    for name, row in ROWS.items():
        description = lopt.describe(name)
        frozen = f" + {description.frozen:,}" if description.frozen else ""
        wants = {"loss": description.needs_loss, "num_steps": description.needs_horizon}
        found = {
            "class": ARCHITECTURES[name].__name__,
            "meta-parameters": f"{description.trainable:,}{frozen}",
            "needs": ", ".join(what for what, needed in wants.items() if needed) or "–",
            "state bytes per parameter": f"{description.state_bytes_per_parameter:.2f}",
            "preset": name if name in presets() else "",
        }
        assert {column: row[column].strip("`") for column in found} == found, name
        assert list(row) == HEADINGS


def test_a_row_names_the_paper_and_links_to_it():
    for name, row in ROWS.items():
        authors_and_year = re.match(r".*? \d{4}", ARCHITECTURES[name].paper)[0]
        number = re.search(r"(?:arXiv|doi):(\S+)$", ARCHITECTURES[name].paper)
        assert authors_and_year in row["paper"], name
        assert number is None or f"/{number[1]})" in row["paper"], name


def test_the_classes_are_where_the_page_says():
    hand_designed = False
    for name, row in ROWS.items():
        hand_designed |= name == "sgd"
        module = lopt.hand_designed if hand_designed else lopt
        assert getattr(module, row["class"].strip("`")) is ARCHITECTURES[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_section_with_an_example_of_its_own(name):
    section = sections()[name]
    paragraph, *blocks = section.split("```python\n")
    assert len(paragraph.split()) >= 5
    names = {ARCHITECTURES[name].__name__ + "(", f'lopt.load("{name}")'}
    assert any(used in block.partition("```")[0] for block in blocks for used in names)


def test_the_table_of_what_parameters_on_several_processes_cost_is_complete():
    first, second, _ = (set(row["rules"].split(", ")) for row in table(PAGE, "rules"))
    rules = {name: kind(**{"phase": 2} if name == "celo" else {}) for name, kind in ARCHITECTURES.items()}
    assert first == {name for name, rule in rules.items() if isinstance(rule, PerParameterRule)}
    assert second == {name for name, rule in rules.items() if rule.elementwise}


def test_the_readme_counts_the_optimizers():
    assert f"There are {len(ARCHITECTURES)} optimizers" in (ROOT / "README.md").read_text()


def test_the_map_of_lopt_names_every_module_once():
    text = (ROOT / "docs/architecture.md").read_text()
    named = [name for row in table(text, "modules") for name in re.findall(r"`([\w/]+)`", row["modules"])]
    modules = {path.stem for path in (ROOT / "lopt").glob("[!_]*.py")}
    packages = {f"{path.parent.name}/" for path in (ROOT / "lopt").glob("*/__init__.py")}
    assert modules | packages == set(named)
    assert len(named) == len(set(named))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_sections_that_exist(page):
    text = BLOCK.sub("", (ROOT / page).read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets or page == "docs/architecture.md"
    for target in targets:
        file, _, section = target.partition("#")
        if file.startswith("http"):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE) if section else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not section or section in anchors, target


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"(?:python |`)((?:benchmarks|deploy|docs|lopt|tests)/[\w./]+)", text):
        assert (ROOT / name).exists(), name
    for group, option in re.findall(r"\b(task|lopt|estimator|experiment|cluster)=(\w+)", text):
        assert (ROOT / "configs" / group / f"{option}.yaml").exists(), f"{group}={option}"
