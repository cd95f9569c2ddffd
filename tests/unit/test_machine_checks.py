from __future__ import annotations

import resource
import types

import pytest

from pretrain import host_memory, machine_checks
from pretrain.config import BatchConfig
from pretrain.memory import Setup
from pretrain.model_config import ModelConfig


def setup_of(size: str = "125M") -> Setup:
    return Setup(ModelConfig(size=size).resolve(), "bf16", BatchConfig(8, 4))


def test_this_python_is_well():
    assert machine_checks.python().status == "ok"


@pytest.mark.parametrize(
    ("version", "platform", "status"), [((3, 9, 1), "linux", "fail"), ((3, 12, 0), "darwin", "warn")]
)
def test_an_old_python_fails_and_another_system_is_a_warning(monkeypatch, version, platform, status):
    monkeypatch.setattr(
        machine_checks, "sys", types.SimpleNamespace(version_info=version, platform=platform, executable="p")
    )
    found = machine_checks.python()
    assert found.status == status and found.mend


def test_packages_that_differ_fail_where_training_would_refuse_them(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy==0.1\nnot-a-package-of-ours==1\n")
    strict, loose = (machine_checks.packages(requirements, enforced) for enforced in (True, False))
    assert (strict.status, strict.exit_code, loose.status) == ("fail", 2, "warn")
    for found in (strict, loose):
        assert "pins 0.1" in found.found and "not-a-package-of-ours is not installed" in found.found
        assert "setup_env.sh" in found.mend
    requirements.write_text("numpy>=1\n")
    assert machine_checks.packages(requirements, True).status == "ok"


@pytest.mark.parametrize(("free", "total", "status"), [(90e9, 99e9, "ok"), (1e9, 99e9, "warn"), (1e9, 2e9, "fail")])
def test_host_memory_is_held_against_what_the_ranks_need(monkeypatch, free, total, status):
    monkeypatch.setattr(host_memory, "free_bytes", lambda: int(free))
    monkeypatch.setattr(host_memory, "total_bytes", lambda: int(total))
    found = machine_checks.host(setup_of(), 2, "cpu")
    assert found.status == status and "2 ranks need about" in found.found
    assert found.figures["needed_gb"] == host_memory.host_bytes(setup_of(), 2, "cpu") / 1e9


@pytest.mark.parametrize(
    ("free", "gpu_ranks", "status"),
    [(64 * 2**20, 8, "fail"), (512 * 2**20, 8, "warn"), (2**33, 8, "ok"), (2**26, 1, "ok")],
)
def test_shared_memory_matters_between_gpus(monkeypatch, tmp_path, free, gpu_ranks, status):
    monkeypatch.setattr(machine_checks, "SHM", tmp_path)
    room = types.SimpleNamespace(f_frsize=1, f_blocks=2**34, f_bavail=free)
    monkeypatch.setattr(machine_checks.os, "statvfs", lambda path: room)
    found = machine_checks.shared_memory(gpu_ranks)
    assert found.status == status
    assert ("--shm-size" in found.mend) == (status != "ok")


def test_limits_say_how_to_lift_them(monkeypatch, tmp_path):
    limits = {resource.RLIMIT_NOFILE: (1024, 4096), resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(machine_checks.resource, "getrlimit", limits.__getitem__)
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(machine_checks, "INFINIBAND", tmp_path)
    files, locked = machine_checks.limits(2)
    assert (files.status, locked.status) == ("warn", "warn")
    assert "ulimit -n 4096" in files.mend and "ulimit -l unlimited" in locked.mend
    assert machine_checks.limits(1)[1].status == "ok"
    limits[resource.RLIMIT_NOFILE] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert machine_checks.limits(1)[0].status == "ok"
