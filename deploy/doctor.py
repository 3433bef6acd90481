"""What ``paceline doctor`` looks at: whether this machine can do a run, and what to do where it cannot.

Owns: the checks and how they are shown. One check never stops another.
Must never: start Ray, keep anything it creates (but the folder ``storage.root``), or show a secret.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from configs.schema import ClusterConfig, DataConfig, StorageConfig

DISTRIBUTION = "paceline"
GIB = 1024**3
MIN_SHM = 1 * GIB
MIN_WORKER_MEMORY = 1 * GIB
MIN_TEMP_SPACE = 5 * GIB
# Ray puts sockets into <temp>/ray/session_<time>_<pid>/sockets/, and a socket's path has at most 107 bytes.
MAX_TEMP_PATH = 107 - len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
S3_DEADLINES = {"connect_timeout": 3, "read_timeout": 3, "retries": {"max_attempts": 0}}

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``found`` is what is there, ``advice`` what to do about it (empty when ok)."""

    name: str
    status: Status
    found: str
    advice: str = ""


def run_checks(storage: StorageConfig, data: DataConfig, cluster: ClusterConfig) -> list[Check]:
    """Everything a run with these settings needs from this machine, in the order in which it would go wrong."""
    return [
        check_python(),
        *check_packages(_requirements(), _installed_version),
        check_compiler(os.environ),
        check_kernels(),
        check_cpus(cluster, usable_cpus()),
        check_memory(cluster, usable_memory()),
        check_gpus(cluster, cuda_devices()),
        check_shared_memory(Path("/dev/shm")),  # noqa: S108  looked at, not written to
        check_ray_auth(cluster, os.environ),
        check_ray_temp(Path(os.environ.get("RAY_TMPDIR", "/tmp"))),  # noqa: S108  Ray's own default
        check_store(storage),
        check_data(data),
        check_cache(data),
        *check_ports(cluster),
    ]


def exit_code(checks: Sequence[Check]) -> int:
    """1 if something failed, else 0: a warning does not stop a run."""
    return int(any(check.status == "fail" for check in checks))


def to_dicts(checks: Sequence[Check]) -> list[dict[str, str]]:
    """Plain values for ``--json``, with the keys name, status, found and advice."""
    return [asdict(check) for check in checks]


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """A table for people."""
    table = Table("", "check", "found", "advice")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}
    for check in checks:
        table.add_row(marks[check.status], *(_plain(text) for text in (check.name, check.found, check.advice)))
    console.print(table)


def check_python() -> Check:
    """The interpreter against the distribution's ``requires-python``."""
    found = platform.python_version()
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return Check(
            "python", "warn", found, f"install {DISTRIBUTION} (pip install -e .), so that versions are checked"
        )
    if Requirement(f"python{wanted}").specifier.contains(found, prereleases=True):
        return Check("python", "ok", found)
    return Check("python", "fail", found, f"use Python {wanted}")


def check_packages(requirements: Sequence[str], installed: Callable[[str], str | None]) -> list[Check]:
    """Each requirement that applies here against the version that is installed (None: it is not)."""
    wanted = [Requirement(text) for text in requirements]
    return [
        _check_package(requirement, installed(requirement.name))
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def check_compiler(environment: Mapping[str, str]) -> Check:
    """A C++ compiler, which ``torch.compile`` calls."""
    candidates = [environment["CXX"]] if environment.get("CXX") else ["g++", "clang++", "c++"]
    found = next((path for name in candidates if (path := shutil.which(name.split()[0]))), None)
    if found:
        return Check("C++ compiler", "ok", found)
    advice = "install g++ if you want torch.compile (everything else works without)"
    return Check("C++ compiler", "warn", f"none of {', '.join(candidates)}", advice)


def check_kernels() -> Check:
    """The fused kernels for CPUs, of updates and of whole windows: avx512, avx2 or portable, by the processor."""
    from lopt.kernels import cpu as rules
    from worker.fused import cpu as windows

    name, again = "fused kernels", "`make clean setup` (or pip install -e .)"
    try:
        builds = {"update": rules.build(), "window": windows.build()}
    except (ImportError, OSError) as error:
        return Check(name, "fail", str(error), f"build them again: {again}")
    missing = [kind for kind, build in builds.items() if build is None]
    if not missing:
        return Check(name, "ok", ", ".join(f"{kind}: {build}" for kind, build in builds.items()))
    found = f"{' and '.join(missing)} built without a C++ compiler: everything works, slower"
    return Check(name, "warn", found, f"install g++, then {again}")


def check_cpus(cluster: ClusterConfig, usable: float) -> Check:
    """Cores that this process may use against what the workers of a local cluster ask for."""
    wanted = cluster.num_workers * cluster.worker_cpus
    found = f"{usable:g} usable, the workers want {wanted:g}"
    if cluster.address != "local" or usable >= wanted:
        return Check("CPU cores", "ok", found)
    return Check("CPU cores", "warn", found, f"expect slow workers: set cluster.num_workers to {int(usable)} or less")


def check_memory(cluster: ClusterConfig, usable: int) -> Check:
    """Memory that this process may use against a rule of thumb of 1 GiB for each worker and 1 for the rest."""
    wanted = (cluster.num_workers + 1) * MIN_WORKER_MEMORY
    found = f"{_size(usable)} usable"
    if cluster.address != "local" or usable >= wanted:
        return Check("memory", "ok", found)
    advice = f"{cluster.num_workers} workers want about {_size(wanted)}: lower cluster.num_workers"
    return Check("memory", "warn", found, advice)


def check_gpus(cluster: ClusterConfig, devices: Sequence[str]) -> Check:
    """CUDA devices that torch sees against what the workers of a local cluster ask for."""
    wanted = cluster.num_workers * cluster.worker_gpus
    found = ", ".join(devices) or "none"
    if cluster.address == "local" and wanted > len(devices):
        advice = f"the workers want {wanted:g} GPUs and would wait for ever: lower cluster.worker_gpus or num_workers"
        return Check("CUDA devices", "fail", found, advice)
    return Check("CUDA devices", "ok", found)


def check_shared_memory(path: Path) -> Check:
    """The size of /dev/shm, where Ray keeps objects."""
    try:
        usage = os.statvfs(path)
    except OSError as error:
        return Check("shared memory", "warn", f"{path}: {error.strerror}", "Ray will keep objects on disk, slowly")
    size = usage.f_blocks * usage.f_frsize
    if size >= MIN_SHM:
        return Check("shared memory", "ok", f"{path} {_size(size)}")
    return Check("shared memory", "warn", f"{path} {_size(size)}", "start the container with --shm-size=2g or more")


def check_ray_auth(cluster: ClusterConfig, environment: Mapping[str, str]) -> Check:
    """RAY_AUTH_MODE: whoever reaches a Ray cluster without tokens can run code on it."""
    mode = environment.get("RAY_AUTH_MODE")
    if mode is None:
        advice = "" if cluster.address == "local" else "set RAY_AUTH_MODE=token here and on every node"
        found = "not set (Ray makes a token for a local cluster)"
        return Check("RAY_AUTH_MODE", "warn" if advice else "ok", found, advice)
    if mode.lower() == "token":
        return Check("RAY_AUTH_MODE", "ok", mode)
    if mode.lower() == "disabled":
        return Check("RAY_AUTH_MODE", "warn", mode, "set it to token, unless nobody else can reach this machine")
    return Check("RAY_AUTH_MODE", "fail", repr(mode), "set it to token or disabled")


def check_ray_temp(path: Path) -> Check:
    """The folder for Ray's sockets, logs and spilled objects."""
    name, length = "Ray temp dir", len(os.fsencode(path))
    if not (path.is_dir() and os.access(path, os.W_OK)):
        return Check(name, "fail", f"{path} is not a writable folder", "set RAY_TMPDIR to one that is")
    if length > MAX_TEMP_PATH:
        return Check(
            name,
            "fail",
            f"{path} has {length} bytes",
            f"set RAY_TMPDIR to a path of at most {MAX_TEMP_PATH} bytes (socket names)",
        )
    free = shutil.disk_usage(path).free
    if free < MIN_TEMP_SPACE:
        advice = f"free some space: Ray wants {_size(MIN_TEMP_SPACE)} and refuses work on a full disk"
        return Check(name, "warn", f"{path}, {_size(free)} free", advice)
    return Check(name, "ok", f"{path}, {_size(free)} free")


def check_store(storage: StorageConfig) -> Check:
    """Whether checkpoints can be written, read back and protected against a second writer."""
    from learner.checkpoints import CheckpointStore, StoreError

    run = f"paceline-doctor-{secrets.token_hex(8)}"  # nobody else's, so that it can be removed
    try:
        CheckpointStore(storage.root, run, storage.options).check()
    except StoreError as error:
        return Check("checkpoint store", "fail", str(error), "check storage.root, storage.options and the credentials")
    finally:
        if "://" not in storage.root.removeprefix("file://"):
            shutil.rmtree(Path(storage.root.removeprefix("file://")) / run, ignore_errors=True)
    return Check("checkpoint store", "ok", f"{storage.root} can be written and read")


def check_data(data: DataConfig) -> Check:
    """Whether the folder of the data sets can be listed."""
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
    from fsspec.core import url_to_fs

    name, advice = "data root", "set task.data.root to the folder that holds one folder for each data set"
    if data.root is None:
        return Check(name, "ok", "not set: only embedded data sets (digits, glyphs, pydoc)")
    try:
        options: dict[str, Any] = {name: value for name, value in data.options.items() if name != "region"}
        if data.root.startswith("s3://"):
            region = data.options.get("region")
            options |= {"config_kwargs": S3_DEADLINES, "client_kwargs": {"region_name": region} if region else {}}
        system, path = url_to_fs(data.root, **options)
        entries = system.ls(path, detail=False)
    except FileNotFoundError:
        return Check(name, "fail", f"{data.root} does not exist", advice)
    except (OSError, ValueError, ImportError, BotoCoreError) as error:
        return Check(name, "fail", f"{data.root}: {type(error).__name__}: {error}", advice)
    return Check(name, "ok", f"{data.root}, {len(entries)} entries")


def check_cache(data: DataConfig) -> Check:
    """Whether downloaded data sets can be kept; a cache that is a URL is tried when it is used."""
    if "://" in data.cache.removeprefix("file://"):
        return Check("data cache", "ok", f"{data.cache} (a URL, not tried)")
    path = Path(data.cache.removeprefix("file://")).expanduser()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return Check("data cache", "ok", f"{path}, {_size(shutil.disk_usage(nearest).free)} free")
    status: Status = "ok" if data.root is None else "fail"
    return Check("data cache", status, f"{path}: {nearest} is not a writable folder", "set task.data.cache")


def check_ports(cluster: ClusterConfig) -> list[Check]:
    """Whether the ports that are given as numbers are free (0 is chosen by the system and never taken)."""
    places = (
        ("control_port", cluster.control_host),
        ("learner_metrics_port", "127.0.0.1"),
        ("evaluator_metrics_port", "127.0.0.1"),
    )
    return [_check_port(f"cluster.{field}", host, getattr(cluster, field)) for field, host in places]


def usable_cpus() -> float:
    """Cores that this process may use: its affinity, and its control group's quota if there is one."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = (_read_line(Path("/sys/fs/cgroup/cpu.max")) or "max").partition(" ")
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def usable_memory() -> int:
    """Bytes of memory of this machine, or of this control group if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read_line(Path("/sys/fs/cgroup/memory.max")) or "max"
    return total if limit == "max" else min(total, int(limit))


def cuda_devices() -> list[str]:
    """The names of the CUDA devices that torch sees."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_package(requirement: Requirement, found: str | None) -> Check:
    wanted = f"pip install '{str(requirement).partition(';')[0].strip()}'"
    if found is None:
        return Check(requirement.name, "fail", "not installed", wanted)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "fail", found, wanted)
    return Check(requirement.name, "ok", found)


def _check_port(name: str, host: str, port: int) -> Check:
    if port == 0:
        return Check(name, "ok", "chosen by the system")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
            probe.bind(address)
    except OSError as error:
        return Check(name, "fail", f"{host}:{port}: {error.strerror}", f"set {name} to a free port, or to 0")
    return Check(name, "ok", f"{host}:{port} is free")


def _read_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich reads brackets as markup
