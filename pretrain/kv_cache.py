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
        capacity: most tokens that a row will hold.
        dtype: of the model's weights.

    Attributes:
        length: tokens held, padding included.
    """

    def __init__(self, config: ModelConfig, padding: Tensor, capacity: int, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, len(padding), config.n_kv_head, capacity, config.head_dim)
        self._stored = torch.zeros(shape, dtype=dtype, device=padding.device)
        self._padding = padding
        self._is_padded = bool(padding.any())
        self.length = 0

    def positions(self, count: int) -> Tensor:
        """The place of the next `count` tokens in each row's own text, int64 (B, count)."""
        places = torch.arange(self.length, self.length + count, device=self._padding.device)
        return (places - self._padding[:, None]).clamp(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the next T tokens' keys and values and attend to all that came before; shapes as for a kernel."""
        end = self.length + q.size(1)
        stored = self._stored[layer]
        stored[0, :, :, self.length : end], stored[1, :, :, self.length : end] = k.transpose(1, 2), v.transpose(1, 2)
        keys, values = stored[:, :, :, :end]  # each (B, n_kv_head, end, D)
        mask = None
        if q.size(1) > 1 or self._is_padded:
            key, query = torch.arange(end, device=q.device), torch.arange(self.length, end, device=q.device)
            seen = key >= self._padding[:, None, None]  # (B, 1, end)
            # padding sees itself: a row of the softmax must not be empty
            mask = ((key <= query[:, None]) & (seen | (key == query[:, None]))).unsqueeze(1)  # (B, 1, T, end)
        grouped = q.size(2) != k.size(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=grouped)
        return y.transpose(1, 2)
