"""The control service as an operator meets it: a real server on a real port, over TLS, and the real client."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from configs.checks import ConfigError
from deploy import control_client, control_server, credentials
from deploy.control_client import ControlRefused, ControlUnavailable
from deploy.status import (
    Books,
    Drop,
    Evaluation,
    RunState,
    SavedCheckpoint,
    Scores,
    StatusSnapshot,
    decode,
    encode,
    status_to_json,
)
from protos.control.v1 import control_pb2, control_pb2_grpc

FULL = StatusSnapshot(
    run="celo",
    state=RunState.RUNNING,
    version=120,
    meta_steps=1000,
    incarnation=2,
    meta_gradients_per_second=3.5,
    mean_staleness=1.25,
    books=Books(500, 480, 3, (Drop("digits", "stale", 16), Drop("letters", "non_finite", 1))),
    workers_desired=4,
    workers_alive=3,
    workers_replaced=1,
    elapsed_seconds=60.5,
    learner_metrics_port=9100,
    evaluator_metrics_port=9101,
    meta_loss=1.5,
    checkpoint=SavedCheckpoint("000000000100-2", 100),
    evaluation=Evaluation(100, Scores(0.9, 0.8, 0.2), Scores(1.1, 1.0, 0.1)),
)
EARLY = replace(FULL, state=RunState.STARTING, meta_loss=None, checkpoint=None, evaluation=None)


@dataclass
class Run:
    """A run that only remembers what it was asked for."""

    snapshots: list[StatusSnapshot] = field(default_factory=lambda: [FULL])
    asked: list[object] = field(default_factory=list)
    may_save: threading.Event = field(default_factory=threading.Event)
    saved: threading.Event = field(default_factory=threading.Event)

    async def status(self) -> StatusSnapshot:
        return self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0]

    async def scale(self, workers: int) -> None:
        if workers > 64:
            raise ValueError(f"workers = {workers}: expected at most 64")
        self.asked.append(("scale", workers))

    async def pause(self) -> None:
        if "pause" in self.asked:
            raise control_server.ControlError("the run is paused already")
        self.asked.append("pause")

    async def resume(self) -> None:
        self.asked.append("resume")

    async def checkpoint(self) -> tuple[str, int]:
        while not self.may_save.is_set():
            await asyncio.sleep(0.01)
        self.saved.set()
        return "000000000120-2", 120

    async def stop(self) -> int:
        self.asked.append("stop")
        return 121


class Served:
    """A control server in a thread of its own, announced in a run directory as the launcher does it."""

    def __init__(self, log_dir: Path, run: Run, name: str = "celo") -> None:
        self.run, self.log_dir, self.name = run, log_dir, name
        self.directory = log_dir / name
        self.credentials = credentials.create(self.directory / "control", "127.0.0.1")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server, self.port = self.call(control_server.start(run, "127.0.0.1", 0, self.credentials))
        control_server.announce(self.directory, name, "127.0.0.1", self.port)

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def endpoint(self) -> control_client.Endpoint:
        return control_client.find(self.name, self.log_dir)

    def channel(self) -> grpc.Channel:
        """A TLS channel that sends no token."""
        tls = grpc.ssl_channel_credentials(self.credentials.certificate)
        return grpc.secure_channel(f"127.0.0.1:{self.port}", tls)

    def close(self) -> None:
        self.call(self.server.stop(grace=0.1))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def served(tmp_path):
    server = Served(tmp_path, Run())
    yield server
    server.close()


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# -- what a call does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshot", [FULL, EARLY, replace(FULL, evaluation=Evaluation(7, speedup=None))])
def test_a_status_arrives_as_it_was_sent(served, snapshot):
    served.run.snapshots = [snapshot]
    assert control_client.status(served.endpoint()) == snapshot


def test_every_state_survives_the_wire_and_an_unknown_one_is_refused():
    for state in RunState:
        assert decode(encode(replace(FULL, state=state))).state is state
    with pytest.raises(ValueError, match="state = 0"):
        decode(control_pb2.Status())


def test_watching_ends_when_the_run_has_finished(served):
    served.run.snapshots = [replace(FULL, version=v) for v in range(3)] + [replace(FULL, state=RunState.FINISHED)]
    seen = list(control_client.watch(served.endpoint(), interval=0.1))
    assert [s.version for s in seen] == [0, 1, 2, 120]
    assert seen[-1].state is RunState.FINISHED


def test_a_watch_outlives_its_streams_and_notices_silence(served, monkeypatch):
    monkeypatch.setattr(control_client, "WATCH_SECONDS", 1.0)  # the deadline of each stream
    answers = iter([replace(FULL, version=1), None, replace(FULL, version=2), None, None])

    async def status() -> StatusSnapshot:
        answer = next(answers)
        return answer if answer else await asyncio.Event().wait()  # hangs until its stream is over

    served.run.status = status
    watch = control_client.watch(served.endpoint(), interval=0.1)
    assert [next(watch).version for _ in range(2)] == [1, 2]
    with pytest.raises(ControlUnavailable, match=r"no answer from 127.0.0.1:\d+ within 1 s"):
        next(watch)


def test_closing_a_watch_ends_it(served):
    watch = control_client.watch(served.endpoint(), interval=0.1)
    assert next(watch) == FULL
    watch.close()
    with pytest.raises(StopIteration):
        next(watch)


def test_actions_reach_the_run_and_their_answers_come_back(served):
    served.run.may_save.set()
    endpoint = served.endpoint()
    control_client.scale(endpoint, 7)
    control_client.pause(endpoint)
    control_client.resume(endpoint)
    assert control_client.checkpoint(endpoint) == ("000000000120-2", 120)
    assert control_client.stop(endpoint) == 121
    assert served.run.asked == [("scale", 7), "pause", "resume", "stop"]


def test_no_workers_and_bad_intervals_are_refused_before_the_run_hears_of_them(served):
    with pytest.raises(ControlRefused, match="workers = 0: expected a number >= 1"):
        control_client.scale(served.endpoint(), 0)
    for interval in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ControlRefused, match=r"interval_seconds = .*: expected 0.1 to 3600"):
            next(control_client.watch(served.endpoint(), interval))
    assert served.run.asked == []


def test_a_run_refuses_in_its_own_words(served):
    with pytest.raises(ControlRefused, match="workers = 65: expected at most 64"):
        control_client.scale(served.endpoint(), 65)
    control_client.pause(served.endpoint())
    with pytest.raises(ControlRefused, match=r"^the run is paused already$"):
        control_client.pause(served.endpoint())


def test_an_action_goes_on_when_its_client_has_given_up(served, monkeypatch):
    monkeypatch.setattr(control_client, "SAVE_SECONDS", 1.0)
    with pytest.raises(ControlUnavailable, match=r"no answer from 127.0.0.1:\d+ within 1 s"):
        control_client.checkpoint(served.endpoint())
    assert not served.run.saved.is_set()
    served.run.may_save.set()
    assert served.run.saved.wait(10)


# -- who may call -----------------------------------------------------------------------------------------------------


def calls(channel):
    stub = control_pb2_grpc.ControlServiceStub(channel)
    for method in control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods:
        request = getattr(control_pb2, method.input_type.name)()
        yield method.name, getattr(stub, method.name), request


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ((), "no token"),
        ((("authorization", "Bearer wrong"),), "wrong token"),
        ((("authorization", "Bearer "),), "wrong token"),
        ((("authorization", "Basic {token}"),), "wrong token"),
        ((("authorization", "{token}"),), "wrong token"),
    ],
)
def test_every_method_wants_the_token(served, metadata, says):
    metadata = tuple((key, value.format(token=served.credentials.token)) for key, value in metadata)
    with served.channel() as channel:
        refused = []
        for name, method, request in calls(channel):
            with pytest.raises(grpc.RpcError) as caught:
                list(method(request, timeout=10, metadata=metadata))  # WatchStatus only fails when it is read
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert says in caught.value.details()
            refused.append(name)
    assert refused == ["GetStatus", "WatchStatus", "Scale", "Pause", "Resume", "Checkpoint", "Stop"]
    assert served.run.asked == []


def test_the_client_says_that_its_token_is_wrong(served):
    with pytest.raises(ControlRefused, match="wrong token"):
        control_client.status(replace(served.endpoint(), token="other"))


def test_health_is_told_to_everybody_and_nothing_else_is(served):
    with served.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "control.v1.ControlService"):
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_turns_not_serving_before_the_server_goes(served):
    with served.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        served.call(served.server.stop(grace=0.1))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_a_server_with_another_certificate_gets_no_token(served, tmp_path):
    other = credentials.create(tmp_path / "other", "127.0.0.1")
    with pytest.raises(ControlUnavailable, match="is not run 'celo': it has another certificate"):
        control_client.status(replace(served.endpoint(), certificate=other.certificate))


def test_there_is_no_way_in_without_tls(served):
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        metadata = (("authorization", f"Bearer {served.credentials.token}"),)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetStatus(control_pb2.GetStatusRequest(), timeout=10, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_taken_port_is_a_clear_error(served):
    with pytest.raises(ConfigError, match=f"cluster.control_port = {served.port}: expected a port that is free"):
        served.call(control_server.start(Run(), "127.0.0.1", served.port, served.credentials))


# -- finding a run ----------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_hand_too(served):
    secrets = served.directory / "control"
    endpoint = control_client.endpoint(f"localhost:{served.port}", secrets / "token", secrets / "certificate.pem")
    assert control_client.status(endpoint).run == "celo"
    with pytest.raises(ControlUnavailable, match=r"nowhere cannot be read: No such file"):
        control_client.endpoint("localhost:1", "nowhere", secrets / "certificate.pem")


def test_an_unknown_run_is_answered_with_the_known_ones(served, tmp_path):
    (tmp_path / "small").mkdir()
    with pytest.raises(
        ControlUnavailable, match=r"no run 'ceol' in .* \(did you mean 'celo'\?\); there are: celo, small"
    ):
        control_client.find("ceol", tmp_path)
    with pytest.raises(ControlUnavailable, match="there are no runs in"):
        control_client.find("celo", tmp_path / "nowhere")


def test_a_run_that_has_withdrawn_is_not_running(served, tmp_path):
    control_server.withdraw(served.directory)
    with pytest.raises(ControlUnavailable, match=r"run 'celo' is not running: .*control.json does not exist"):
        control_client.find("celo", tmp_path)


def announce(served, **content):
    path = served.directory / "control.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def test_a_stale_control_file_is_called_stale(tmp_path):
    served = Served(tmp_path, Run())
    served.close()
    assert served.endpoint().pid == os.getpid()
    with pytest.raises(ControlUnavailable, match=f"does not answer at .*, but its process {os.getpid()} is alive"):
        control_client.status(served.endpoint())
    announce(served, pid=ended_process())
    with pytest.raises(ControlUnavailable, match=r"'celo' is not running any more: .* has ended .*stale control.json"):
        control_client.status(served.endpoint())


@pytest.mark.parametrize("content", ["", "[]", '{"run": "celo"}', '{"address": "a:1", "run": "celo", "pid": "x"}'])
def test_a_damaged_control_file_is_named(served, content):
    (served.directory / "control.json").write_text(content)
    with pytest.raises(
        ControlUnavailable, match=r"control.json is damaged: expected an object with address, run and pid"
    ):
        served.endpoint()


# -- names that others rely on ----------------------------------------------------------------------------------------


def test_json_keys_are_stable_and_complete():
    plain = status_to_json(FULL)
    assert list(plain) == [
        "run", "state", "version", "meta_steps", "incarnation", "meta_gradients_per_second", "mean_staleness",
        "books", "workers_desired", "workers_alive", "workers_replaced", "elapsed_seconds", "learner_metrics_port",
        "evaluator_metrics_port", "meta_loss", "checkpoint", "evaluation",
    ]  # fmt: skip
    assert plain["books"] == {
        "received": 500,
        "applied": 480,
        "waiting": 3,
        "dropped": [
            {"family": "digits", "reason": "stale", "count": 16},
            {"family": "letters", "reason": "non_finite", "count": 1},
        ],
    }
    assert plain["state"] == "running"
    assert plain["checkpoint"] == {"name": "000000000100-2", "version": 100}
    assert plain["evaluation"]["speedup"] == {"iqm": 1.1, "median": 1.0, "optimality_gap": 0.1}
    assert list(status_to_json(EARLY)) == list(plain)
    json.dumps(status_to_json(replace(FULL, meta_loss=float("nan"))), allow_nan=False)


def test_the_wire_is_frozen():
    """Numbers and names of messages already in the field; add, never change."""
    service = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
    assert service.full_name == control_server.SERVICE
    assert [method.name for method in service.methods] == [
        "GetStatus", "WatchStatus", "Scale", "Pause", "Resume", "Checkpoint", "Stop",
    ]  # fmt: skip
    fields = {f.number: f.name for f in control_pb2.Status.DESCRIPTOR.fields}
    assert [fields[number] for number in sorted(fields)] == [
        "run", "state", "version", "meta_steps", "incarnation", "meta_loss", "meta_gradients_per_second",
        "mean_staleness", "books", "workers_desired", "workers_alive", "workers_replaced", "checkpoint", "evaluation",
        "learner_metrics_port", "evaluator_metrics_port", "elapsed_seconds",
    ]  # fmt: skip
    assert sorted(fields) == list(range(1, 18))
    assert dict(control_pb2.RunState.items()) == {
        "RUN_STATE_UNSPECIFIED": 0, "RUN_STATE_STARTING": 1, "RUN_STATE_RUNNING": 2, "RUN_STATE_PAUSED": 3,
        "RUN_STATE_EVALUATING": 4, "RUN_STATE_STOPPING": 5, "RUN_STATE_FINISHED": 6,
    }  # fmt: skip


def test_the_committed_code_loads_without_warnings():
    code = "from protos.control.v1 import control_pb2, control_pb2_grpc"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
