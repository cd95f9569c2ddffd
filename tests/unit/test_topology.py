from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from pretrain import topology
from pretrain.communication import GLOO_INTERFACE
from pretrain.topology import describe, nvlinks, place_of, ranks_by_host, tell_topology

GPU = {"host": "a", "device": "H100", "nvlinks": 18, "unknown": "", "infiniband": 8, "gloo": "eth0"}
TCP = "no InfiniBand on every host: TCP"


def on_hosts(*hosts, **changes):
    return [{**GPU, "host": host, **changes} for host in hosts]


@pytest.mark.parametrize(
    ("everyone", "line"),
    [
        (on_hosts("a", "a"), "1 host × 2 H100, NVLink ×18"),
        (on_hosts("a", "a", "b", "b"), "2 hosts × 2 H100, NVLink ×18; 8 InfiniBand ports a host; gloo over eth0"),
        (on_hosts("a", "b", "b"), "2 hosts × 1 to 2 H100, NVLink ×18; 8 InfiniBand ports a host; gloo over eth0"),
        (on_hosts("a", "a", nvlinks=0), "1 host × 2 H100, no NVLink on every GPU: PCIe"),
        (on_hosts("a") + on_hosts("b", infiniband=0, gloo=""), None),
        (on_hosts("a", "a", unknown="no driver"), "1 host × 2 H100, links unknown (no driver)"),
        (
            on_hosts("a", "b", device="CPU", infiniband=0),
            "2 hosts × 1 CPU; no InfiniBand on every host: TCP; gloo over eth0",
        ),
    ],
)
def test_the_line_says_what_joins_the_ranks(everyone, line):
    mixed = (
        "2 hosts × 1 H100, NVLink ×18; no InfiniBand on every host: TCP; gloo over an interface of its choice and eth0"
    )
    assert describe(everyone) == (line or mixed)


def test_ranks_are_listed_by_host():
    assert ranks_by_host(["a", "a", "b"]) == "0–1 on a, 2 on b"


def test_rank_0_tells_what_the_libraries_go_by(monkeypatch, caplog):
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    monkeypatch.setenv(GLOO_INTERFACE, "eth7")
    ranks = SimpleNamespace(exchange=lambda message: [message, {**message, "host": "b"}], is_first=True, world_size=2)
    with caplog.at_level("INFO"):
        tell_topology(ranks, torch.device("cpu"), 30)
    said = " | ".join(record.getMessage() for record in caplog.records)
    assert "2 hosts × 1 CPU" in said and "gloo over eth7" in said and "NCCL_IB_DISABLE=1" in said and "30 min" in said


def test_a_cpu_has_a_place_too(monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "INFINIBAND", tmp_path)
    for port in ("mlx5_0", "mlx5_1"):
        (tmp_path / port).mkdir()
    place = place_of(torch.device("cpu"))
    assert (place["device"], place["infiniband"], place["nvlinks"]) == ("CPU", 2, 0)


def test_nvlinks_that_are_up_are_counted_and_a_driver_that_says_no_is_told(monkeypatch):
    class NVMLError(Exception):
        pass

    states = [1, 1, 0]

    def state(handle, link):
        if link >= len(states):
            raise NVMLError("no such link")
        return states[link]

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetNvLinkState=state,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    assert nvlinks(torch.device("cuda", 0)) == (2, "")

    def no_driver():
        raise NVMLError("driver not loaded")

    nvml.nvmlInit = no_driver
    assert nvlinks(torch.device("cuda", 0)) == (0, "driver not loaded")
