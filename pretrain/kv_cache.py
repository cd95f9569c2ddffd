"""What generation remembers of the tokens it has read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model_config import ModelConfig


class KVCache:
    """Keys and values of the tokens read so far, so that generation reads each token once.

    Args:
        config: of the model.
        padding: int64 (B,), tokens at the start of each row that don't count: shorter prompts are padded on the left.
        capacity: most tokens that a row will hold, padding included.

    Attributes:
        length: tokens held, padding included.
    """

    def __init__(self, config: ModelConfig, padding: Tensor, capacity: int) -> None:
        self._shape = (config.n_layer, 2, len(padding), config.n_kv_head, capacity, config.head_dim)
        self._stored = torch.empty(0)
        self._padding = padding
        self._is_padded = bool(padding.any())
        self._mask: Tensor | None = None
        self.length = 0

    def positions(self, count: int) -> Tensor:
        """The place of the next `count` tokens in each row's own text, int64 (B, count).

        It opens a forward pass over these tokens: the layers then share one mask.
        """
        end = self.length + count
        key = torch.arange(end, device=self._padding.device)
        query = key[self.length :]
        self._mask = None  # none is needed for the first tokens, which are causal, nor for a single new one
        if self._is_padded or (count > 1 and self.length):
            seen = key >= self._padding[:, None, None]  # (B, 1, end)
            # padding sees itself: a row of the softmax must not be empty
            seen = (key <= query[:, None]) & (seen | (key == query[:, None]))  # (B, count, end)
            self._mask = seen.unsqueeze(1)
        return (query - self._padding[:, None]).clamp(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the next T tokens' keys and values and attend to all that came before; shapes as for a kernel.

        Raises:
            ValueError: more tokens than the cache has room for.
        """
        count, end = q.size(1), self.length + q.size(1)
        if end > self._shape[4]:
            raise ValueError(f"{end} tokens don't fit into a cache of {self._shape[4]}")
        if not self._stored.numel():
            # of the keys' own dtype, which under mixed precision is not that of the weights
            self._stored = torch.zeros(self._shape, dtype=k.dtype, device=k.device)
        stored = self._stored[layer]
        stored[0, :, :, self.length : end], stored[1, :, :, self.length : end] = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = stored[:, :, :, :end]  # each (B, n_kv_head, end, D)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=self._mask,
            is_causal=self._mask is None and count > 1,
            enable_gqa=q.size(2) != k.size(2),
        )
        return y.transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, and the padding that they have in common.

        Args:
            rows: int64 (n,), n > 0, places in the batch in ascending order.
        """
        padding = self._padding[rows]
        spare = int(padding.min())
        self._stored = self._stored[:, :, rows, :, spare:]
        self._shape = (*self._shape[:2], len(rows), self._shape[3], self._shape[4] - spare, self._shape[5])
        self._padding = padding - spare
        self._is_padded = bool(self._padding.any())
        self.length -= spare
