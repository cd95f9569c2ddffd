"""The validation loss over all ranks, with any engine."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.engine.base import Engine
from pretrain.ranks import Ranks


def validation_loss(engine: Engine, sequences: Tensor, micro_size: int, ranks: Ranks) -> float:
    """The mean loss, nats per token, over the sequences of all ranks. Every rank must call it.

    Where a forward pass gathers weights from the other ranks, a rank with fewer sequences joins in with empty work:
    else the others would wait for it for ever.

    Args:
        sequences: this rank's, int64 (n, seq_len + 1); n may differ between ranks and be 0, but not on all of them.
        micro_size: sequences in one forward pass.
    """
    batches = [batch for batch in sequences.split(micro_size) if len(batch)]
    passes = len(batches)
    if engine.forward_is_collective:
        passes = max(answer["passes"] for answer in ranks.exchange({"passes": len(batches)}))
    total = 0.0
    for number in range(passes):
        if number < len(batches):
            total += engine.evaluate(batches[number]) * len(batches[number])
        else:
            engine.evaluate(torch.zeros(1, sequences.size(1), dtype=torch.int64))
    return ranks.mean(total) / ranks.mean(len(sequences))
