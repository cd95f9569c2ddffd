"""The GPT, from token ids to loss.

    tokens -> token + position embedding -> n_layer x Block -> LayerNorm -> logits over the vocabulary
    Block:   x + Attention(LayerNorm(x)), then x + FeedForward(LayerNorm(x))

Weights, numerics and initialisation are GPT-2's: learned positions, LayerNorm before each branch, tanh GELU, and an
output head that shares the token embedding's weight. Sizes: B batch, T tokens in a sequence, D = d_model / n_head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pretrain.config import ModelConfig

INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5

# A kernel maps (query, key, value, dropout probability) to causal attention; all tensors are (B, T, n_head, D).
AttentionKernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The FlashAttention package: fp16 and bf16 on CUDA."""
    from flash_attn import flash_attn_func

    y: Tensor = flash_attn_func(q, k, v, dropout_p=dropout, causal=True)
    return y


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Torch's own; it picks its cuDNN, Flash or memory-efficient kernel by device, dtype and shape."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Plain matrix products: runs everywhere, and keeps (B, n_head, T, T) scores in memory."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, D)
    T = q.size(-2)
    # scaled before the product, so that fp16 scores stay far from its limit of 65504
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(future, -math.inf).softmax(-1).type_as(v)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


KERNELS: dict[str, AttentionKernel] = {"flash": flash_attention, "sdpa": sdpa_attention, "plain": plain_attention}
KERNEL_TITLES = {"flash": "the FlashAttention package", "sdpa": "torch's fused attention", "plain": "plain matrices"}


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The attention kernel for this machine, tried out on it and not guessed from what is installed.

    Args:
        requested: "flash", "sdpa" or "plain"; "auto" takes the first of them, in this order, that runs.
        device: where the model will train.
        dtype: dtype of queries, keys and values: the compute precision.
        head_dim: d_model / n_head.

    Returns:
        The kernel's name for `GPT`, and the reason in words for the log.

    Raises:
        ValueError: the requested kernel can't run here, and why; or there is no kernel of that name.
    """
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype, head_dim):
            raise ValueError(f"attention kernel {requested!r} can't run on {device}: {obstacle}")
        return requested, f"{KERNEL_TITLES[requested]}, as requested"
    passed_over = ""
    for name in KERNELS:
        obstacle = _obstacle(name, device, dtype, head_dim)
        if not obstacle:
            return name, f"{KERNEL_TITLES[name]}{passed_over}"
        passed_over += f"; {KERNEL_TITLES[name]} can't run: {obstacle}"
    raise ValueError(f"no attention kernel runs on {device}{passed_over}")


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel can't train here, or ''. Found by a tiny forward and backward pass against plain attention."""
    if name not in KERNELS:
        return f"there is no such kernel, only {', '.join(KERNELS)}"
    if name == "flash" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
        return f"it takes fp16 and bf16 on CUDA only, not {str(dtype).removeprefix('torch.')} on {device.type}"
    # not random numbers: the probe must leave the seeded generators where they were
    wave = torch.linspace(-40, 40, 3 * 16 * head_dim, device=device).sin().to(dtype)
    qkv = wave.view(3, 1, 16, 1, head_dim).requires_grad_()
    q, k, v = qkv.unbind(0)  # each (B = 1, T = 16, n_head = 1, D)
    try:
        y = KERNELS[name](q, k, v, 0.0)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), qkv, retain_graph=True)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    expected = plain_attention(q, k, v, 0.0)
    (expected_gradient,) = torch.autograd.grad(expected.float().square().sum(), qkv)
    close = torch.allclose(y, expected, atol=0.05) and torch.allclose(gradient, expected_gradient, atol=0.1)
    return "" if close else "it runs, but its results are wrong"


class Linear(nn.Linear):
    """nn.Linear whose weights wait for `GPT.init_weights`: torch's own first draw takes several times as long."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Embedding(nn.Embedding):
    """nn.Embedding whose weights wait for `GPT.init_weights`."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Attention(nn.Module):
    """Causal self-attention over n_head heads."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.kernel = kernel
        self.qkv = Linear(config.d_model, 3 * config.d_model)
        self.proj = Linear(config.d_model, config.d_model)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_model) to (B, T, d_model)."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).unbind(2)  # each (B, T, n_head, D)
        y = self.kernel(q, k, v, self.dropout if self.training else 0.0)  # (B, T, n_head, D)
        out: Tensor = self.resid_drop(self.proj(y.flatten(2)))  # (B, T, d_model)
        return out


class FeedForward(nn.Module):
    """Up to d_ff, GELU, and down again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_model) to (B, T, d_model)."""
        x = F.gelu(self.up(x), approximate="tanh")  # (B, T, d_ff)
        out: Tensor = self.resid_drop(self.down(x))  # (B, T, d_model)
        return out


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.attn = Attention(config, kernel)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_model) to (B, T, d_model)."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The whole model.

    Args:
        config: a resolved ModelConfig.
        attention: name of the kernel, as `choose_attention` returns it.
    """

    def __init__(self, config: ModelConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.tok_emb = Embedding(config.padded_vocab_size, config.d_model)
        self.pos_emb = Embedding(config.seq_len, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, KERNELS[attention]) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), biases 0; what writes to the residual stream is scaled down by its 2·n_layer writers."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()  # weight 1, bias 0
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                writes_to_residual = name.endswith((".attn.proj", ".mlp.down"))
                nn.init.normal_(module.weight, std=residual_std if writes_to_residual else INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # The padding starts at 0 and gets no gradient, so neither AdamW nor weight decay ever moves it from there.
        self.tok_emb.weight[self.config.vocab_size :].zero_()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The loss of `targets`, or without them the logits.

        Args:
            tokens: int64 (B, T), T at most `seq_len`.
            targets: int64 (B, T), the token that follows each one.

        Returns:
            With targets their mean cross entropy in nats per token, an fp32 scalar whatever the compute dtype; without,
            the logits (B, T, vocab_size) in the compute dtype.

        Raises:
            ValueError: the sequence is longer than the model has positions.
        """
        length, limit = tokens.size(1), self.config.seq_len
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's seq_len of {limit}")
        positions = torch.arange(length, device=tokens.device)  # (T)
        x = self.drop(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, d_model)
        for block in self.blocks:
            x = self._recomputed(block, x) if self._recomputes() else block(x)  # (B, T, d_model)
        # The head is the token embedding. Its padding is cut off here: no probability, and so no gradient.
        logits = F.linear(self.ln_f(x), self.tok_emb.weight)[..., : self.config.vocab_size]  # (B, T, vocab_size)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _recomputes(self) -> bool:
        """Whether blocks forget their activations in this forward pass: only where a backward pass will follow."""
        return self.config.activation_checkpointing and self.training and torch.is_grad_enabled()

    def _recomputed(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block that keeps its input only. Dropout falls the same in both runs: the generator is put back."""
        keep_rng = self.config.dropout > 0  # without dropout the copies of its state would be for nothing
        y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=keep_rng)
        return y

    def n_parameters(self) -> int:
        """Exact number of parameters: the vocabulary's padding not counted, the tied head counted once."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.d_model
        return sum(parameter.numel() for parameter in self.parameters()) - padding


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of training on one token, 6·N + 12·n_layer·d_model·seq_len (PaLM, appendix B).

    N counts the weights that multiply every token: the four matrices of each block (qkv, proj, up, down), and the tied
    embedding once, for its work as the output head. Not in it: the look-ups of tokens and positions, biases,
    LayerNorms, and the padding of the vocabulary. 6 is a multiply and an add, once forward and twice backward.
    Attention counts the whole T × T square, as nanoGPT and PaLM do, although the causal half would be enough; what
    activation checkpointing computes twice counts once. So MFU compares with what others publish.

    Args:
        config: a resolved ModelConfig.
        seq_len: tokens in a training sequence.
    """
    per_block = 4 * config.d_model**2 + 2 * config.d_model * config.d_ff
    n_matmul = config.n_layer * per_block + config.vocab_size * config.d_model
    return 6.0 * n_matmul + 12.0 * config.n_layer * config.d_model * seq_len
