"""The Ray cluster of a run: start or join it, and see whether it is large enough.

Owns Ray's settings (authentication, temporary directory, namespace) and nothing of the run. Never leaves processes
behind: a cluster that was started here ends here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from configs.checks import ConfigError
from configs.schema import ClusterConfig

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}

TEMPORARY = Path("/tmp")  # noqa: S108  Unix sockets allow about 100 characters, so the path must be short


def prepare_environment(config: ClusterConfig) -> None:
    """Set what Ray reads when it is imported; a cluster of our own gets a token of its own, kept off the disk."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.address == "local" and os.environ["RAY_AUTH_MODE"] == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@asynccontextmanager
async def connected(config: ClusterConfig, run: str) -> AsyncIterator[None]:
    """Inside, Ray is initialised and the cluster has what ``config`` asks for. Call ``prepare_environment`` before.

    Raises ``ConfigError`` if it has less after ``startup_seconds``, or cannot be reached.
    """
    local = config.address == "local"
    import ray

    directory = _temporary_directory() if local else None
    try:
        ray.init(
            address=config.address,
            namespace=f"paceline-{run}",
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=directory,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError("cluster.address", config.address, f"a Ray cluster that can be reached ({error})") from error
    try:
        await _wait_for_resources(config)
        yield
    finally:
        ray.shutdown()
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _temporary_directory() -> str:
    """A new directory named after this process; those of launchers that were killed are removed."""
    for path in TEMPORARY.glob("paceline-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"paceline-{os.getpid()}-", dir=TEMPORARY)


async def _wait_for_resources(config: ClusterConfig) -> None:
    deadline = time.monotonic() + (0 if config.address == "local" else config.startup_seconds)
    while (problem := shortage(config, config.num_workers)) is not None:
        if time.monotonic() >= deadline:
            raise ConfigError("cluster.num_workers", config.num_workers, problem)
        await asyncio.sleep(0.5)


def shortage(config: ClusterConfig, workers: int) -> str | None:
    """What the cluster lacks for so many workers, in words; None if it has enough."""
    import ray

    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, each in (("CPU", config.worker_cpus), ("GPU", config.worker_gpus)):
        has = total.get(resource, 0.0)
        if workers * each > has:
            return (
                f"no more workers than the cluster has {resource}s for: {workers} x {each:g} {resource} are asked for, "
                f"the cluster has {has:g}"
            )
    return None
