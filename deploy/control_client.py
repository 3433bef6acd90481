"""Talking to a run's control service: what ``paceline status``, ``scale``, ``stop`` and the others do.

Owns: finding a run, deadlines, and turning what can go wrong into one clear sentence.
Must never: print, retry an action, or wait without a deadline.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc

from configs.checks import did_you_mean
from deploy.control_server import CONTROL_FILE
from deploy.credentials import CredentialsError, load
from deploy.status import StatusSnapshot, decode
from protos.control.v1 import control_pb2, control_pb2_grpc

CREDENTIALS_DIRECTORY = "control"
QUICK_SECONDS = 10.0
SAVE_SECONDS = 300.0  # calls that return when a checkpoint is durable
WATCH_SECONDS = 60.0  # a watch is a chain of streams of this length, so a server gone silent is noticed
_REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
)


class ControlUnavailable(RuntimeError):  # noqa: N818
    """The run cannot be reached; ``str()`` is one sentence for the user."""


class ControlRefused(RuntimeError):  # noqa: N818
    """The run was reached and says no; ``str()`` is one sentence for the user."""


@dataclass(frozen=True)
class Endpoint:
    """Where a control service is and what it takes to talk to it. ``pid`` is of the process that announced it."""

    address: str
    certificate: bytes = field(repr=False)
    token: str = field(repr=False)
    run: str | None = None
    pid: int | None = None


def find(run: str, log_dir: str | Path) -> Endpoint:
    """The endpoint that ``<log_dir>/<run>/control.json`` announces; ``ControlUnavailable`` if there is none."""
    directory = Path(log_dir) / run
    if not directory.is_dir():
        raise ControlUnavailable(_no_such_run(run, Path(log_dir)))
    path = directory / CONTROL_FILE
    try:
        announced = json.loads(path.read_text())
        credentials = load(directory / CREDENTIALS_DIRECTORY)
        return Endpoint(announced["address"], credentials.certificate, credentials.token, run, int(announced["pid"]))
    except FileNotFoundError as error:
        message = f"run {run!r} is not running: {path} does not exist (the run has ended, or has not got this far)"
        raise ControlUnavailable(message) from error
    except OSError as error:
        raise ControlUnavailable(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ControlUnavailable(f"{path} is damaged: expected an object with address, run and pid") from error
    except CredentialsError as error:
        raise ControlUnavailable(f"run {run!r}: {error}") from error


def endpoint(address: str, token_file: str | Path, certificate: str | Path) -> Endpoint:
    """An endpoint given by hand (``host:port`` and two files), for a run whose directory is not on this machine."""
    try:
        return Endpoint(address, Path(certificate).read_bytes(), Path(token_file).read_text().strip())
    except OSError as error:
        raise ControlUnavailable(f"{error.filename} cannot be read: {error.strerror}") from error


def status(endpoint: Endpoint) -> StatusSnapshot:
    """The run now."""
    with _connected(endpoint, QUICK_SECONDS) as stub:
        return decode(stub.GetStatus(control_pb2.GetStatusRequest(), timeout=QUICK_SECONDS).status)


def watch(endpoint: Endpoint, interval: float = 1.0) -> Iterator[StatusSnapshot]:
    """The run now and every ``interval`` seconds, until it has finished; closing the iterator ends the call."""
    seconds = max(WATCH_SECONDS, 3 * interval)
    request = control_pb2.WatchStatusRequest(interval_seconds=interval)
    with _connected(endpoint, seconds) as stub:
        while True:
            call = stub.WatchStatus(request, timeout=seconds)
            heard = False
            try:
                for response in call:
                    heard = True
                    yield decode(response.status)
                return
            except grpc.RpcError as error:
                if not (heard and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            finally:
                call.cancel()


def scale(endpoint: Endpoint, workers: int) -> None:
    """Asks for ``workers`` workers."""
    with _connected(endpoint, QUICK_SECONDS) as stub:
        stub.Scale(control_pb2.ScaleRequest(workers=workers), timeout=QUICK_SECONDS)


def pause(endpoint: Endpoint) -> None:
    """No further meta-steps until ``resume``."""
    with _connected(endpoint, QUICK_SECONDS) as stub:
        stub.Pause(control_pb2.PauseRequest(), timeout=QUICK_SECONDS)


def resume(endpoint: Endpoint) -> None:
    """Ends a pause."""
    with _connected(endpoint, QUICK_SECONDS) as stub:
        stub.Resume(control_pb2.ResumeRequest(), timeout=QUICK_SECONDS)


def checkpoint(endpoint: Endpoint) -> tuple[str, int]:
    """Saves a checkpoint; returns its name and version when it is durable."""
    with _connected(endpoint, SAVE_SECONDS) as stub:
        response = stub.Checkpoint(control_pb2.CheckpointRequest(), timeout=SAVE_SECONDS)
        return response.name, response.version


def stop(endpoint: Endpoint) -> int:
    """Ends the run; returns the version of its final checkpoint when that is durable."""
    with _connected(endpoint, SAVE_SECONDS) as stub:
        version: int = stub.Stop(control_pb2.StopRequest(), timeout=SAVE_SECONDS).version
        return version


class _Token(grpc.AuthMetadataPlugin):  # type: ignore[misc]
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {self._token}"),), None)


@contextmanager
def _connected(endpoint: Endpoint, seconds: float) -> Iterator[Any]:
    """A stub whose errors leave as ``ControlUnavailable`` or ``ControlRefused``."""
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(root_certificates=endpoint.certificate),
        grpc.metadata_call_credentials(_Token(endpoint.token)),
    )
    with grpc.secure_channel(endpoint.address, credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield control_pb2_grpc.ControlServiceStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            _explain(error, endpoint, seconds)


def _explain(error: grpc.RpcError, endpoint: Endpoint, seconds: float) -> NoReturn:
    code, details = error.code(), error.details() or ""
    if code in _REFUSALS:
        raise ControlRefused(details) from error
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise ControlUnavailable(f"no answer from {endpoint.address} within {seconds:g} s") from error
    if code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in details:
        message = f"the server at {endpoint.address} is not {_named(endpoint)}: it has another certificate"
        raise ControlUnavailable(message) from error
    if code is grpc.StatusCode.UNAVAILABLE:
        raise ControlUnavailable(_not_running(endpoint, details)) from error
    raise ControlUnavailable(f"{_named(endpoint)} answered {code.name}: {details}") from error


def _named(endpoint: Endpoint) -> str:
    return "the run that is meant" if endpoint.run is None else f"run {endpoint.run!r}"


def _not_running(endpoint: Endpoint, details: str) -> str:
    if endpoint.run is None or endpoint.pid is None or not _is_local(endpoint.address):
        return f"nothing answers at {endpoint.address} ({details})"
    if _is_alive(endpoint.pid):
        return f"run {endpoint.run!r} does not answer at {endpoint.address}, but its process {endpoint.pid} is alive"
    return (
        f"run {endpoint.run!r} is not running any more: nothing answers at {endpoint.address} and process "
        f"{endpoint.pid} has ended (it left a stale {CONTROL_FILE})"
    )


def _is_local(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _no_such_run(run: str, log_dir: Path) -> str:
    runs = sorted(path.name for path in log_dir.iterdir() if path.is_dir()) if log_dir.is_dir() else []
    if not runs:
        return f"no run {run!r}: there are no runs in {log_dir}"
    return f"no run {run!r} in {log_dir}{did_you_mean(run, runs)}; there are: {', '.join(runs)}"
