"""The control service of a run: gRPC over TLS in front of an object that steers the run.

Owns: authentication, translation between messages and values, health, and the file by which clients find the run.
Must never: decide anything about the run, keep state of it, or answer without a token (health excepted).

Reflection is off: the .proto file is the documentation, and a stranger is told nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from configs.checks import ConfigError
from deploy.credentials import Credentials, same_token
from deploy.status import RunState, StatusSnapshot, encode
from protos.control.v1 import control_pb2, control_pb2_grpc

CONTROL_FILE = "control.json"
SERVICE = "control.v1.ControlService"
MIN_INTERVAL_SECONDS = 0.1
MAX_INTERVAL_SECONDS = 3600.0
_HEALTH_PREFIX = "/grpc.health.v1.Health/"

T = TypeVar("T")


class ControlError(RuntimeError):
    """An action that the run refuses in its present state; ``str()`` is one sentence for the user."""


class RunControl(Protocol):
    """Who steers the run. Methods raise ``ControlError`` for a refused action and ``ValueError`` for a bad value."""

    async def status(self) -> StatusSnapshot: ...
    async def scale(self, workers: int) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def checkpoint(self) -> tuple[str, int]:
        """Name and version of the checkpoint saved."""
        ...

    async def stop(self) -> int:
        """Version of the final checkpoint."""
        ...


class ControlServer:
    """A started server; ``stop`` it in the event loop it was started in."""

    def __init__(self, server: grpc.aio.Server, servicer: health.aio.HealthServicer) -> None:
        self._server = server
        self._health = servicer

    async def stop(self, grace: float = 1.0) -> None:
        """Turns NOT_SERVING, refuses new calls and lets those under way finish for ``grace`` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


async def start(control: RunControl, host: str, port: int, credentials: Credentials) -> tuple[ControlServer, int]:
    """Starts serving and returns the server and its port (``port`` 0 lets the system choose).

    ``ConfigError`` when the address cannot be had.
    """
    # Without SO_REUSEPORT a second run on the same port is refused instead of getting half of the calls.
    server = grpc.aio.server(interceptors=[_TokenInterceptor(credentials.token)], options=[("grpc.so_reuseport", 0)])
    control_pb2_grpc.add_ControlServiceServicer_to_server(_Servicer(control), server)  # type: ignore[no-untyped-call]
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    tls = grpc.ssl_server_credentials([(credentials.private_key, credentials.certificate)])
    try:
        bound = server.add_secure_port(address(host, port), tls)
    except RuntimeError as error:  # what grpc raises for every address it cannot bind
        raise ConfigError("cluster.control_port", port, f"a port that is free on {host}") from error
    await server.start()
    await servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    return ControlServer(server, servicer), bound


def address(host: str, port: int) -> str:
    """``host:port``, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announce(run_directory: Path, run: str, host: str, port: int) -> None:
    """Writes ``control.json``, by which clients find this run, in one step; mode 0600."""
    content = {"address": address(host, port), "run": run, "pid": os.getpid()}
    handle, temporary = tempfile.mkstemp(dir=run_directory, prefix=f".{CONTROL_FILE}-")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=2)
    os.replace(temporary, run_directory / CONTROL_FILE)


def withdraw(run_directory: Path) -> None:
    """Removes ``control.json``: the run can no longer be reached."""
    (run_directory / CONTROL_FILE).unlink(missing_ok=True)


class _TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets a call through if it carries the token, or asks for health."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith(_HEALTH_PREFIX):
            return await continuation(details)
        given = dict(details.invocation_metadata or ()).get("authorization")
        if given is None:
            return _refusal("no token: send the metadata 'authorization: Bearer <token>'")
        scheme, _, token = str(given).partition(" ")
        if scheme.lower() != "bearer" or not same_token(self._token, token):
            return _refusal("wrong token: expected 'authorization: Bearer <the token of this launch>'")
        return await continuation(details)


def _refusal(message: str) -> grpc.RpcMethodHandler:
    async def refuse(request: bytes, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    return grpc.unary_unary_rpc_method_handler(refuse)


class _Servicer(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, control: RunControl) -> None:
        self._control = control
        self._actions: set[asyncio.Task[Any]] = set()

    async def GetStatus(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return control_pb2.GetStatusResponse(status=encode(await self._call(context, self._control.status())))

    async def WatchStatus(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # noqa: N802
        interval = request.interval_seconds
        if not MIN_INTERVAL_SECONDS <= interval <= MAX_INTERVAL_SECONDS:
            expected = f"expected {MIN_INTERVAL_SECONDS:g} to {MAX_INTERVAL_SECONDS:g}"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"interval_seconds = {interval:g}: {expected}")
        while True:
            snapshot = await self._call(context, self._control.status())
            yield control_pb2.WatchStatusResponse(status=encode(snapshot))
            if snapshot.state is RunState.FINISHED:
                return
            await asyncio.sleep(interval)

    async def Scale(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        if request.workers < 1:  # checked here because a forgotten field reads as 0
            message = f"workers = {request.workers}: expected a number >= 1 (to stop the work, pause the run)"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, message)
        await self._call(context, self._control.scale(request.workers))
        return control_pb2.ScaleResponse()

    async def Pause(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        await self._call(context, self._control.pause())
        return control_pb2.PauseResponse()

    async def Resume(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        await self._call(context, self._control.resume())
        return control_pb2.ResumeResponse()

    async def Checkpoint(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        name, version = await self._call(context, self._control.checkpoint())
        return control_pb2.CheckpointResponse(name=name, version=version)

    async def Stop(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return control_pb2.StopResponse(version=await self._call(context, self._control.stop()))

    async def _call(self, context: grpc.aio.ServicerContext, action: Coroutine[Any, Any, T]) -> T:
        """Awaits the run's answer and turns its two kinds of refusal into their status codes.

        A client that gives up cancels its call, but not the action: a run is not left half-stopped.
        """
        task = asyncio.create_task(action)
        self._actions.add(task)  # the event loop itself holds tasks weakly
        task.add_done_callback(self._actions.discard)
        try:
            return await asyncio.shield(task)
        except ControlError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except ValueError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))


async def _abort(context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
    raise AssertionError("abort raises")
