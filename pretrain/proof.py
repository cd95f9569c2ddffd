"""Is a run that was killed and resumed the run that it would have been? Settings small enough to try, and the answer.

Compared to the last bit: every record ever written, those of steps that a kill lost included, and the final weights
and moments. Windows are counted from the positions that the checkpoints record: each must be trained on once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pretrain.batches import Batches, Position
from pretrain.checkpoint import CheckpointReader, damaged_files
from pretrain.config import BatchConfig, OptimConfig
from pretrain.errors import CheckpointError
from pretrain.model_config import ModelConfig
from pretrain.trial import Record, Trial

COMPARED = ("loss", "grad_norm", "lr", "loss_scale", "tokens", "files", "epoch", "skipped_updates")
SMALL_HEADS, SMALL_HEAD_DIM, SMALL_LAYERS = 4, 16, 2
SMALL_SEQ_LEN, SMALL_VOCAB, SMALL_MICRO, SMALL_ACCUMULATION = 64, 512, 2, 2
MADE_SHARDS = 8
MADE_EPOCHS = 1.3  # passes over the made shards, so that the end of an epoch is crossed


# ---- small enough to try ----


def small_model(model: ModelConfig, *, keep_vocabulary: bool) -> ModelConfig:
    """A resolved model's shape made small; its family, dropout, kernels and all other kinds of things stay.

    Args:
        keep_vocabulary: where the shards are given, their token ids must fit.
    """
    shared = model.n_head // model.n_kv_head  # heads that share their keys, 1 without GQA
    n_head = min(model.n_head, max(SMALL_HEADS // shared, 1) * min(shared, SMALL_HEADS))
    n_kv_head = max(n_head // shared, 1)
    head_dim = min(model.head_dim, SMALL_HEAD_DIM)
    d_model = min(model.d_model, n_head * head_dim)
    d_ff = max(8, round(d_model * model.d_ff / model.d_model / 8) * 8)
    return dataclasses.replace(
        model,
        size="custom",
        n_layer=min(model.n_layer, SMALL_LAYERS),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        d_model=d_model,
        d_ff=min(model.d_ff, d_ff),
        vocab_size=model.vocab_size if keep_vocabulary else min(model.vocab_size, SMALL_VOCAB),
        seq_len=min(model.seq_len, SMALL_SEQ_LEN),
        init_from="",
    )


def small_batch(batch: BatchConfig, world_size: int) -> BatchConfig:
    """A small batch, accumulated where the given one is."""
    batch = batch.settled
    micro = min(batch.micro_size, SMALL_MICRO)
    accumulation = min(batch.accumulation(world_size), SMALL_ACCUMULATION)
    return dataclasses.replace(batch, micro_size=micro, global_size=micro * accumulation * world_size)


def small_schedule(optim: OptimConfig, steps: int) -> OptimConfig:
    """A warm-up that ends within a quarter of so many steps."""
    return dataclasses.replace(optim, warmup_steps=min(optim.warmup_steps, steps // 4))


def make_shards(folder: Path, n_tokens: int, vocab_size: int, seed: int) -> Path:
    """Shards of tokens that a model can learn from: a walk of small steps through the vocabulary."""
    folder.mkdir(parents=True)
    each = -(-n_tokens // MADE_SHARDS)
    steps = np.random.default_rng(seed).integers(1, 4, MADE_SHARDS * each)
    walk = (np.cumsum(steps) % vocab_size).astype(np.uint32)
    for index, tokens in enumerate(np.split(walk, MADE_SHARDS)):
        np.savez(folder / f"tokenized_cleaned_{index:03d}.npz", input_ids=tokens)
    return folder


# ---- the answer ----


def differing_records(expected: Sequence[Record], found: Sequence[Record]) -> list[str]:
    """Each figure of each record that differs from the uninterrupted run's in any bit, in words."""
    by_step = {record["step"]: record for record in expected}
    problems = []
    for record in found:
        other = by_step.get(record["step"])
        if other is None:
            problems.append(f"step {record['step']} is not one of the uninterrupted run's")
            continue
        # JSON writes a float with as many digits as give it back exactly, so equal digits are equal bits
        differing = [name for name in COMPARED if repr(record.get(name)) != repr(other.get(name))]
        problems += [
            f"step {record['step']}: {name} is {record.get(name)} and was {other.get(name)}" for name in differing
        ]
    return problems


def missing_steps(expected: Sequence[Record], found: Sequence[Record]) -> list[int]:
    """Steps that the uninterrupted run recorded and the other one never did."""
    return sorted({record["step"] for record in expected} - {record["step"] for record in found})


def differing_tensors(whole: Trial, killed: Trial) -> tuple[int, list[str]]:
    """(tensors compared, names of those that are not the same to the last bit) of both runs' last checkpoints.

    Raises:
        CheckpointError: one of them is missing, damaged, or of another step.
    """
    left, right = _reader(whole), _reader(killed)
    if left.manifest.name != right.manifest.name:
        raise CheckpointError(f"the runs end at {left.manifest.name} and at {right.manifest.name}")
    names = sorted({*left.parameter_names, *right.parameter_names})
    compared, problems = 0, []
    for name in names:
        one, other = left.parameter_state(name), right.parameter_state(name)
        for key in sorted({*one, *other}):
            compared += 1
            same = key in one and key in other and _same_bits(one[key], other[key])
            problems += [] if same else [f"{name} ({key})"]
    return compared, problems


def _reader(trial: Trial) -> CheckpointReader:
    manifest = trial.newest_commit()
    folder = trial.checkpoints / str(manifest.name)
    if problems := damaged_files(manifest, folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems[:3])}")
    return CheckpointReader(folder, manifest)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


def windows_off(batches: Batches, trial: Trial, last_step: int) -> tuple[int, int]:
    """(windows trained on more than once, windows passed over) on the way that a trial's final weights took.

    Each start took windows from the position that its checkpoint records, one step's worth for each step that counts:
    those up to the next start's checkpoint. In an unbroken run they are 0 to last_step × global_size - 1.

    Raises:
        CheckpointError: a checkpoint recorded no position, or one where no step ends.
    """
    taken = _windows_at_step_ends(batches, last_step)
    owner = np.zeros(last_step, dtype=np.int64)
    for number, start in enumerate(trial.starts):
        owner[start.first_step :] = number  # a later start replaces what was lost
    counts = np.zeros(2 * batches.global_size * (last_step + 1), dtype=np.int64)
    for number, start in enumerate(trial.starts):
        steps = int((owner == number).sum())
        position = trial.positions.get(start.first_step)
        if position not in taken:
            raise CheckpointError(f"step {start.first_step} was resumed at {position}, where no step ends")
        counts[taken[position] : taken[position] + steps * batches.global_size] += 1
    expected = last_step * batches.global_size
    return int(np.maximum(counts - 1, 0).sum()), int((counts[:expected] == 0).sum())


def _windows_at_step_ends(batches: Batches, last_step: int) -> dict[Position | None, int]:
    """Position -> windows taken before it, for the end of every step."""
    position = Position()
    taken: dict[Position | None, int] = {}
    for step in range(last_step + 1):
        taken[position] = step * batches.global_size
        _, position = batches.take(position, 0, batches.global_size)  # one window: the position after is the same
    return taken
