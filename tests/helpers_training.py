"""A model small enough for a test, its tokens, and the one rank of a run without a launcher."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint import CheckpointReader, write_documents, write_manifest, write_parts
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.engine.base import Engine, ParameterState
from pretrain.ranks import Ranks, join
from pretrain.storage import ObjectStore
from tests.emulators import free_port

ROOT = Path(__file__).resolve().parents[1]
VOCAB, SEQ_LEN = 40, 12
PROCESS_TIMEOUT_S = 240
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TinyModel(nn.Module):
    """Two matrices (one tied), two biases, a norm: every kind of parameter that the engines must tell apart."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.mix = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCAB)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.1)  # so that the loss begins near ln(VOCAB)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.mix(self.embedding(inputs))))
        return F.cross_entropy(self.head(hidden).flatten(0, 1).float(), targets.flatten())


def tokens_of_step(step: int, sequences: int) -> Tensor:
    """The tokens (sequences, SEQ_LEN + 1) int64 of one step, the same ones at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCAB, (sequences, SEQ_LEN + 1), generator=generator)


@contextlib.contextmanager
def single_rank() -> Iterator[Ranks]:
    """The only rank of a run; the environment is as before afterwards."""
    before = {name: os.environ.pop(name, None) for name in LAUNCHER_VARIABLES}
    try:
        yield join(torch.device("cpu"), timeout_minutes=1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def copied_states(engine: Engine) -> dict[str, ParameterState]:
    """Every parameter and moment of an engine, as it is now."""
    return {
        name: {key: tensor.detach().clone() for key, tensor in state.items()}
        for name, state in engine.parameter_states()
    }


def reader_of(states: dict[str, ParameterState]) -> Callable[[str], ParameterState]:
    """What Engine.load reads from."""
    return lambda name: states[name]


def differing(left: dict[str, ParameterState], right: dict[str, ParameterState]) -> list[str]:
    """Names whose tensors are not the same to the last bit."""
    assert list(left) == list(right)
    return [name for name in left for key in left[name] if not torch.equal(left[name][key], right[name][key])]


def make_snapshot(step: int = 1, rank: int = 0, world_size: int = 1):
    """A snapshot of TinyModel's shapes, its values telling the step."""
    from pretrain.snapshot import take_snapshot

    return take_snapshot(states_of(step), rank, world_size)


def states_of(step: int) -> list[tuple[str, ParameterState]]:
    """Parameters of TinyModel, their values telling the step."""
    states = []
    for number, (name, parameter) in enumerate(TinyModel(seed=step).named_parameters(), 1):
        weight = parameter.detach()
        states.append((name, {"weight": weight, "exp_avg": weight * number, "exp_avg_sq": weight**2}))
    return states


def write_checkpoint(
    folder: Path, step: int, sequence: int, attempt: str = "attempt1", documents: dict[str, str] | None = None
) -> Manifest:
    """A committed checkpoint below `folder` (the run's), as one rank writes it."""
    name = CheckpointName(0, step, step)
    path = folder / str(name)
    path.mkdir(parents=True)
    snapshot = make_snapshot(step)
    files = write_parts(snapshot, path, 0, 1)
    files |= write_documents({"trainer_state.json": f'{{"step": {step}}}\n', **(documents or {})}, path)
    manifest = Manifest(name, attempt, sequence, files)
    write_manifest(manifest, path)
    return manifest


def read_states(folder: Path, manifest: Manifest) -> dict[str, ParameterState]:
    """Every parameter of a checkpoint, read back."""
    reader = CheckpointReader(folder / str(manifest.name), manifest)
    return {name: reader.parameter_state(name) for name, _ in TinyModel().named_parameters()}


def flip_a_byte(path: Path, offset: int = -1) -> None:
    """Damage a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


class FaultyStore:
    """A store whose calls can be made to fail or to wait, and which remembers them.

    Args:
        before: called with (method, object name) before each call; what it raises is the store's error.
    """

    def __init__(self, store: ObjectStore, before: Callable[[str, str], None] | None = None) -> None:
        self.store = store
        self.url = store.url
        self.before = before or (lambda method, name: None)
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, method: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            name = str(arguments[1] if method == "upload" else arguments[0] if arguments else "")
            self.calls.append((method, name))
            self.before(method, name)
            return getattr(self.store, method)(*arguments, **named)

        return call

    def names_of(self, method: str) -> list[str]:
        """Objects that a method was called for, in order."""
        return [name for called, name in self.calls if called == method]


def upload_checkpoint(store: ObjectStore, run_name: str, folder: Path, manifest: Manifest) -> None:
    """Commit a local checkpoint of `folder` (the run's) in the bucket, as another process would have."""
    for name in manifest.files:
        store.upload(folder / str(manifest.name) / name, f"{run_name}/{manifest.name}/{manifest.attempt}/{name}")
    store.create(f"{run_name}/{manifest.name}/manifest.json", manifest.to_bytes())


def run_two_ranks(body: str, *, nodes: int = 1, arguments: tuple[str, ...] = ()) -> list[Any]:
    """What each of two processes printed as JSON; see run_ranks."""
    return run_ranks(body, 2, nodes=nodes, arguments=arguments)


BEFORE = """
import json, sys, torch
from pretrain.ranks import join, leave
from pretrain.reports import end_at_once
me = join(torch.device("cpu"), 5)
"""


def run_ranks(
    body: str, world_size: int, *, nodes: int = 1, arguments: tuple[str, ...] = (), timeout_s: int = PROCESS_TIMEOUT_S
) -> list[Any]:
    """What each of so many processes printed as JSON.

    Args:
        body: the script; `me` is its Ranks, `sys.argv[1:]` the arguments.
        nodes: the ranks are divided among, as far as they can know.
    """
    script = (
        "import json, sys, torch\nfrom pretrain.ranks import join, leave\nfrom pretrain.reports import end_at_once\n"
    )
    script += f"me = join(torch.device('cpu'), 5)\n{textwrap.dedent(body)}\nleave(me)\nend_at_once(0)\n"
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    per_node = world_size // nodes
    for rank in range(world_size):
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node}
        environment = {**os.environ, **meet, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {key: str(value) for key, value in place.items()}
        command = [sys.executable, "-c", script, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
