"""The suites have the published names and sizes, and every name is a fixed task that can be written down and built."""

import json
import re
from pathlib import Path

import pytest

import tasks.fixed
from configs.checks import ConfigError
from deploy.config import load
from tasks.augmentations import AUGMENTATIONS
from tasks.data.catalogue import CATALOGUE
from tasks.distribution import datasets_of
from tasks.families import FAMILIES as DRAWN
from tasks.fixed import MODULES, TASKS, fixed_task
from tasks.static import static_from_json
from tasks.suites import SUITES, suite
from tests import test_docs

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/tasks.md").read_text()
PUBLISHED = json.loads((ROOT / "tests/oracles/initial_losses.json").read_text())["losses"]
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
SIZES = {
    "velodrome": 84,
    "velodrome_extended": 122,
    "celo17": 17,
    "fast4": 4,
    "quick67": 67,
    "embedded17": 17,
    "fashion17": 17,
}
FAMILIES = {
    "ImageMLP": 22,
    "Conv": 9,
    "ImageMLPAE": 6,
    "Resnet": 11,
    "RNNLM": 14,
    "TransformerLM": 16,
    "VIT": 6,
    "MLPMixer": 9,
    "ESWrapped": 6,
    "LOpt": 13,
    "LOptPES": 10,
}
QUICK = {
    "ImageMLP": 16, "Resnet": 9, "TransformerLM": 9, "RNNLM": 9, "Conv": 7, "ImageMLPAE": 6, "ESWrapped": 4, "VIT": 4,
    "LOpt": 3,
}  # fmt: skip


def by_family(names):
    families = [name.split("_")[0] for name in names]
    return {family: families.count(family) for family in families}


def test_suites_have_their_sizes_and_no_name_twice():
    assert {name: len(members) for name, members in SUITES.items()} == SIZES
    assert all(len(set(members)) == len(members) for members in SUITES.values())


def test_velodrome_and_quick67_have_the_published_numbers_of_each_family():
    seven = dict(list(FAMILIES.items())[:7])
    assert by_family(SUITES["velodrome"]) == seven
    assert by_family(SUITES["velodrome_extended"]) == FAMILIES
    assert by_family(SUITES["quick67"]) == QUICK


def test_velodrome_extended_has_exactly_the_tasks_with_published_baselines_but_nerf():
    assert set(SUITES["velodrome_extended"]) == set(PUBLISHED)


def test_smaller_suites_are_parts_of_the_whole():
    whole = set(SUITES["velodrome_extended"])
    assert set(SUITES["velodrome"]) <= whole
    assert set(SUITES["quick67"]) <= whole
    assert set(SUITES["celo17"]) <= whole


@pytest.mark.parametrize("name", SUITES)
def test_every_name_of_a_suite_is_a_fixed_task(name):
    assert [member for member in suite(name) if member not in TASKS] == []


def test_no_module_takes_a_name_from_another():
    assert sum(len(module.TASKS) for module in MODULES) == len(TASKS)
    files = {path.stem for path in Path(tasks.fixed.__file__).parent.glob("[!_]*.py")}
    assert files == {module.__name__.rpartition(".")[2] for module in MODULES}


@pytest.mark.parametrize("name", TASKS)
def test_a_fixed_task_has_a_name_for_files_and_metrics_and_can_be_written_down(name):
    assert NAME.fullmatch(name)
    static = fixed_task(name)
    assert static_from_json(static.to_json()) == static
    work = static.work()
    assert work.parameters > 0
    assert work.flops > 0
    assert work.activations > 0


def test_no_two_tasks_are_the_same():
    digests = {}
    for name, static in TASKS.items():
        digests.setdefault(static.digest(), []).append(name)
    assert [names for names in digests.values() if len(names) > 1] == []


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'embedded17'"):
        suite("embeded17")
    with pytest.raises(ConfigError, match="did you mean 'Conv_Cifar10_32x64x64'"):
        fixed_task("Conv_Cifar10_32x64")


@pytest.mark.parametrize("name", ["celo17", "embedded17", "fashion17", "quick67", "velodrome"])
def test_the_evaluation_config_of_a_suite_has_its_tasks(name):
    overrides = [f"evaluation={name}", "task.data.root=/data"]
    evaluation = load(overrides).evaluation
    assert evaluation.suite == name
    assert tuple(evaluation.tasks) == SUITES[name]
    assert {task.num_steps for task in evaluation.tasks.values()} == {2000 if "17" in name else 10_000}
    assert {task.task for task in evaluation.tasks.values()} == {None}


def test_embedded17_needs_nothing_and_keeps_the_kind_of_model_of_each_of_the_17():
    for original, embedded, fashion in zip(SUITES["celo17"], SUITES["embedded17"], SUITES["fashion17"], strict=True):
        assert embedded == f"Embedded_{original}"
        assert TASKS[embedded].kind == TASKS[fashion].kind == TASKS[original].kind
        assert set(datasets_of(TASKS[embedded])) <= {"digits", "pydoc"}
        assert set(datasets_of(TASKS[fashion])) <= {"fashion_mnist", "pydoc"}
        assert TASKS[embedded].work().parameters <= TASKS[original].work().parameters


def test_the_page_has_a_row_for_every_family_augmentation_and_suite():
    names = {
        kind: [row[kind].strip("`") for row in test_docs.table(PAGE, kind)] for kind in ("family", "kind", "suite")
    }
    assert names == {"family": list(DRAWN), "kind": list(AUGMENTATIONS), "suite": list(SUITES)}
    assert {row["suite"].strip("`"): int(row["tasks"]) for row in test_docs.table(PAGE, "suite")} == SIZES


def test_the_page_names_every_data_set():
    listed = {name for row in test_docs.table(PAGE, "set") for name in re.findall(r"`([\w:]+)`", row["set"])}
    assert {name for name, entry in CATALOGUE.items() if entry.kind in ("image", "text")} <= listed


def test_adam_was_run_on_every_embedded_task_and_none_gets_near_rounding_noise():
    rows = {row["task"]: row for row in test_docs.table(PAGE, "task")}
    assert tuple(rows) == SUITES["embedded17"]
    for name, row in rows.items():
        assert int(row["parameters"].replace(",", "")) == TASKS[name].work().parameters
        assert 0.01 < float(row["last loss"]) < float(row["first loss"])


@pytest.mark.parametrize("page", ["docs/tasks.md", "docs/tasks_table.md"])
def test_the_links_of_the_pages_lead_somewhere(page):
    test_docs.test_links_lead_to_files_and_sections_that_exist(page)
    test_docs.test_commands_and_files_that_are_named_exist(page)
