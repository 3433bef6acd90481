"""``doctor``: what it finds on a machine, what it advises, and that it leaves nothing behind."""

import json
import socket
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from configs.schema import ClusterConfig, DataConfig, StorageConfig
from deploy import doctor
from deploy.doctor import Check
from lopt import kernels
from worker.fused import cpu

LOCAL = ClusterConfig(num_workers=4, worker_cpus=2.0)
REMOTE = replace(LOCAL, address="head:6379")


def summary(check):
    return check.status, check.found


def test_a_good_machine_passes_every_check(tmp_path, monkeypatch):
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    checks = doctor.run_checks(
        StorageConfig(root=str(tmp_path / "runs")),
        DataConfig(root=str(tmp_path / "data"), cache=str(tmp_path / "cache")),
        ClusterConfig(num_workers=1),
    )
    assert not [check for check in checks if check.status == "fail"]
    assert doctor.exit_code(checks) == 0
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {
        "python", "C++ compiler", "fused kernels", "CPU cores", "memory", "CUDA devices", "shared memory",
        "RAY_AUTH_MODE", "Ray temp dir", "checkpoint store", "data root", "data cache", "cluster.control_port",
        "cluster.learner_metrics_port", "cluster.evaluator_metrics_port",
    } <= set(names)  # fmt: skip


def test_json_has_stable_keys_and_one_failure_decides_the_exit_code():
    checks = [Check("a", "ok", "x"), Check("b", "warn", "y", "do"), Check("c", "fail", "z", "do")]
    assert json.loads(json.dumps(doctor.to_dicts(checks))) == [
        {"name": "a", "status": "ok", "found": "x", "advice": ""},
        {"name": "b", "status": "warn", "found": "y", "advice": "do"},
        {"name": "c", "status": "fail", "found": "z", "advice": "do"},
    ]
    assert (doctor.exit_code(checks), doctor.exit_code(checks[:2])) == (1, 0)


def test_the_table_shows_brackets_as_they_are():
    screen = StringIO()
    doctor.print_checks(
        [Check("ray", "fail", "[Errno 2] no", "pip install 'ray[default]'")], Console(file=screen, width=120)
    )
    assert "[Errno 2] no" in screen.getvalue()
    assert "pip install 'ray[default]'" in screen.getvalue()
    assert "fail" in screen.getvalue()


def test_packages_are_held_against_the_ranges_of_the_distribution():
    installed = {"torch": "2.13.0+cpu", "ray": "2.40.0", "hydra-core": "1.4.0"}
    wanted = [
        "torch<2.14,>=2.11",
        "ray[default]>=2.55",
        "hydra-core<1.4,>=1.3.2",
        "protobuf>=6.30",
        'pytest>=8; extra == "dev"',
        'tomli; python_version < "3"',
    ]
    assert doctor.check_packages(wanted, installed.get) == [
        Check("torch", "ok", "2.13.0+cpu"),
        Check("ray", "fail", "2.40.0", "pip install 'ray[default]>=2.55'"),
        Check("hydra-core", "fail", "1.4.0", "pip install 'hydra-core<1.4,>=1.3.2'"),
        Check("protobuf", "fail", "not installed", "pip install 'protobuf>=6.30'"),
    ]


def test_a_compiler_is_looked_for_where_torch_looks():
    assert doctor.check_compiler({"CXX": "sh -x"}).status == "ok"
    missing = doctor.check_compiler({"CXX": "no-such-compiler"})
    assert summary(missing) == ("warn", "none of no-such-compiler")


def test_kernels_that_were_not_built_cost_speed_and_broken_ones_stop_a_run(monkeypatch):
    assert doctor.check_kernels().status == ("ok" if kernels.cpu.build() else "warn")
    monkeypatch.setattr(kernels.cpu, "build", lambda: "avx2")
    monkeypatch.setattr(cpu, "build", lambda: "avx512")
    assert doctor.check_kernels() == Check("fused kernels", "ok", "update: avx2, window: avx512")
    monkeypatch.setattr(kernels.cpu, "build", lambda: None)
    missing = doctor.check_kernels()
    assert summary(missing) == ("warn", "update built without a C++ compiler: everything works, slower")
    assert "install g++" in missing.advice

    def stale():
        raise ImportError("_rules.so was built from other sources")

    monkeypatch.setattr(kernels.cpu, "build", stale)
    assert summary(doctor.check_kernels()) == ("fail", "_rules.so was built from other sources")


def test_too_few_cores_or_too_little_memory_warn_for_a_local_cluster_only():
    assert summary(doctor.check_cpus(LOCAL, 2.0)) == ("warn", "2 usable, the workers want 8")
    assert doctor.check_cpus(LOCAL, 8.0).status == "ok"
    assert doctor.check_cpus(REMOTE, 2.0).status == "ok"
    assert summary(doctor.check_memory(LOCAL, 3 * doctor.GIB)) == ("warn", "3.0 GiB usable")
    assert doctor.check_memory(LOCAL, 5 * doctor.GIB).status == "ok"
    assert doctor.check_memory(REMOTE, doctor.GIB).status == "ok"


def test_missing_gpus_fail_because_the_run_would_wait_for_ever():
    cluster = replace(LOCAL, worker_gpus=0.5)
    assert summary(doctor.check_gpus(cluster, ["H100"])) == ("fail", "H100")
    assert "want 2 GPUs" in doctor.check_gpus(cluster, ["H100"]).advice
    assert doctor.check_gpus(cluster, ["H100", "H100"]).status == "ok"
    assert summary(doctor.check_gpus(LOCAL, [])) == ("ok", "none")
    assert doctor.check_gpus(replace(cluster, address="head:6379"), []).status == "ok"


def test_what_this_machine_has_is_measured():
    assert doctor.usable_cpus() > 0
    assert doctor.usable_memory() > doctor.GIB / 4


@pytest.mark.parametrize(
    ("mode", "cluster", "status"),
    [
        (None, LOCAL, "ok"),
        (None, REMOTE, "warn"),
        ("token", REMOTE, "ok"),
        ("TOKEN", LOCAL, "ok"),
        ("disabled", LOCAL, "warn"),
        ("tokn", LOCAL, "fail"),
    ],
)
def test_a_ray_cluster_without_tokens_is_warned_about(mode, cluster, status):
    check = doctor.check_ray_auth(cluster, {} if mode is None else {"RAY_AUTH_MODE": mode})
    assert check.status == status
    assert bool(check.advice) == (status != "ok")


def test_a_temp_dir_that_ray_cannot_use_fails(tmp_path):
    assert doctor.check_ray_temp(tmp_path / "nowhere").status == "fail"
    (tmp_path / "file").touch()
    assert doctor.check_ray_temp(tmp_path / "file").status == "fail"
    long = tmp_path / ("x" * 107)
    long.mkdir()
    check = doctor.check_ray_temp(long)
    assert check.status == "fail"
    assert f"at most {doctor.MAX_TEMP_PATH} bytes" in check.advice


def test_shared_memory_is_measured(tmp_path, monkeypatch):
    assert doctor.check_shared_memory(tmp_path).status == "ok"
    monkeypatch.setattr(doctor, "MIN_SHM", 1 << 60)
    assert "--shm-size" in doctor.check_shared_memory(tmp_path).advice
    assert doctor.check_shared_memory(tmp_path / "nowhere").status == "warn"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_store_is_tried_and_nothing_is_left_in_it(tmp_path, scheme):
    (tmp_path / "celo").mkdir()
    check = doctor.check_store(StorageConfig(root=f"{scheme}{tmp_path}"))
    assert check.status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["celo"]


def test_a_store_that_cannot_be_used_fails_with_the_stores_own_words(tmp_path):
    (tmp_path / "file").touch()
    check = doctor.check_store(StorageConfig(root=str(tmp_path / "file")))
    assert check.status == "fail"
    assert "file" in check.found
    assert "storage.root" in check.advice
    assert doctor.check_store(StorageConfig(root="bogus://x")).status == "fail"


def test_the_data_root_is_listed(tmp_path):
    (tmp_path / "mnist").mkdir()
    assert summary(doctor.check_data(DataConfig(root=str(tmp_path)))) == ("ok", f"{tmp_path}, 1 entries")
    assert doctor.check_data(DataConfig()).status == "ok"
    missing = doctor.check_data(DataConfig(root=str(tmp_path / "nowhere")))
    assert summary(missing) == ("fail", f"{tmp_path / 'nowhere'} does not exist")
    assert summary(doctor.check_data(DataConfig(root="bogus://x"))) == (
        "fail",
        "bogus://x: ValueError: Protocol not known: bogus",
    )


def test_a_cache_that_cannot_be_written_matters_only_with_a_data_root(tmp_path):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "deep")
    assert doctor.check_cache(DataConfig(root="s3://bucket", cache=cache)).status == "fail"
    assert doctor.check_cache(DataConfig(root=None, cache=cache)).status == "ok"
    assert doctor.check_cache(DataConfig(root="s3://bucket", cache=str(tmp_path / "new" / "deep"))).status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_taken_port_fails_and_names_its_field():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        checks = doctor.check_ports(ClusterConfig(learner_metrics_port=port))
    assert [check.status for check in checks] == ["ok", "fail", "ok"]
    assert checks[1].name == "cluster.learner_metrics_port"
    assert checks[1].found == f"127.0.0.1:{port}: Address already in use"
    assert doctor.check_ports(ClusterConfig(learner_metrics_port=port))[1].status == "ok"  # it is free now


def test_a_control_host_of_another_machine_fails():
    check = doctor.check_ports(ClusterConfig(control_host="192.0.2.1", control_port=50051))[0]
    assert check.status == "fail"
    assert check.name == "cluster.control_port"
