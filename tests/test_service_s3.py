"""A run whose store is a real S3 server: trained, killed, continued, evaluated."""

import pytest
import torch

import lopt
from learner.checkpoints import CheckpointStore
from tests.launch import TINY_EVALUATION, balanced, cli, launched

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.chaos]


def on(seaweed):
    """Overrides and environment of a run that stores on this server."""
    environment = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    return [f"storage.root={seaweed.root}/runs", f"storage.options.endpoint_url={seaweed.endpoint}"], environment


def test_a_run_on_s3_survives_its_death_and_is_evaluated(tmp_path, seaweed):
    remote, environment = on(seaweed)
    remote += ["run.meta_steps=60", *TINY_EVALUATION]
    with launched(tmp_path, "remote", *remote, environment=environment) as launch:
        launch.wait_for(lambda s: s.version >= 12 and s.checkpoint is not None, what="a checkpoint on S3")
        launch.end()
    store = CheckpointStore(f"{seaweed.root}/runs", "remote", seaweed.options)
    saved = store.latest().version
    assert 10 <= saved < 60

    with launched(tmp_path, "remote", *remote, environment=environment) as launch:
        status = launch.wait_for(lambda s: s.version > saved, what="meta-steps after the restart")
        assert status.incarnation == 2
        assert balanced(status)
        assert launch.wait() == 0, launch.text
        assert "speed-up IQM" in launch.text
    final = store.latest()
    assert final.version == 60
    (_, exported, origin), (_, theta, _) = map(
        lopt.decode, (store.read_file("optimizer.safetensors"), store.read(final, "theta"))
    )
    assert all(torch.equal(exported[name], theta[name]) for name in theta)
    assert origin["version"] == 60
    assert origin["scores"]["final_loss"]["iqm"] >= 0
    assert {"code", "data", "config", "run"} <= origin.keys()
    results = [path for path in store.list_files("results") if final.blobs["theta"].digest in path]
    assert len(results) == 2
    assert (tmp_path / "runs/remote/report.html").exists()


def test_training_goes_on_while_the_store_is_away_and_is_saved_when_it_is_back(tmp_path, seaweed):
    remote, environment = on(seaweed)
    remote += ["run.meta_steps=100000"]
    with launched(tmp_path, "outage", *remote, environment=environment) as launch:
        launch.wait_for(lambda s: s.checkpoint is not None and s.checkpoint.version >= 5, what="a checkpoint on S3")
        seaweed.kill()
        away = launch.status()
        status = launch.wait_for(lambda s: s.version > away.version + 6, what="meta-steps without a store")
        assert balanced(status)
        for command in ("checkpoint", "stop"):
            code, text = cli(command, "outage", "--log-dir", f"{tmp_path}/runs", seconds=90)
            assert code == 1
            assert "could not be saved" in text
        seaweed.start()
        launch.wait_for(lambda s: s.checkpoint.version > status.version, what="a checkpoint after the outage")
        assert cli("stop", "outage", "--log-dir", f"{tmp_path}/runs")[0] == 0
        assert launch.wait(90) == 0, launch.text
    assert CheckpointStore(f"{seaweed.root}/runs", "outage", seaweed.options).latest().version > status.version
