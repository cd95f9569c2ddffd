"""prod_train.sh on two hosts, each with a network and disks of its own; they have nothing in common but the bucket.

`bash tests/integration/multinode.sh` runs all of it. Where hosts can't be made (no root) these tests say why they skip.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pretrain.discovery import AUTO, choose, take_inventory
from tests.emulators import fake_gcs
from tests.namespaces import Host, Network, network, why_not
from tests.runs import (
    ROOT,
    RUN,
    StartedProcess,
    commits,
    differing,
    final_state,
    losses,
    make_shards,
    store_of,
    tiny_config,
    train,
)

STEPS, EVERY = 160, 4
PORT = "29511"  # on hosts of their own every port is free
KEPT = ("PATH", "HOME", "TMPDIR", "LANG")
OPTIONS = ("--engine", "native", "--checkpoint.every_steps", str(EVERY), "--max-steps", str(STEPS))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    if reason := why_not():
        pytest.skip(reason)
    with network() as net:
        yield net


@pytest.fixture
def bucket(hosts: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """gs:// of an emulator on the bridge, with the shards in it."""
    with fake_gcs(tmp_path / "bucket", address=hosts.address) as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.endpoint)
        url = f"gs://{emulator.bucket}"
        store = store_of(f"{url}/shards")
        for path in make_shards(tmp_path / "shards").iterdir():
            store.upload(path, path.name)
        yield url


@dataclass
class Node:
    """One host with its disk; `start` is what its boot script would do."""

    host: Host
    number: int
    folder: Path
    bucket: str
    master: str

    def start(self, *options: str, **variables: str) -> StartedProcess:
        """`bash prod_train.sh` on this host, one rank."""
        self.folder.mkdir(exist_ok=True)
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment = {
            **kept,
            **{"STORAGE_EMULATOR_HOST": os.environ["STORAGE_EMULATOR_HOST"], "OMP_NUM_THREADS": "1"},
            **{"NNODES": "2", "NODE_RANK": str(self.number), "MASTER_ADDR": self.master, "MASTER_PORT": PORT},
            **{"GPUS": "1", "CONFIG": str(tiny_config(self.folder)), "RUN": RUN, "CUDA_VISIBLE_DEVICES": ""},
            **{"DATA": f"{self.bucket}/shards", "CHECKPOINTS": f"{self.bucket}/Checkpoints", **variables},
        }
        own = [f"--{name}={self.folder / place}" for name, place in OWN_PLACES.items()]
        script = [str(ROOT / "prod_train.sh"), "--skip-doctor"]  # which takes long, twice on one machine
        words = [*self.host.enter, "bash", *script, *own, *OPTIONS, *options]
        return StartedProcess(self.folder, words, environment)

    def kill(self) -> None:
        """The power is cut: SIGKILL to everything on this host."""
        while pids := subprocess.run(
            ["ip", "netns", "pids", self.host.name], capture_output=True, text=True, check=True
        ).stdout.split():
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)

    @property
    def restarts(self) -> list[dict[str, object]]:
        path = self.folder / "logs" / RUN / "restarts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


OWN_PLACES = {"checkpoint.dir": "checkpoints", "log.dir": "logs", "data.cache_dir": "cache"}


@pytest.fixture
def nodes(hosts: Network, bucket: str, tmp_path: Path) -> Iterator[list[Node]]:
    first = hosts.hosts[0].address
    made = [Node(host, n, tmp_path / f"disk{n}", bucket, first) for n, host in enumerate(hosts.hosts)]
    yield made
    for node in made:
        node.host.plug_in()
        node.kill()


def undisturbed(tmp_path: Path) -> Path:
    """The folder of the same run on two ranks of one machine that nothing happens to."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    (folder / "shards").symlink_to(tmp_path / "shards")
    ended = train(folder, *OPTIONS, ranks=2)
    assert ended.code == 0, ended.output
    return folder


def parts_of(node: Node) -> set[str]:
    """Which ranks' files of which checkpoints lie on a node's disk: "model-00001-of-00002"."""
    found = (node.folder / "checkpoints" / RUN).glob("checkpoint-*/model-*.safetensors")
    return {path.stem for path in found}


def test_a_host_that_is_killed_and_started_again_comes_back_into_the_run(nodes, bucket, tmp_path):
    first, second = nodes
    url = f"{bucket}/Checkpoints"
    with first.start() as one, second.start() as two:
        one.until(lambda: len(commits(url)) > 1, "two commits in the bucket")
        assert parts_of(first) == {"model-00001-of-00002"} and parts_of(second) == {"model-00002-of-00002"}
        second.kill()
        one.until_said("restart 1 of 3")
        with second.start() as again:
            codes = [process.wait().code for process in (one, again)]
        assert two.process.wait() != 0
    assert codes == [0, 0], one.output + again.output
    assert "on host-" in one.output and "resumed checkpoint-" in one.output
    assert [restart["restart"] for restart in first.restarts] == [1] and second.restarts == []
    assert not (second.folder / "logs" / RUN / "metrics.jsonl").exists()  # node 0 has the log
    assert commits(url)[-1] == STEPS
    calm = undisturbed(tmp_path)
    assert losses(first.folder) == losses(calm) and len(losses(calm)) == STEPS
    assert differing(state_in_bucket(bucket, tmp_path), final_state(calm)) == []


@pytest.mark.slow
def test_an_elastic_run_goes_on_alone_and_takes_the_other_host_in_again(nodes, bucket):
    first, second = nodes
    url, many = f"{bucket}/Checkpoints", ("--max-steps", "1000000")
    with first.start(*many, NNODES="1:2") as one, second.start(*many, NNODES="1:2"):
        one.until(lambda: commits(url), "a commit of two ranks")
        second.kill()
        one.until_said("1 rank on")  # after torchrun's 30 s for the last to come
        steps = commits(url)[-1]
        one.until(lambda: commits(url)[-1] > steps, "a commit of one rank")
        with second.start(*many, NNODES="1:2") as again:
            one.until(lambda: one.output.count("2 ranks on") == 2, "two ranks again")
            steps = commits(url)[-1]
            one.until(lambda: commits(url)[-1] > steps, "a commit of two ranks again")
            for process in (one, again):
                process.signal(signal.SIGTERM)
            codes = [process.wait().code for process in (one, again)]
    assert codes == [75, 75], one.output + again.output
    assert one.output.count("restart ") == 1, "a host that comes in is no crash"
    steps = list(losses(first.folder))
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_wire_that_is_cut_is_noticed_and_the_run_goes_on_when_it_is_mended(nodes, bucket):
    first, second = nodes
    hang = ("--train.hang_timeout_s", "4", "--storage.deadline_s", "5", "--storage.timeout_s", "5")
    with first.start(*hang) as one, second.start(*hang) as two:
        one.until(lambda: len(commits(f"{bucket}/Checkpoints")) > 1, "two commits in the bucket")
        second.host.unplug()
        one.until_said("rank 0 hangs")
        two.until_said("rank 1 hangs")
        second.host.plug_in()
        codes = [process.wait(patience_s=250).code for process in (one, two)]
    assert codes == [0, 0], one.output + two.output
    assert list(losses(first.folder)) == list(range(1, STEPS + 1))
    assert first.restarts and second.restarts


@pytest.mark.slow
def test_what_can_not_work_ends_every_node_within_half_a_minute_by_one_line(nodes):
    first, second = nodes
    with first.start() as one, second.start("--lr", "0.1") as two:
        one.until_said("config error")
        started = time.monotonic()
        ends = [process.wait() for process in (one, two)]
        assert time.monotonic() - started < 30
    assert [end.code for end in ends] == [2, 2]
    (line,) = ends[0].errors
    assert "rank 1 on host-" in line and "optim.lr is 0.1 instead of 0.003" in line
    assert ends[1].errors == []

    nowhere = second.master.rpartition(".")[0] + ".250"
    started = time.monotonic()
    with second.start(MASTER_ADDR=nowhere) as alone:
        end = alone.wait()
    assert end.code == 2 and time.monotonic() - started < 45  # the set-up's look at its packages included
    (line,) = end.errors
    assert f"the nodes could not meet at {nowhere}:{PORT}: node 0 can't be reached" in line


def state_in_bucket(bucket: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """What a fresh machine would resume."""
    store, folder = store_of(f"{bucket}/Checkpoints"), tmp_path / "fresh" / "checkpoints" / RUN
    assert choose(take_inventory(folder, store, RUN), AUTO, folder, store, RUN)
    return final_state(tmp_path / "fresh")
