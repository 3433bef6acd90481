"""A run as its user and its operator see it, with real processes."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import lopt
from learner.checkpoints import CheckpointStore
from tests.launch import TINY_EVALUATION, balanced, cli, cli_json, launched

pytestmark = pytest.mark.slow


def test_a_run_is_steered_interrupted_continued_and_handed_over(tmp_path):
    overrides = ["run.meta_steps=100000", *TINY_EVALUATION]
    where = ["--log-dir", f"{tmp_path}/runs"]
    with launched(tmp_path, "steered", *overrides) as launch:
        launch.wait_for(lambda s: s.version >= 2 and s.workers_alive == 2, what="two workers at work")

        for workers in (4, 1):
            assert cli_json("scale", "steered", str(workers), *where)["workers_desired"] == workers
            launch.wait_for(
                lambda s, n=workers: (s.workers_desired, s.workers_alive) == (n, n), what=f"{workers} workers"
            )
            wait_until(lambda n=workers: len(launch.find("ray::Worker")) == n, f"{workers} worker processes")
        seen = cli_json("status", "steered", *where)
        assert (seen["workers_desired"], seen["workers_alive"], seen["workers_replaced"]) == (1, 1, 0)
        code, text = cli("scale", "steered", "400", *where)
        assert code == 1
        assert "400" in text
        assert "CPU" in text

        assert cli_json("pause", "steered", *where)["state"] == "paused"
        resting = quiet_version(launch)
        assert cli_json("status", "steered", *where)["state"] == "paused"
        saved = cli_json("checkpoint", "steered", *where)
        assert saved["version"] == resting
        cli_json("resume", "steered", *where)
        status = launch.wait_for(lambda s: s.version > resting, what="steps after resume")
        assert balanced(status)

        scraped = scrape(status.learner_metrics_port)
        assert scraped['paceline_meta_gradients_received_total{family="tiny"}'] > 0
        assert scraped["paceline_workers_desired"] == 1
        launch.wait_for(lambda s: s.evaluation is not None, what="an evaluation")
        assert scrape(status.evaluator_metrics_port)["paceline_evaluated_version"] >= 0

        code, text = second_launch(tmp_path, overrides)
        assert code == 1
        assert "held by" in text
        assert balanced(launch.status()), "the first launch is unharmed"

        processes = launch.descendants()
        launch.process.send_signal(signal.SIGINT)
        assert launch.wait(60) == 130
        assert "the same command continues" in launch.text
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), "no process left behind")
    store = CheckpointStore(f"{tmp_path}/runs", "steered")
    version = store.latest().version
    assert version >= resting

    with launched(tmp_path, "steered", f"run.meta_steps={version + 10}", *TINY_EVALUATION) as launch:
        assert launch.wait() == 0, launch.text
        text = launch.text
    assert f"finished after meta-step {version + 10}" in text
    assert re.search(r"untrained +final loss IQM \d", text)
    assert re.search(r"trained +final loss IQM \d", text)
    report = (tmp_path / "runs/steered/report.html").read_text()
    assert "meta-loss" in report.lower()
    usage = "\n".join(text.strip().splitlines()[-3:])
    use = (
        "import torch; model = torch.nn.Linear(3, 2)\nclosure = lambda: model(torch.ones(1, 3)).square().sum()\n"
        + usage
    )
    subprocess.run([sys.executable, "-c", use], check=True, cwd=Path(__file__).parent.parent)
    lines = (tmp_path / "runs/steered/metrics.jsonl").read_text().splitlines()
    assert len(lines) >= version + 10
    assert list((tmp_path / "runs/steered/tensorboard").iterdir())


def second_launch(tmp_path, overrides):
    with launched(tmp_path, "steered", *overrides) as second:
        return second.wait(90), second.text


def quiet_version(launch):
    """The version once the workers' last meta-gradients are in."""
    versions = [-1]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        versions.append(launch.status().version)
        if len(versions) > 10 and len(set(versions[-10:])) == 1:
            return versions[-1]
        time.sleep(0.1)
    raise AssertionError(f"versions go on while paused: {versions[-20:]}")


def wait_until(condition, what, seconds=40.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def scrape(port):
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
    }


@pytest.mark.chaos
def test_killed_actors_come_back_and_the_result_is_whole(tmp_path, capsys):
    overrides = ["run.meta_steps=100000", "run.max_seconds=100", "estimator.window=20", *TINY_EVALUATION]
    took = {}
    with launched(tmp_path, "chaos", *overrides) as launch:
        launch.wait_for(lambda s: s.version >= 5 and s.evaluation is not None, what="work and an evaluation")

        (victim, *_) = launch.find("ray::Worker")
        took["worker"] = killed(launch, victim, "ray::Worker", 2, lambda s: s.workers_replaced >= 1)
        # an evaluator and a chief are back when a version is scored that was not scored when they died
        for who in ("Evaluator", "Chief"):
            scored = launch.status().evaluation.version
            (victim,) = launch.find(f"ray::{who}")
            took[who.lower()] = killed(
                launch,
                victim,
                f"ray::{who}",
                1,
                lambda s, old=scored: s.evaluation is not None and s.evaluation.version > old,
            )
        before = launch.status()
        took["learner"] = killed(
            launch, launch.find("ray::Learner")[0], "ray::Learner", 1, lambda s: s.incarnation > before.incarnation
        )
        resumed = launch.status()
        launch.wait_for(
            lambda s: s.version > resumed.version + 5 and balanced(s), what="steps after the learner's death"
        )
        assert launch.wait(240) == 0, launch.text
    with capsys.disabled():
        print("\nback after kill -9: " + ", ".join(f"{who} {seconds:.1f} s" for who, seconds in took.items()))

    store = CheckpointStore(f"{tmp_path}/runs", "chaos")
    final = store.latest()
    assert final.version > resumed.version + 5
    for account in final.meta["learner"]["books"].values():
        assert account["received"] == account["applied"] + account["waiting"] + sum(account["dropped"].values())
    results = store.list_files("results")
    assert sum(final.blobs["theta"].digest in path for path in results) == 2
    assert "trained" in launch.text


@pytest.mark.chaos
def test_a_chief_killed_during_the_final_evaluation_still_scores_the_last_version(tmp_path):
    slow = "evaluation.tasks.other.num_steps=1500"  # seconds, so that the chief dies in the middle of it
    with launched(tmp_path, "last", "run.meta_steps=7", *TINY_EVALUATION, slow) as launch:
        launch.wait_for(lambda s: s.state == "evaluating", what="the final evaluation")
        (chief,) = launch.find("ray::Chief")
        os.kill(chief, signal.SIGKILL)
        assert launch.wait() == 0, launch.text
        assert "(version 7)" in launch.text


def killed(launch, pid, title, count, recovered):
    """Seconds from SIGKILL until another process does the work and the run says so."""
    start = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len([p for p in launch.find(title) if p != pid]) >= count, f"a new {title}", 60)
    launch.wait_for(recovered, what=f"recovery of {title}")
    return time.monotonic() - start


SYNC = ["run.mode=sync", "worker.turns=2", "meta_optimizer.meta_batch=4", "run.meta_steps=60", "storage.every=10"]


def theta(root):
    store = CheckpointStore(f"{root}/runs", "same")
    checkpoint = store.latest()
    assert checkpoint.version == 60
    return lopt.decode(store.read(checkpoint, "theta"))[1]


def same_bits(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.chaos
def test_synchronous_runs_give_the_same_bits_repeated_with_a_killed_worker_and_resumed(tmp_path):
    thetas = {}
    for name in ("straight", "repeated", "worker killed", "resumed", "other seed"):
        directory = tmp_path / name.replace(" ", "-")
        directory.mkdir()
        overrides = [*SYNC, f"run.seed={int(name == 'other seed')}"]
        with launched(directory, "same", *overrides) as launch:
            if name == "resumed":
                launch.wait_for(lambda s: s.version >= 23, what="version 23")
                launch.end()
            elif name == "worker killed":
                launch.wait_for(lambda s: s.version >= 12, what="version 12")
                os.kill(launch.find("ray::Worker")[0], signal.SIGKILL)
            assert launch.wait() == (-signal.SIGKILL if name == "resumed" else 0), launch.text
        if name == "resumed":
            assert 20 <= CheckpointStore(f"{directory}/runs", "same").latest().version < 60
            with launched(directory, "same", *overrides) as launch:
                assert launch.wait() == 0, launch.text
        thetas[name] = theta(directory)
    for name in ("repeated", "worker killed", "resumed"):
        assert same_bits(thetas["straight"], thetas[name]), name
    assert not same_bits(thetas["straight"], thetas["other seed"])
