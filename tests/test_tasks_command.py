"""``paceline tasks``: what it prints is computed, what it draws can be pasted, and every mistake gets one sentence."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from deploy import task_facts
from deploy.tasks import tasks_app
from tasks.families import FAMILIES
from tasks.fixed import fixed_task
from tasks.static import static_from_dict
from tasks.suites import SUITES

PAGE = Path(__file__).parent.parent / "docs/tasks.md"
MLP = "Embedded_ImageMLP_FashionMnist_Relu128x128"


def call(*words, code=0):
    """What the command prints on stdout, and on stderr."""
    result = CliRunner().invoke(tasks_app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stdout, result.stderr


def answer(*words):
    return json.loads(call(*words, "--json")[0])


def refusal(*words):
    """The one line that a mistake gets."""
    out, error = call(*words, code=1)
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_list_has_every_task_of_a_suite_with_its_work_and_says_what_is_missing():
    listed = answer("list", "--suite", "celo17")
    rows = {row["name"]: row for row in listed["tasks"]}
    assert tuple(rows) == SUITES["celo17"]
    row = rows["Conv_Cifar10_32x64x64"]
    work = fixed_task("Conv_Cifar10_32x64x64").work()
    assert (row["parameters"], row["forward_flops"]) == (work.parameters, work.flops)
    assert (row["data"], row["missing"]) == (["cifar10"], ["cifar10"])
    assert {"celo17", "velodrome", "quick67"} <= set(row["suites"])
    assert listed["missing"]["cifar10"]


def test_what_is_embedded_is_never_missing():
    assert answer("list", "--suite", "embedded17")["missing"] == {}


def test_the_table_of_all_tasks_names_the_suites():
    text = call("list")[0]
    assert "Resnet_MultiRuntime_10" in text
    assert "imagenet64 (missing)" in text
    assert f"velodrome ({len(SUITES['velodrome'])})" in text


def test_show_counts_parameters_and_work_and_measures_the_first_loss():
    shown = answer("show", MLP, "--run")
    static = fixed_task(MLP)
    sizes = [math.prod(shape) for shape in shown["tensors"].values()]
    assert shown["parameters"] == sum(sizes) == static.work().parameters
    assert shown["step_flops"] == 3 * shown["forward_flops"] == 3 * static.work().flops
    assert shown["bytes"] == static.work().bytes
    assert static_from_dict(shown["config"]) == static
    assert shown["digest"] == static.digest()
    assert [(data["name"], data["missing"]) for data in shown["data"]] == [("digits", None)]
    first = shown["first_loss"]
    assert first["data"] == "train"
    assert first["mean"] == pytest.approx(math.log(10), abs=0.3)
    assert first["deviation"] > 0
    assert first["meta_loss"] <= first["worst_meta_loss"]


def test_without_the_data_the_first_loss_is_of_random_data_and_the_reason_is_shown():
    shown = answer("show", "ImageMLP_Cifar10_8_Relu32", "--run")
    assert shown["first_loss"]["data"] == "random"
    assert shown["data"][0]["missing"]
    text = call("show", "ImageMLP_Cifar10_8_Relu32")[0]
    assert "missing: " in text
    assert "first loss" not in text


def test_the_page_for_people_has_config_numbers_and_tensors(monkeypatch):
    monkeypatch.setattr("deploy.tasks._seconds", lambda static, table: 1.5e-4)
    text = call("show", MLP, "--run")[0]
    assert "kind: image_mlp" in text
    assert "0.00015 s per step and particle" in text
    work = fixed_task(MLP).work()
    assert f"{work.parameters:,} in 6 tensors" in text
    assert f"3 x {task_facts.amount(work.flops)}" in text
    assert "64 x 10" in text
    assert "at worst" in text


def test_a_time_that_was_not_measured_is_not_invented(monkeypatch):
    monkeypatch.setattr("deploy.tasks._seconds", lambda static, table: None)
    assert "not measured" in call("show", MLP)[0]


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("ESWrapped_8pair_ImageMLP_Mnist_128x128x128_Relu", 17),
        ("LOptPES_Adafac_Fashion_OuterBS4_Length50_Trunc5", 2),
        ("LOpt_MLPLOpt_FahionMnist_10", 3),
    ],
)
def test_what_a_gradient_costs_follows_from_how_it_is_made(name, passes):
    assert task_facts.forward_passes(fixed_task(name)) == passes


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1234, "1.23 k"), (5.67e6, "5.67 M"), (8e9, "8 G"), (3e16, "3e+04 T")]
)
def test_amounts_have_three_digits(number, text):
    assert task_facts.amount(number) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 30, "5 GiB")])
def test_sizes_are_in_binary_units(number, text):
    assert task_facts.size(number) == text


def test_a_config_can_be_written_inline_or_in_a_file(tmp_path):
    words = ["kind=image_mlp", "hidden=[16,16]", "noise=1e-1", "activation=tanh"]
    inline = answer("show", *words)
    assert (inline["config"]["hidden"], inline["config"]["noise"]) == ([16, 16], 0.1)
    path = tmp_path / "mine.yaml"
    path.write_text("kind: image_mlp\nhidden: [16, 16]\nnoise: 1e-1\nactivation: tanh\n")
    assert answer("show", path)["digest"] == inline["digest"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_drawn_from_shown_and_pasted(family):
    printed = yaml.safe_load(call("draw", "--families", family, "--count", "2", "--seed", "3")[0])
    assert list(printed) == [f"{family}_0", f"{family}_1"]
    statics = [static_from_dict(entry["task"]) for entry in printed.values()]
    assert statics[0] != statics[1]
    assert [static.to_dict() for static in statics] == list(
        answer("draw", "--families", family, "--count", "2", "--seed", "3").values()
    )


def test_a_family_is_shown_by_a_draw_that_the_seed_decides():
    first = answer("show", "image_mlp", "--seed", "5")
    assert first["config"] == answer("draw", "--families", "image_mlp", "--seed", "5")["image_mlp_0"]
    assert answer("show", "image_mlp", "--seed", "6")["digest"] != first["digest"]


def test_draws_can_be_limited_to_data_that_is_there():
    drawn = answer("draw", "--images", "digits", "--texts", "pydoc/bytes", "--families", "rnn_lm,image_mlp")
    assert drawn["image_mlp_0"]["dataset"] == "digits"
    assert (drawn["rnn_lm_0"]["corpus"], drawn["rnn_lm_0"]["vocabulary"]) == ("pydoc", "bytes")


def test_images_of_the_users_own_are_read_to_be_shown(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for index in range(8):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    words = ["kind=image_mlp", f"dataset=folder:{tmp_path}", "num_classes=2"]
    shown = answer("show", *words)
    assert shown["tensors"]["w0"] == [3 * 8 * 8, 32]
    assert shown["data"][0]["title"] == "your own"


def test_timing_writes_a_table_and_goes_on_where_it_was(tmp_path):
    table = tmp_path / "here.parquet"
    words = ["time", "--out", table, "--families", "image_mlp"]
    assert answer(*words, "--count", "1")["rows"] == 1
    before = table.stat().st_mtime_ns
    from tasks.timing.table import read_table

    (first,) = read_table(table)
    assert answer(*words, "--count", "2")["rows"] == 2
    assert table.stat().st_mtime_ns > before
    assert read_table(table)[0] == first
    assert "image_mlp" in call(*words, "--count", "2")[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "Conv_Cifar10_32x64"], "did you mean 'Conv_Cifar10_32x64x64'?"),
        (["show", "image_mpl"], "did you mean 'image_mlp'?"),
        (["show", "kind=image_mlpp"], "did you mean 'image_mlp'?"),
        (["show", "kind=image_mlp", "hiden=[3]"], "task.hiden = [3]: expected a field of image_mlp (did you mean"),
        (["show", "kind=image_mlp", "hidden=[3"], "YAML"),
        (["show", "kind=image_mlp", "image_size=two"], "task.image_size = 'two': expected a whole number"),
        (["show", "no/such.yaml"], "no/such.yaml"),
        (["show", MLP, "--seed", "1"], "the name of a family"),
        (["show", MLP, "twice"], "one name"),
        (["show", MLP, "--table", "tpu"], "table = 'tpu'"),
        (["list", "--suite", "celo71"], "did you mean 'celo17'?"),
        (["draw", "--families", "resnets"], "did you mean 'resnet'?"),
        (["draw", "--images", "cifar"], "did you mean 'cifar10'?"),
        (["draw", "--texts", "pydoc"], "corpus/vocabulary"),
        (["draw", "--ranges", "papper"], "did you mean 'paper'?"),
        (["time", "--out", "table.csv"], ".parquet"),
        (["time", "--out", "table.parquet", "--device", "cudda"], "device = 'cudda'"),
    ],
)
def test_a_mistake_gets_one_sentence(words, says):
    assert says in refusal(*words)


def test_the_commands_of_the_page_work():
    lines = re.findall(r"^paceline tasks ([^#\n]+)", PAGE.read_text(), flags=re.MULTILINE)
    assert len(lines) == 6
    for words in (shlex.split(line) for line in lines):
        if words[0] != "time":
            call(*[MLP if word == "NAME" else word for word in words])


def test_a_file_that_is_no_task_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- a\n- b\n")
    assert "a mapping with kind" in refusal("show", path)
    path.write_text("kind: image_mlp\nkind: vit\n")
    assert "YAML" in refusal("show", path)


def test_what_never_fits_is_given_up(monkeypatch):
    monkeypatch.setattr("deploy.tasks.TRIES", 3)
    from configs.checks import ConfigError

    def impossible(rng, pool):
        raise ConfigError("patch_size", 8, "at most 4")

    monkeypatch.setitem(FAMILIES, "vit", FAMILIES["vit"]._replace(draw=impossible))
    assert "3 draws were impossible, the last: patch_size = 8" in refusal("draw", "--families", "vit")
