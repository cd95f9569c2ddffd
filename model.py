"""The GPT, from token ids to loss.

    tokens -> token (+ position) embedding -> n_layer x Block -> norm -> logits over the vocabulary
    Block:   x + Attention(norm(x)), then x + FeedForward(norm(x)); or both at once on the same input

One model whose config spans the families: GPT-2 and OPT (learned positions, LayerNorm), GPT-NeoX (partial RoPE,
parallel residual), Llama (RoPE, RMSNorm, SwiGLU, grouped key heads) and Qwen3 (and QK-norm). The names and shapes of
the parameters are `pretrain.model_config.parameter_shapes`. Sizes below: B batch, T tokens, D width of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from pretrain.document_mask import DocumentMask
    from pretrain.kv_cache import KVCache
    from pretrain.model_config import ModelConfig

INIT_STD = 0.02

# A kernel maps (query, key, value, dropout probability) to causal attention: query (B, T, n_head, D), key and value
# (B, T, n_kv_head, D), result like query. One that keeps documents apart takes their mask, too.
AttentionKernel = Callable[..., Tensor]
Rotation = tuple[Tensor, Tensor]  # cosine and sine of RoPE, each (T, 1, rotary_dim) or (B, T, 1, rotary_dim)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The FlashAttention package: fp16 and bf16 on CUDA."""
    from flash_attn import flash_attn_func

    y: Tensor = flash_attn_func(q, k, v, dropout_p=dropout, causal=True)
    return y


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Torch's own; it picks its cuDNN, Flash or memory-efficient kernel by device, dtype and shape."""
    grouped = q.size(2) != k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, hidden: Tensor | None = None) -> Tensor:
    """Plain matrix products: runs everywhere, and keeps (B, n_head, T, T) scores in memory.

    `hidden` are the keys that each query does not see, bool (B, 1, T, T); None: all later ones."""
    shared_by = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(shared_by, 2), v.repeat_interleave(shared_by, 2)  # (B, T, n_head, D)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, D)
    T = q.size(-2)
    # scaled before the product, so that fp16 scores stay far from its limit of 65504
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, T)
    if hidden is None:
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(hidden, -math.inf).softmax(-1).type_as(v)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


KERNELS: dict[str, AttentionKernel] = {"flash": flash_attention, "sdpa": sdpa_attention, "plain": plain_attention}


class Undrawn(nn.Module):
    """A layer whose weights wait for `GPT.init_weights`: torch's own first draw takes several times as long."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Linear(Undrawn, nn.Linear): ...


class Embedding(Undrawn, nn.Embedding): ...


class Attention(nn.Module):
    """Causal self-attention of n_head heads over n_kv_head keys and values."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel, layer: int) -> None:
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # of queries, keys and values
        self.head_dim, self.dropout, self.qk_norm = config.head_dim, config.dropout, config.qk_norm
        self.kernel, self.layer = kernel, layer
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_dim, bias=bool(config.bias))
        self.proj = Linear(config.n_head * config.head_dim, config.d_model, bias=bool(config.bias))
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotation: Rotation | None = None, mask: Any = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T, d_model) to (B, T, d_model)."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_dim).split(self.heads, 2)  # each (B, T, heads, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            y = cache.attend(self.layer, q, k, v)  # (B, T, n_head, D)
        else:
            y = self.kernel(q, k, v, dropout) if mask is None else self.kernel(q, k, v, dropout, mask)
        out: Tensor = self.resid_drop(self.proj(y.flatten(2)))  # (B, T, d_model)
        return out


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """RoPE (Su et al. 2021) on the first rotary_dim numbers of each head, in halves as GPT-NeoX and Llama pair them."""
    cos, sin = rotation
    turned, kept = x.split([cos.size(-1), x.size(-1) - cos.size(-1)], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, kept), -1) if kept.size(-1) else turned


class FeedForward(nn.Module):
    """Up to d_ff, the non-linearity (SwiGLU with a gate of its own: Shazeer 2020), and down again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, bias = config.activation, bool(config.bias)
        if config.activation == "swiglu":
            self.gate = Linear(config.d_model, config.d_ff, bias=bias)
        self.up = Linear(config.d_model, config.d_ff, bias=bias)
        self.down = Linear(config.d_ff, config.d_model, bias=bias)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_model) to (B, T, d_model)."""
        if self.activation == "swiglu":
            x = F.silu(self.gate(x)) * self.up(x)  # (B, T, d_ff)
        elif self.activation == "relu":
            x = F.relu(self.up(x))
        else:
            x = F.gelu(self.up(x), approximate="tanh" if self.activation == "gelu_tanh" else "none")
        out: Tensor = self.resid_drop(self.down(x))  # (B, T, d_model)
        return out


def build_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=bool(config.bias))


class Block(nn.Module):
    """Attention and feed-forward; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.ln_1 = build_norm(config)
        self.attn = Attention(config, kernel, layer)
        self.ln_2 = build_norm(config)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rotation: Rotation | None = None, mask: Any = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T, d_model) to (B, T, d_model)."""
        attended = self.attn(self.ln_1(x), rotation, mask, cache)
        read = x if self.parallel else x + attended
        out: Tensor = x + attended + self.mlp(self.ln_2(read))
        return out


EXPENSIVE = (  # what selective activation checkpointing keeps: the matrix products and attention
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
)


def keep_expensive(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """What selective activation checkpointing does with an operation's result."""
    is_flash = op.namespace == "flash_attn"  # there only where the package is
    return CheckpointPolicy.MUST_SAVE if op in EXPENSIVE or is_flash else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, keep_expensive)


@torch.no_grad()
def draw(weight: Tensor, name: str, config: ModelConfig, generator: torch.Generator | None = None) -> Tensor:
    """Give one parameter its initial values; drawn one after the other, in the order of the module, they are a model's.

    GPT-2's: N(0, 0.02), biases 0, norms 1; the 2·n_layer matrices that write to the residual stream smaller, or 0.

    Args:
        weight: fp32, of the parameter's full shape.
        name: canonical.
    """
    if name.endswith(".bias"):
        return weight.zero_()
    if weight.ndim == 1:
        return weight.fill_(1.0)
    std = INIT_STD
    if name.endswith((".attn.proj.weight", ".mlp.down.weight")):
        std = 0.0 if config.zero_init else INIT_STD / math.sqrt(2 * config.n_layer)
    weight.normal_(std=std, generator=generator)
    if name in ("tok_emb.weight", "head.weight"):
        # The padding starts at 0 and gets no gradient, so neither AdamW nor weight decay ever moves it from there.
        weight[config.vocab_size :].zero_()
    return weight


class GPT(nn.Module):
    """The whole model.

    Args:
        config: a resolved ModelConfig.
        attention: name of the kernel, as `pretrain.kernels.choose_attention` returns it.
        documents: keeps the documents of a sequence apart, with a kernel of its own; None: they see those before them.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa", documents: DocumentMask | None = None) -> None:
        super().__init__()
        self.config = config
        self.documents = documents
        self.z_loss: Tensor | None = None  # of the last training pass, as it was added: a detached scalar
        self.tok_emb = Embedding(config.padded_vocab_size, config.d_model)
        if config.position == "learned":
            self.pos_emb = Embedding(config.seq_len, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        kernel = documents.attend if documents is not None else KERNELS[attention]
        self.blocks = nn.ModuleList(Block(config, kernel, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config)
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every parameter, in the order of the module; on the meta device none, where torch would import a lot."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                draw(parameter, name, self.config)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head (padded_vocab_size, d_model): the token embedding's where they are tied."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The loss of `targets`, or without them the logits.

        Args:
            tokens: int64 (B, T); with what the cache holds, at most `seq_len` of them.
            targets: int64 (B, T), the token that follows each one.
            cache: of the tokens before these; it takes these in. For evaluation only: without dropout or gradients,
                and all of a row is one document.

        Returns:
            With targets their mean cross entropy in nats per token, an fp32 scalar whatever the compute dtype; without,
            the logits (B, T, vocab_size) in the compute dtype, or with a soft-cap in fp32.

        Raises:
            ValueError: the sequence is longer than the model's context.
        """
        length, seen = tokens.size(1), cache.length if cache is not None else 0
        limit = self.config.seq_len
        if seen + length > limit:
            raise ValueError(f"a sequence of {seen + length} tokens is longer than the model's seq_len of {limit}")
        x = self.tok_emb(tokens)  # (B, T, d_model)
        positions, mask = self._places(tokens, x.dtype, cache)
        if self.config.position == "learned":
            x = x + self.pos_emb(positions)
        rotation = self._rotation(positions, x.dtype) if self.config.position == "rope" else None
        x = self.drop(x)
        for block in self.blocks:
            x = self._recomputed(block, x, rotation, mask) if self._recomputes() else block(x, rotation, mask, cache)
        if cache is not None:
            cache.length += length
        x = self.ln_f(x)  # (B, T, d_model)
        return self._logits(x) if targets is None else self._loss(x.flatten(0, 1), targets.flatten())

    def _places(self, tokens: Tensor, dtype: torch.dtype, cache: KVCache | None) -> tuple[Tensor, Any]:
        """The position of each token, int64 (T) or (B, T), and what keeps documents apart."""
        if cache is not None:
            return cache.positions(tokens.size(1)), None
        if self.documents is not None:
            return self.documents.read(tokens, dtype)
        return torch.arange(tokens.size(1), device=tokens.device), None

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """RoPE's cosines and sines; made anew each time, because a buffer would be rounded with the weights."""
        half = self.config.rotary_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
        angles = positions[..., None].float() * self.config.rope_theta**-exponents  # (…, T, half)
        angles = torch.cat((angles, angles), -1)[..., None, :]  # (…, T, 1, rotary_dim)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _logits(self, x: Tensor) -> Tensor:
        """(…, d_model) to (…, vocab_size). The head's padding is cut off: no probability, and so no gradient."""
        logits, cap = F.linear(x, self.head_weight)[..., : self.config.vocab_size], self.config.logit_softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of (n, d_model) and (n). Its gradient has the z-loss in it, too; its value never does."""
        chunks, factor = self.config.loss_chunks, self.config.z_loss if torch.is_grad_enabled() else 0.0
        if chunks == 1 and not factor:
            return F.cross_entropy(self._logits(x).float(), targets)

        def sums(x: Tensor, targets: Tensor) -> Tensor:  # of the cross entropy and of the z-loss (arXiv 2204.02311)
            logits = self._logits(x).float()
            loss = F.cross_entropy(logits, targets, reduction="none")  # log of the denominator, less the target's logit
            log_z = loss + logits.gather(1, targets[:, None])[:, 0] if factor else torch.zeros_like(loss)
            return torch.stack((loss, factor * log_z.square())).sum(1)

        recomputed = functools.partial(checkpoint, sums, use_reentrant=False, preserve_rng_state=False)
        pieces = zip(x.chunk(chunks), targets.chunk(chunks), strict=True)
        totals = [recomputed(*piece) if chunks > 1 else sums(*piece) for piece in pieces]
        loss, z_loss = (torch.stack(totals).sum(0) / len(targets)).unbind()
        if factor:
            self.z_loss = z_loss.detach()
        return loss + (z_loss - z_loss.detach())

    def _recomputes(self) -> bool:
        """Whether blocks forget their activations in this forward pass: only where a backward pass will follow."""
        return self.config.activation_checkpointing != "none" and self.training and torch.is_grad_enabled()

    def _recomputed(self, block: nn.Module, x: Tensor, rotation: Rotation | None, mask: Any) -> Tensor:
        """Run a block that keeps its input, or that and its matrix products. Dropout falls the same in both runs."""
        # without dropout the copies of the generator's state would be for nothing
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.config.dropout > 0}
        if self.config.activation_checkpointing == "selective":  # two calls: the compiler must see which function it is
            y: Tensor = checkpoint(block, x, rotation, mask, **how, context_fn=selective)
        else:
            y = checkpoint(block, x, rotation, mask, **how)
        return y

    def n_parameters(self) -> int:
        """Exact number of parameters: the vocabulary's padding not counted, a tied head counted once."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.d_model
        return sum(p.numel() for p in self.parameters()) - padding * (1 if self.config.tie_embeddings else 2)
