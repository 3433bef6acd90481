"""Storage that cannot be used says why in one sentence; learners and servers that are killed lose nothing saved."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

import learner.checkpoints
from learner.checkpoints import CheckpointStore, Owner, StoreError
from tests.seaweed import SeaweedServer
from tests.stores import NOW, THETA, owner, save


@pytest.fixture(autouse=True)
def _new_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client and no credentials from elsewhere."""
    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")


def refusal(root: str, options: dict[str, str] | None = None) -> str:
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        CheckpointStore(root, "run", options).check()
    assert time.monotonic() - began < 15
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(str(tmp_path / "file")) == f"{tmp_path}/file is a file; storage needs a directory there"
    assert refusal(f"file://{tmp_path}/file/below").endswith("file is a file; storage needs a directory there")


def test_a_directory_that_cannot_be_written_is_named() -> None:
    assert refusal("/proc/paceline").startswith("cannot write /proc/paceline: ")  # not even root may
    assert refusal("/sys/kernel").startswith("cannot write /sys/kernel/run: ")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(str(tmp_path)) == f"cannot write {tmp_path}/run: No space left on device"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("root", "options", "expected"),
    [
        ("gs://bucket", {}, r"storage root 'gs://bucket': .* known for file://, s3://, memory:// and plain paths only"),
        ("s4://bucket", {}, r"did you mean 's3'"),
        ("s3://", {}, r"expected s3://bucket"),
        ("", {}, "expected a directory"),
        ("s3://bucket", {"endpoint": "x"}, r"storage option 'endpoint': .*did you mean 'endpoint_url'"),
        ("s3://bucket", {"endpoint_url": "localhost:9000"}, r"endpoint_url = 'localhost:9000': expected http://"),
        ("runs", {"region": "x"}, r"storage options \['region'\]: expected none for 'runs'"),
    ],
)
def test_a_root_that_cannot_work_is_refused_before_anything_is_done(
    root: str, options: dict[str, str], expected: str
) -> None:
    with pytest.raises(StoreError, match=expected):
        CheckpointStore(root, "run", options)
    with pytest.raises(StoreError, match=r"run\.name = '\.\./x'"):
        CheckpointStore(root, "../x")


def test_nobody_listening_is_said_to_be_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    text = refusal("s3://bucket", {"endpoint_url": "http://127.0.0.1:1", "region": "us-east-1"})
    assert text.startswith("s3://bucket/run: cannot reach http://127.0.0.1:1 (storage.options.endpoint_url)")


def test_a_server_that_never_answers_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(learner.checkpoints, "CHECK_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        text = refusal("s3://bucket", {"endpoint_url": endpoint, "region": "us-east-1"})
    assert text.endswith(f"cannot reach {endpoint} (storage.options.endpoint_url): no answer within 1 s")


@pytest.mark.s3
def test_a_missing_bucket_is_named(seaweed: SeaweedServer) -> None:
    text = refusal("s3://no-such-bucket/runs", seaweed.options)
    assert text.startswith(
        f"s3://no-such-bucket/runs/run: no bucket 'no-such-bucket' at {seaweed.endpoint}; create it first"
    )
    with pytest.raises(StoreError, match="no bucket 'no-such-bucket'"):
        CheckpointStore("s3://no-such-bucket", "run", seaweed.options).read_file("results/x")


@pytest.mark.s3
def test_a_write_whose_answer_was_lost_and_that_is_repeated_counts_as_done(
    seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(seaweed.root, "lost-answers", seaweed.options)
    call = store._storage._call

    def twice(method: str, **arguments: Any) -> Any:  # as botocore does when the first answer does not arrive
        if method == "put_object":
            call(method, **arguments)
        return call(method, **arguments)

    monkeypatch.setattr(store._storage, "_call", twice)
    lease = store.renew(store.acquire(owner(), NOW), NOW + 1)
    saved = save(store, lease, 1, 2)
    store.release(lease)
    assert CheckpointStore(seaweed.root, "lost-answers", seaweed.options).latest() == saved


@pytest.mark.s3
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_said_to_be_refused(
    seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "wrong")
    assert "refused the credentials" in refusal(seaweed.root, seaweed.options)


@pytest.mark.s3
def test_missing_credentials_are_said_to_be_missing(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal(seaweed.root, seaweed.options)


@pytest.mark.s3
@pytest.mark.chaos
@pytest.mark.slow
def test_checkpoints_acknowledged_by_a_server_survive_its_being_killed_while_saving(seaweed: SeaweedServer) -> None:
    store = CheckpointStore(seaweed.root, "killed-server", seaweed.options)
    lease = store.acquire(owner(), NOW)
    acknowledged: list[int] = []
    failed, three = threading.Event(), threading.Event()

    def work() -> None:
        for version in range(10_000):
            try:
                save(store, lease, version)
            except StoreError:
                failed.set()
                return
            acknowledged.append(version)
            if version == 3:
                three.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert three.wait(timeout=60)
    seaweed.kill()
    try:
        assert failed.wait(timeout=120)  # not a hang
    finally:
        seaweed.start()
    thread.join(timeout=10)
    reader = CheckpointStore(seaweed.root, "killed-server", seaweed.options)
    found = reader.latest()
    assert found is not None
    assert found.version in (acknowledged[-1], acknowledged[-1] + 1)
    assert reader.damaged_found == []
    assert {item.version for item in reader.list()} >= set(acknowledged)
    for item in reader.list():
        assert reader.read(item, "theta") == THETA % item.version
    assert save(store, lease, acknowledged[-1] + 1) == reader.latest()  # the same learner goes on
    store.check()


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(8))
def test_a_learner_killed_while_saving_loses_nothing_it_acknowledged(tmp_path: Path, seed: int) -> None:
    code = (
        "import os, sys, time\n"
        "from learner.checkpoints import CheckpointStore, Owner\n"
        "store = CheckpointStore(sys.argv[1], 'run')\n"
        "lease = store.acquire(Owner(str(os.getpid()), 'this-host', os.getpid()), time.time())\n"
        "found = store.latest()\n"
        "version = found.version if found else 0\n"
        "while True:\n"
        "    version += 1\n"
        "    store.save(lease, version, {'theta': (b'theta of version %d' % version) * 1000}, {})\n"
        "    print(version, flush=True)\n"
        "    if version % 5 == 0: store.retain(2, 1000, [])\n"
    )
    rng, last = random.Random(seed), 0
    for incarnation in (1, 2, 3):
        command = [sys.executable, "-c", code, str(tmp_path)]
        child = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(rng.randrange(1, 12)):
            last = int(child.stdout.readline())
        time.sleep(rng.random() * 0.01)  # somewhere inside one of the next saves
        child.kill()
        last = int(([b"%d" % last, *child.stdout.read().split()])[-1])
        child.wait(timeout=30)
        reader = CheckpointStore(str(tmp_path), "run")
        found = reader.latest()
        assert found is not None
        assert found.version in (last, last + 1)
        assert (found.incarnation, reader.damaged_found) == (incarnation, [])
        assert reader.read(found, "theta") == (THETA % found.version) * 1000
        for item in reader.list():
            assert reader.read(item, "theta") == (THETA % item.version) * 1000


def test_files_of_a_killed_writer_are_swept_once_they_are_old(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "run")
    lease = store.acquire(Owner("launch", "host", os.getpid()), NOW)
    save(store, lease, 1)
    old, new = tmp_path / "run/.tmp/old", tmp_path / "run/.tmp/new"
    old.write_bytes(b"half")
    shutil.copy(old, new)
    os.utime(old, (0, 0))
    store.retain(1, 1, [])
    assert list((tmp_path / "run/.tmp").iterdir()) == [new]
