"""The shape of a model: families, sizes, and every parameter's name and shape. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["gpt", "neox", "llama", "qwen3", "opt"]

FAMILIES: dict[Family, dict[str, Any]] = {
    # what a family says where the config doesn't; any field may be given beside it
    "gpt": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "neox": {
        "position": "rope",
        "rotary_pct": 0.25,
        "norm": "layernorm",
        "activation": "gelu",
        "bias": True,
        "parallel_residual": True,
    },
    "llama": {"position": "rope", "norm": "rmsnorm", "activation": "swiglu"},
    "qwen3": {
        "position": "rope",
        "rope_theta": 1e6,
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
        "activation": "swiglu",
        "qk_norm": True,
    },
    "opt": {"position": "learned", "norm": "layernorm", "activation": "relu", "bias": True, "tie_embeddings": True},
}
COMMON: dict[str, Any] = {
    # what every family says that doesn't say otherwise
    "rotary_pct": 1.0,
    "rope_theta": 10_000.0,
    "norm_eps": 1e-5,
    "bias": False,
    "parallel_residual": False,
    "qk_norm": False,
    "tie_embeddings": False,
}
ROPE_OPTIONS = ("rotary_pct", "rope_theta")  # they mean nothing with learned positions


@dataclass(frozen=True)
class Size:
    """What the alias of a size stands for.

    Args:
        family: the family that it is taken for where none is named.
        n_kv_head: key and value heads; 0: as many as heads.
    """

    n_layer: int
    n_head: int
    d_model: int
    n_kv_head: int = 0
    family: Family = "gpt"


MODEL_SIZES: dict[str, Size] = {
    "125M": Size(12, 12, 768),
    "350M": Size(24, 16, 1024),
    "760M": Size(24, 16, 1536),
    "1.2B": Size(24, 16, 2048),
    "1.3B": Size(24, 16, 2048),
    "3B": Size(32, 20, 2560),
    "7B": Size(32, 32, 4096),
    "8B": Size(36, 32, 4096),
    "tiny": Size(6, 8, 256, family="llama"),
    "small": Size(12, 12, 768, family="llama"),
    "medium": Size(24, 16, 1024, 8, family="llama"),
    "large": Size(24, 16, 1536, 8, family="llama"),
    "xl": Size(32, 32, 2048, 8, family="llama"),
}
VOCAB_MULTIPLE = 128  # tensor cores want a vocabulary divisible by this; the padding rows never get a probability
SWIGLU_MULTIPLE = 256  # what 8/3 × d_model is rounded up to: three matrices then weigh about what two of 4 × d_model do


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. 0, empty and null mean: taken from `size` and `family`."""

    family: Literal["", "gpt", "neox", "llama", "qwen3", "opt"] = ""
    """Architecture: what the fields below are where they are not given. Empty: llama for the sizes tiny to xl, gpt
    for the others."""
    size: str = "1.2B"
    """Alias of a shape: 125M, 350M, 760M, 1.2B, 1.3B, 3B, 7B, 8B, tiny, small, medium, large, xl; or custom."""
    n_layer: int = 0
    """Number of blocks."""
    n_head: int = 0
    """Number of attention heads."""
    n_kv_head: int = 0
    """Number of key and value heads, each shared by n_head / n_kv_head heads (GQA); n_head where nothing else says."""
    d_model: int = 0
    """Width of the residual stream."""
    head_dim: int = 0
    """Width of a head; d_model / n_head where it is 0."""
    d_ff: int = 0
    """Width of the feed-forward layer; where it is 0, 4 × d_model, and with swiglu 8/3 × d_model up to a multiple of
    256."""
    vocab_size: int = 50257
    """Number of token ids of the tokenizer."""
    seq_len: int = 2048
    """Tokens in a training sequence: the context, and the number of learned positions."""
    position: Literal["", "learned", "rope"] = ""
    """How a token's place is told: a learned embedding, or rotated queries and keys (RoPE)."""
    rotary_pct: float = 0.0
    """Share of each head that RoPE rotates, in (0, 1]."""
    rope_theta: float = 0.0
    """RoPE's base: the longest wavelength is about 2π times it."""
    norm: Literal["", "layernorm", "rmsnorm"] = ""
    """Normalisation before each branch and before the head."""
    norm_eps: float = 0.0
    """What is added to the variance."""
    activation: Literal["", "gelu_tanh", "gelu", "relu", "swiglu"] = ""
    """Non-linearity of the feed-forward layer; swiglu has a third matrix, the gate."""
    bias: bool | None = None
    """Biases in the linear layers and in LayerNorm."""
    parallel_residual: bool | None = None
    """Attention and feed-forward read the same input and are added at once, instead of one after the other."""
    qk_norm: bool | None = None
    """RMSNorm of each head's queries and keys before RoPE."""
    tie_embeddings: bool | None = None
    """The output head is the token embedding."""
    zero_init: bool = False
    """The matrices that write to the residual stream start at zero, so that each block begins as the identity."""
    logit_softcap: float = 0.0
    """Logits are bent to stay within ± this: cap × tanh(logits / cap). 0: they are left as they are."""
    z_loss: float = 0.0
    """Factor of the z-loss, the mean squared log of the softmax's denominator, which is trained on beside the cross
    entropy and reported apart from it; 1e-4 is usual. 0: none."""
    dropout: float = 0.1
    """Dropout probability on embeddings, attention and residual branches."""
    attention: Literal["auto", "flash", "flex", "sdpa", "plain"] = "auto"
    """Attention kernel: the FlashAttention package, torch's flex attention (with data.document_mask only), torch's
    fused kernels, or plain matrices; auto takes the best."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, all but the matrix products and attention,
    or whole blocks."""
    loss_chunks: int = 1
    """Pieces in which logits and loss are computed; with more than 1 the full logits never exist."""
    init_from: str = ""
    """Folder of a Hugging Face model (config.json and safetensors) whose shape and weights a fresh run starts from."""

    def resolve(self) -> ModelConfig:
        """This config with all that is left open filled in; an unknown size leaves 0, for `model_problems`."""
        size = MODEL_SIZES.get(self.size, Size(0, 0, 0))
        family = self.family or size.family
        style = {**COMMON, **FAMILIES[family]}
        if (self.position or style["position"]) == "learned":  # what a family says of RoPE is not said of this model
            style |= {name: COMMON[name] for name in ROPE_OPTIONS}
        chosen = {
            name: value for name in style if (value := getattr(self, name)) not in ("", 0.0, None) or value is False
        }
        style |= chosen
        n_head, d_model = self.n_head or size.n_head, self.d_model or size.d_model
        # a size's key heads belong to its own number of heads
        n_kv_head = self.n_kv_head or (size.n_kv_head if n_head == size.n_head else 0) or n_head
        return dataclasses.replace(
            self,
            family=family,
            n_layer=self.n_layer or size.n_layer,
            n_head=n_head,
            n_kv_head=n_kv_head,
            d_model=d_model,
            head_dim=self.head_dim or (d_model // n_head if n_head else 0),
            d_ff=self.d_ff or _default_d_ff(d_model, style["activation"]),
            **style,
        )

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128: the rows the embedding really has."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rotary_dim(self) -> int:
        """How many of a head's head_dim numbers RoPE rotates."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def n_parameters(self) -> int:
        """Exact number of parameters of the resolved shape: the vocabulary not padded, a tied head once."""
        embeddings = 1 if self.tie_embeddings else 2
        padding = (self.padded_vocab_size - self.vocab_size) * self.d_model * embeddings
        return sum(math.prod(shape) for _, shape in parameter_shapes(self)) - padding

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training on one token, 6·N + 12·n_layer·n_head·head_dim·seq_len (PaLM, appendix B).

        N counts the weights that multiply every token: the matrices of each block, and the output head, tied or not.
        Not in it: the look-ups of tokens and positions, biases, norms, RoPE, and the padding of the vocabulary. 6 is a
        multiply and an add, once forward and twice backward. Attention counts the whole T × T square, as nanoGPT and
        PaLM do, although the causal half would be enough; what activation checkpointing computes twice counts once. So
        MFU compares with what others publish.
        """
        matrices = (math.prod(shape) for name, shape in _block_shapes(self) if len(shape) == 2)
        n_matmul = self.n_layer * sum(matrices) + self.vocab_size * self.d_model
        return 6.0 * n_matmul + self._attention_flops

    @property
    def causal_flops_per_token(self) -> float:
        """As `flops_per_token`, with attention counted causal: only the half of the T × T square that is of use, as
        causal kernels compute it."""
        return self.flops_per_token - self._attention_flops / 2

    @property
    def _attention_flops(self) -> float:
        return 12.0 * self.n_layer * self.n_head * self.head_dim * self.seq_len


def _default_d_ff(d_model: int, activation: str) -> int:
    if activation != "swiglu":
        return 4 * d_model
    return math.ceil(8 * d_model / 3 / SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE


def parameter_shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(canonical name, shape) of every parameter of a resolved shape, in the order of the module."""
    d, vocab = model.d_model, model.padded_vocab_size
    yield "tok_emb.weight", (vocab, d)
    if model.position == "learned":
        yield "pos_emb.weight", (model.seq_len, d)
    for layer in range(model.n_layer):
        for name, shape in _block_shapes(model):
            yield f"blocks.{layer}.{name}", shape
    yield from _norm_shapes(model, "ln_f")
    if not model.tie_embeddings:
        yield "head.weight", (vocab, d)


def _block_shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, wide = model.d_model, model.n_head * model.head_dim
    yield from _norm_shapes(model, "ln_1")
    yield from _linear_shapes(model, "attn.qkv", wide + 2 * model.n_kv_head * model.head_dim, d)
    yield from _linear_shapes(model, "attn.proj", d, wide)
    if model.qk_norm:
        yield "attn.q_norm.weight", (model.head_dim,)
        yield "attn.k_norm.weight", (model.head_dim,)
    yield from _norm_shapes(model, "ln_2")
    if model.activation == "swiglu":
        yield from _linear_shapes(model, "mlp.gate", model.d_ff, d)
    yield from _linear_shapes(model, "mlp.up", model.d_ff, d)
    yield from _linear_shapes(model, "mlp.down", d, model.d_ff)


def _linear_shapes(model: ModelConfig, name: str, n_out: int, n_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (n_out, n_in)
    if model.bias:
        yield f"{name}.bias", (n_out,)


def _norm_shapes(model: ModelConfig, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (model.d_model,)
    if model.norm == "layernorm" and model.bias:
        yield f"{name}.bias", (model.d_model,)


def model_problems(model: ModelConfig) -> list[str]:
    """What makes a resolved shape impossible, each with its mend."""
    m = model
    if m.size not in MODEL_SIZES and (m.size != "custom" or not (m.n_layer and m.n_head and m.d_model)):
        known = ", ".join(MODEL_SIZES)
        return [f"model.size is {m.size!r}; known are {known}, or 'custom' with n_layer, n_head and d_model given"]
    if min(m.n_layer, m.n_head, m.n_kv_head, m.d_model, m.head_dim, m.d_ff) < 1:
        return ["model sizes (n_layer, n_head, n_kv_head, d_model, head_dim, d_ff) must be positive"]
    rotates = m.position == "rope"
    rules = [
        (
            m.head_dim == m.d_model // m.n_head and m.d_model % m.n_head,
            f"model.d_model {m.d_model} is not divisible by model.n_head {m.n_head}",
        ),
        (m.n_head % m.n_kv_head, f"model.n_head {m.n_head} is not divisible by model.n_kv_head {m.n_kv_head}"),
        (not 2 <= m.vocab_size <= 2**32, f"model.vocab_size {m.vocab_size} must be in [2, 2**32]"),
        (m.seq_len < 1, f"model.seq_len {m.seq_len} must be at least 1"),
        (not 0 <= m.dropout < 1, f"model.dropout {m.dropout} must be in [0, 1)"),
        (m.norm_eps < 0, f"model.norm_eps {m.norm_eps} must not be negative"),
        (m.rope_theta <= 1, f"model.rope_theta {m.rope_theta} must be above 1"),
        (not 0 < m.rotary_pct <= 1, f"model.rotary_pct {m.rotary_pct} must be in (0, 1]"),
        *(
            (
                not rotates and getattr(m, name) != COMMON[name],
                f"model.{name} {getattr(m, name)} means nothing with learned positions: it is of --model.position rope",
            )
            for name in ROPE_OPTIONS
        ),
        (
            rotates and (m.rotary_dim < 2 or m.rotary_dim % 2),
            f"model.rotary_pct {m.rotary_pct} of model.head_dim {m.head_dim} rotates {m.rotary_dim} numbers: "
            "RoPE turns pairs, so it must be even and at least 2",
        ),
        (m.logit_softcap < 0, f"model.logit_softcap {m.logit_softcap} must be positive, or 0 for none"),
        (m.z_loss < 0, f"model.z_loss {m.z_loss} must be positive, or 0 for none"),
        (m.loss_chunks < 1, f"model.loss_chunks {m.loss_chunks} must be at least 1"),
    ]
    return [problem for broken, problem in rules if broken]
