from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from pretrain import alike
from pretrain.errors import ConfigError, ShardError

SETTINGS = {"optim": {"lr": 1e-3}, "data": {"source": "gs://b/d", "cache_dir": "/a"}}


def ranks_of(others):
    """Ranks whose rank 0 is the caller; `others` make the other ranks' messages from its own."""
    exchange = lambda message: [message, *(change(copy.deepcopy(message)) for change in others)]  # noqa: E731
    return SimpleNamespace(exchange=exchange, is_first=True)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pretrain").mkdir()
    for name in ("train.py", "model.py", "pretrain/config.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


def changed(kind, name, value):
    def change(message):
        message["host"] = "other"
        message[kind][name] = value
        return message

    return change


def test_ranks_that_are_alike_may_run(root):
    alike.check_alike(ranks_of([dict, lambda message: {**message, "host": "elsewhere"}]), root, SETTINGS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("settings", "optim.lr", "0.002"), "optim.lr is 0.002 instead of 0.001"),
        (changed("packages", "torch", "2.11.0"), "torch is 2.11.0 instead of"),
        (lambda message: {**message, "host": "other", "code": "0" * 12}, "code 000000000000 instead of"),
    ],
)
def test_what_differs_is_named_with_rank_and_host(root, change, words):
    with pytest.raises(ConfigError, match="rank 1 on other is not like rank 0") as caught:
        alike.check_alike(ranks_of([change]), root, SETTINGS)
    assert words in str(caught.value) and caught.value.shared


def test_a_node_may_have_its_own_folders(root):
    own = {**SETTINGS, "data": {**SETTINGS["data"], "cache_dir": "/b"}}
    assert alike._identity(root, SETTINGS) == alike._identity(root, own)


def test_the_hash_sees_every_file_and_its_name(root):
    seen = {alike.code_hash(root)}
    (root / "pretrain/config.py").write_text("# other\n")
    seen.add(alike.code_hash(root))
    (root / "pretrain/config.py").rename(root / "pretrain/shape.py")
    seen.add(alike.code_hash(root))
    assert len(seen) == 3


def test_other_data_on_a_node_is_named(tmp_path):
    alike.check_same_data(ranks_of([dict]), "gs://b/d", "f" * 64, 3, "{}")

    def elsewhere(message):
        return {**message, "host": "other", "shards": 2, "manifest.json": "none"}

    with pytest.raises(ShardError, match=r"gs://b/d: rank 1 on other did not find what rank 0 on ") as caught:
        alike.check_same_data(ranks_of([elsewhere]), "gs://b/d", "f" * 64, 3, "{}")
    assert "shards 2 instead of 3, manifest.json none instead of " in str(caught.value) and caught.value.shared
