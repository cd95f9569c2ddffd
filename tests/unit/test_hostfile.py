from __future__ import annotations

import socket

import pytest

from pretrain import hostfile
from pretrain.errors import ConfigError
from pretrain.hostfile import Host, own_number, parse_hostfile

TWO = "# the cluster\nworker-1 slots=4\n\n  worker-2   slots=4  # the other\n"
HOSTS = [Host("worker-1", 4), Host("worker-2", 4)]


def test_hosts_are_read_in_order_and_comments_are_not():
    assert parse_hostfile(TWO, "hosts") == HOSTS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "hosts names no host"),
        ("# nothing\n", "hosts names no host"),
        ("worker-1\n", "hosts, line 1: 'worker-1' is not NAME slots=GPUS"),
        ("worker-1 slots=0\n", "line 1: 'worker-1 slots=0' is not"),
        ("worker-1 slots=four\n", "line 1: 'worker-1 slots=four' is not"),
        ("a slots=4\na slots=4\n", "line 2: a is there twice"),
        ("a slots=4\nb slots=8\n", "as many slots as the others, found a 4, b 8"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, "hosts")
    assert words in str(caught.value)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_hostfile("a\nb slots=2\nb slots=2\n", "hosts")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("names", "addresses"), [({"worker-2"}, ()), ({"worker-2.cluster.local"}, ()), ({"x"}, ("10.0.0.2",))]
)
def test_a_machine_finds_itself_by_a_name_or_an_address(monkeypatch, names, addresses):
    known = {"worker-1": "10.0.0.1", "worker-2": "10.0.0.2"}
    monkeypatch.setattr(hostfile, "_resolves_to", lambda name: {known[name]})
    assert own_number(HOSTS, names, addresses, "hosts") == 1


def test_a_machine_that_is_in_no_line_or_in_two_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(hostfile, "_resolves_to", lambda name: set())
    with pytest.raises(ConfigError, match="hosts has no line for this machine, me: it names worker-1, worker-2") as one:
        own_number(HOSTS, {"me"}, (), "hosts")
    monkeypatch.setattr(hostfile, "_resolves_to", lambda name: {"10.0.0.1"})
    with pytest.raises(ConfigError, match="lines 1, 2 are all this machine"):
        own_number(HOSTS, {"me"}, ("10.0.0.1",), "hosts")
    assert "NODE_RANK=0 to 1" in str(one.value)


def test_the_command_prints_what_the_script_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NODE_RANK", raising=False)
    path = tmp_path / "hosts"
    path.write_text(f"worker-1 slots=4\n{socket.gethostname()} slots=4\n")
    assert hostfile.main([str(path)]) == 0
    assert capsys.readouterr().out == "4 2 1 worker-1\n"
    monkeypatch.setenv("NODE_RANK", "0")
    assert hostfile.main([str(path)]) == 0
    assert capsys.readouterr().out == "4 2 0 worker-1\n"


def test_a_wrong_command_line_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    assert hostfile.main([]) == 2 and "usage" in capsys.readouterr().err
    assert hostfile.main([str(tmp_path / "none")]) == 2
    assert "can't be read: No such file" in capsys.readouterr().err
    (tmp_path / "hosts").write_text(TWO)
    monkeypatch.setenv("NODE_RANK", "2")
    assert hostfile.main([str(tmp_path / "hosts")]) == 2
    assert "NODE_RANK=2 is not one of the 2 hosts" in capsys.readouterr().err
