from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain import host_memory, memory
from pretrain.config import BatchConfig
from pretrain.memory import Setup, Sharding
from pretrain.model_config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]


def setup_of(world_size: int = 1, **sharding) -> Setup:
    model = ModelConfig(size="125M").resolve()
    return Setup(model, "bf16", BatchConfig(8, 4), world_size, Sharding(**sharding))


def test_a_rank_on_a_cpu_needs_its_step_and_its_part_of_a_checkpoint():
    size = sum(memory.parameter_sizes(setup_of().model))
    one = host_memory.host_bytes(setup_of(), 1, "cpu")
    assert one == host_memory.PROCESS_BYTES["cpu"] + memory.peak(setup_of()).total + 12 * size
    two = host_memory.host_bytes(setup_of(2), 2, "cpu")
    assert two == 2 * (host_memory.PROCESS_BYTES["cpu"] + memory.peak(setup_of(2)).total + 6 * size)


def test_beside_gpus_the_host_holds_a_part_of_a_checkpoint_or_the_largest_parameter_and_what_is_offloaded():
    sizes = memory.parameter_sizes(setup_of().model)
    size, process = sum(sizes), host_memory.PROCESS_BYTES["cuda"]
    plain = setup_of(8, engine="deepspeed", stage=2)
    assert max(sizes) > size / 8  # the token table, which a resume reads with its moments
    assert host_memory.host_bytes(plain, 8, "cuda") == 8 * (process + 12 * max(sizes))
    assert host_memory.host_bytes(setup_of(1), 1, "cuda") == process + 12 * size
    offloading = dataclasses.replace(plain, sharding=dataclasses.replace(plain.sharding, offload=True))
    more = host_memory.host_bytes(offloading, 8, "cuda") - host_memory.host_bytes(plain, 8, "cuda")
    assert more == 8 * (12 * size // 8)


def test_the_limit_of_a_container_counts_and_what_its_kernel_gives_back(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    machine = psutil.virtual_memory()
    assert host_memory.total_bytes() == machine.total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert (host_memory.total_bytes(), host_memory.free_bytes()) == (1_000_000, 500_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.total_bytes() == machine.total


def test_an_older_container_tells_it_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("700000\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 100000\n")
    assert (host_memory.total_bytes(), host_memory.free_bytes()) == (1_000_000, 400_000)


def test_memory_that_was_freed_is_not_fetched_from_the_kernel_again():
    """In a process of its own: the setting can't be taken back."""
    program = """
import resource
import numpy as np
import psutil
from pretrain.host_memory import give_back, keep_freed
kept = keep_freed()
faults = []
for _ in range(3):
    np.empty(50_000_000, np.uint8).fill(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
resident = psutil.Process().memory_info().rss
give_back()
print(kept, faults[2] - faults[1], resident - psutil.Process().memory_info().rss)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, faults, given_back = ended.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    assert kept == "False" or int(faults) < 100  # of 12,207 pages
    assert kept == "False" or int(given_back) > 40_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
def test_what_other_threads_freed_is_given_back_while_they_live():
    """The threads of uploads free what they read; arenas of their own would keep it. In a process of its own."""
    program = """
import threading
import numpy as np
import psutil
from pretrain.host_memory import give_back, keep_freed
keep_freed()
freed, end = threading.Barrier(5), threading.Event()
def work():
    np.empty(40_000_000, np.uint8).fill(1)
    freed.wait()
    end.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
before = psutil.Process().memory_info().rss
for thread in threads:
    thread.start()
freed.wait()
give_back()
print(psutil.Process().memory_info().rss - before)
end.set()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 20_000_000  # of 160 MB


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not host_memory.keep_freed()
