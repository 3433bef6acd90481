"""Wrong input ends with one paragraph that says what was wrong, exit code 1, nothing left running or overwritten."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
import torch

import lopt
from deploy import control_client
from learner.checkpoints import CheckpointStore, Owner
from tests.launch import TINY, cli, launched


@pytest.fixture
def refused(tmp_path):
    """Runs ``train`` and gives its one paragraph; asserts that it failed as it should."""

    def run(*overrides, seconds=60):
        where = [f"run.log_dir={tmp_path}/runs", f"storage.root={tmp_path}/runs"]
        before = snapshot(tmp_path)
        code, output = cli("train", *TINY, *where, *overrides, seconds=seconds)
        assert code == 1, output
        assert "Traceback" not in output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before, "something was overwritten"
        return errors[0]

    return run


def snapshot(directory):
    """Content hashes of everything below but a run's lease and pointer, which a refused learner may stamp."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).rglob("*")
        if path.is_file() and path.name not in ("lease.json", "LATEST", "quick.targets.json")
    }


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("experiment=quik", ["experiment", "quik", "did you mean 'quick'"]),
        ("lopt=cello_phase1", ["lopt", "did you mean 'celo_phase1'"]),
        ("task=digit", ["task", "did you mean 'digits'"]),
        ("estimator.num_tasks=0", ["estimator.num_tasks", "0", ">= 1"]),
        ("estimator.widnow=3", ["widnow", "did you mean 'window'"]),
        ("task.families.tiny.task.batch_size=-4", ["task.families.tiny.task.batch_size", "-4"]),
        ("meta_optimizer.learning_rate=nan", ["meta_optimizer.learning_rate", "nan"]),
        ("cluster.num_workers=0", ["cluster.num_workers", "0"]),
        ("run.name=../up", ["run.name", "../up"]),
    ],
)
def test_configuration(refused, override, parts):
    error = refused(override)
    assert all(part in error for part in parts), error


def test_data_that_is_missing_or_truncated(refused, tmp_path):
    family = "task.families={big: {task: {kind: image_mlp, dataset: mnist, hidden: [4]}}}"
    assert "root" in refused(family)
    assert str(tmp_path / "nowhere") in refused(family, f"task.data.root={tmp_path}/nowhere")
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (folder / name).write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 28, 0, 0, 0, 28, 1, 2, 3]))
    error = refused(family, f"task.data.root={tmp_path}/data", f"task.data.cache={tmp_path}/cache")
    assert "ubyte" in error


def test_stores_that_cannot_be_used(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(f"storage.root={tmp_path}/file")
    assert "/proc" in refused("storage.root=/proc/paceline")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
        remote = ["storage.root=s3://bucket/x", f"storage.options.endpoint_url={dead}"]
        monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
        assert "AWS_ACCESS_KEY_ID" in refused(*remote)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        assert dead in refused(*remote)


@pytest.mark.slow
def test_more_than_the_cluster_has(refused):
    error = refused("cluster.num_workers=4000")
    assert "cluster.num_workers = 4000" in error
    assert "the cluster has" in error
    error = refused("cluster.worker_gpus=3")
    assert "GPU" in error


def stored_run(tmp_path, rule, name="mine", version=7):
    store = CheckpointStore(f"{tmp_path}/runs", name)
    lease = store.acquire(Owner("test", socket.gethostname(), 1), 0.0)
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    meta = {"config": "", "workers": {}, "learner": {"version": version, "books": {}}}
    store.save(lease, version, {"theta": lopt.encode(rule, theta, {}), "learner": b""}, meta)
    store.release(lease)
    return store


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture(refused, tmp_path):
    store = stored_run(tmp_path, lopt.SmallFcLopt(4))
    error = refused("run.name=mine")
    assert "small_fc_lopt" in error
    assert "celo" in error
    assert store.latest().version == 7
    (tmp_path / "other.safetensors").write_bytes(store.read(store.latest(), "theta"))
    assert "small_fc_lopt" in refused(f"lopt.init_from={tmp_path}/other.safetensors")
    assert "not a safetensors file" in refused(f"lopt.init_from={__file__}")


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged(refused, tmp_path):
    store = stored_run(tmp_path, lopt.Celo(1))
    for blob in (tmp_path / "runs/mine/blobs").iterdir():
        blob.chmod(0o644)
        blob.write_bytes(b"damaged")
    error = refused("run.name=mine")
    assert "no checkpoint of run 'mine' is intact" in error
    assert "SHA-256" in error
    assert store.list()[0].version == 7


@pytest.mark.slow
def test_a_wrong_token_a_missing_run_and_a_run_that_is_over(tmp_path):
    runs = tmp_path / "runs"
    with launched(tmp_path, "guarded", "run.meta_steps=100000") as launch:
        launch.wait_for(lambda s: s.version >= 1, what="a meta-step")
        token = next((runs / "guarded" / "control").glob("*token*"))
        right = token.read_text()
        token.write_text("wrong" + right)
        code, output = cli("stop", "guarded", "--log-dir", str(runs))
        assert (code, "token" in output) == (1, True), output
        token.write_text(right)
        code, output = cli("status", "guardet", "--log-dir", str(runs))
        assert code == 1
        assert "did you mean 'guarded'" in output
        code, output = cli("stop", "guarded", "--log-dir", str(runs), "--json")
        assert code == 0, output
        version = json.loads(output)["version"]
        assert launch.wait(60) == 0, launch.text
    assert CheckpointStore(str(runs), "guarded").latest().version == version
    with pytest.raises(control_client.ControlUnavailable, match="guarded"):
        control_client.status(control_client.find("guarded", runs))
