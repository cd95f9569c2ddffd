from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pytest

from pretrain import communication
from pretrain.communication import GLOO_INTERFACE, SETTINGS, address_towards, interface_towards, settle, settled


@pytest.fixture
def unset(monkeypatch):
    for name in (*SETTINGS, GLOO_INTERFACE, "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def two_interfaces(monkeypatch):
    """lo and eth1, which leads everywhere."""
    found = {"lo": [SimpleNamespace(address="127.0.0.1")], "eth1": [SimpleNamespace(address="10.0.0.7")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    way = {"node-0": "10.0.0.7", "localhost": "127.0.0.1", communication.SOMEWHERE: "10.0.0.7"}
    monkeypatch.setattr(communication, "address_towards", way.get)


def test_what_is_set_stays_and_the_rest_is_set(unset):
    unset.setenv("NCCL_DEBUG", "INFO")
    settle(several_nodes=False)
    assert os.environ["NCCL_DEBUG"] == "INFO" and os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert GLOO_INTERFACE not in os.environ
    assert settled()["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("master", ["node-0", "localhost", "nowhere"])
def test_several_nodes_use_the_interface_that_leads_out(unset, two_interfaces, master):
    """Also on node 0, which reaches itself over the loopback."""
    unset.setenv("MASTER_ADDR", master)
    settle(several_nodes=True)
    assert os.environ[GLOO_INTERFACE] == "eth1"


def test_where_no_way_leads_out_nothing_is_said(unset, monkeypatch):
    monkeypatch.setattr(communication, "address_towards", lambda host: None)
    assert interface_towards("node-0") is None


def test_the_way_to_oneself_is_the_loopback_and_to_a_name_that_means_nothing_there_is_none():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") is None
