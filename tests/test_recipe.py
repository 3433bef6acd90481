"""benchmarks/recipe.py: the report is of the runs in the folders, and what is missing is computed once."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import lopt
from configs.checks import ConfigError
from deploy.config import from_yaml, load, to_yaml
from evaluator.results import TaskResult
from learner.checkpoints import CheckpointStore, Owner
from learner.start import build_lopt

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "recipe.py"
spec = importlib.util.spec_from_file_location("benchmarks_recipe", SCRIPT)
recipe = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = recipe
spec.loader.exec_module(recipe)

TASKS = {
    "small": {"num_steps": 10, "task": {"kind": "image_mlp", "dataset": "digits", "hidden": [3], "batch_size": 8}},
    "other": {"num_steps": 12, "task": {"kind": "image_mlp", "dataset": "digits", "hidden": [2], "batch_size": 8}},
}


def finished_run(root, name, phase, versions, start):
    """A run's folder as ``paceline train`` leaves it: checkpoints of drawn thetas and a diary that starts at
    ``start``."""
    init = "/nowhere" if phase == 2 else "null"
    config = load(
        [
            f"lopt=celo_phase{phase}", f"lopt.init_from={init}", f"run.name={name}", f"storage.root={root}",
            "evaluation.seeds=2", "evaluation=embedded", f"evaluation.tasks={json.dumps(TASKS).replace(chr(34), '')}",
        ]
    )  # fmt: skip
    rule = build_lopt(config)
    store = CheckpointStore(str(root), name, {})
    lease = store.acquire(Owner("test", "host", 1), 0.0)
    for version in versions:
        theta = rule.init_theta(torch.Generator().manual_seed(version + 100 * phase))
        store.save(lease, version, {"theta": lopt.encode(rule, theta, {"run": name, "version": version})}, {})
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [
        {
            "version": version,
            "time": start + 2.0 * version + (1000.0 if version > 3 else 0.0),
            "incarnation": 1 if version <= 3 else 2,
            "meta_loss": {"digits_mlp32": 2.0 / version},
            "inner_steps": 800 * version,
            "applied": 4 * version,
            "dropped": {"stale": 1},
            "workers": {"desired": 2, "alive": 2, "replaced": 1},
        }
        for version in range(1, max(versions) + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path):
    one = finished_run(tmp_path, "first", 1, [0, 2, 4, 6], 100.0)
    return [one, finished_run(tmp_path, "second", 2, [0, 5], 500.0)]


def write(folders, out, **changes):
    settings = {
        "data_root": None, "trials": [], "every": 4, "seeds": None, "processes": 1, "authors": "celo_authors",
        "preset": None,
    }  # fmt: skip
    recipe.report(folders, out, **(settings | changes))
    return out.read_text()


def table(text, first):
    """Rows below the heading whose first column is ``first``."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_report_has_every_phase_checkpoint_and_contestant_and_computes_each_result_once(folders, tmp_path, capsys):
    out, preset = tmp_path / "docs" / "recipe.md", tmp_path / "best.safetensors"
    text = write(folders, out, preset=preset)
    assert "0 results found, 22 to compute" in capsys.readouterr().out, "2 tasks x (2 seeds x 5 contestants + Adam)"

    first, second = table(text, "run")
    assert first[:5] == ["`first`", "6", "0.1 min", "0.0 M", "500"], "8 s of 2 s steps: a restart's gap is left out"
    assert second[0] == "`second`"
    along = [row[:2] for row in table(text, "optimizer")]
    assert along == [["first", "4"], ["first", "6"], ["second", "5"]]
    rows = table(text[text.index("## On tasks that nobody saw") :], "optimizer")
    names = [row[0] for row in rows]
    assert [names[0], names[1], *names[-3:]] == [
        "first", "second", "untrained start", "Celo's authors' weights", "tuned Adam"
    ]  # fmt: skip
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])
    losses = table(text, "task")
    assert [row[0] for row in losses] == ["small", "other"]

    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (out.parent / name).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"\]\(\w+\.png\)", text)) == 3
    again = write(folders, out)
    assert "22 results found, 0 to compute" in capsys.readouterr().out
    assert again == text

    _, theta, provenance = lopt.read(str(preset))
    iqms = {(row[0], row[1]): float(row[2]) for row in table(text, "optimizer")}
    assert iqms[provenance["run"], str(provenance["version"])] == max(iqms.values())
    assert provenance["scores"]["final_loss"]["iqm"] == pytest.approx(max(iqms.values()), abs=6e-4)
    store = CheckpointStore(str(tmp_path), provenance["run"], {})
    (best,) = [found for found in store.list() if found.version == provenance["version"]]
    kept = lopt.decode(store.read(best, "theta"))[1]
    assert all(torch.equal(theta[name], kept[name]) for name in kept)


def test_a_number_of_the_page_is_the_mean_of_what_was_measured(folders, tmp_path):
    text = write(folders[:1], tmp_path / "recipe.md", every=100)
    config = from_yaml((folders[0] / "config.yaml").read_text())
    store = CheckpointStore(str(tmp_path), "first", {})
    (checkpoint,) = [found for found in store.list() if found.version == 6]
    digest = checkpoint.blobs["theta"].digest
    paths = [path for path in store.list_files("results") if f"/{digest}/small/" in path]
    losses = [TaskResult.from_json(store.read_file(path)).test_loss for path in paths]
    assert len(losses) == config.evaluation.seeds == 2
    row = table(text, "task")[0]
    assert row[1].startswith(f"{sum(losses) / 2:.4f} ±")


def test_what_a_later_run_left_in_its_store_is_used(folders, tmp_path, capsys):
    write([folders[1]], tmp_path / "second.md", every=100)
    capsys.readouterr()
    write(folders, tmp_path / "recipe.md", every=100)
    assert "10 results found, 8 to compute" in capsys.readouterr().out, "Adam's, the authors' and the second run's"


def test_shorter_runs_are_scored_and_shown_with_their_setting(folders, tmp_path):
    text = write(folders[:1], tmp_path / "recipe.md", every=100, trials=[folders[1]])
    (row,) = table(text[text.index("## What was compared before") :], "run")
    assert row[:4] == ["`second`", "none", "0.400", "5"], "the loss of the last of 5 meta-steps"


def test_more_seeds_than_the_run_had_are_computed(folders, tmp_path, capsys):
    write(folders[:1], tmp_path / "recipe.md", every=100)
    capsys.readouterr()
    assert "3 seeds each" in write(folders[:1], tmp_path / "recipe.md", every=100, seeds=3)
    assert "12 results found, 8 to compute" in capsys.readouterr().out, "one seed more of three, and Adam's"


def test_a_run_without_tasks_to_score_on_is_refused(folders):
    config = recipe.Phase.read(folders[0]).config
    empty = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tasks={}))
    with pytest.raises(ConfigError, match=r"evaluation\.tasks"):
        recipe._evaluated(empty, None, None)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"config\.yaml"):
        recipe.Phase.read(tmp_path)
