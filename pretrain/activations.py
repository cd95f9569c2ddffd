"""Bytes that a forward pass leaves behind for the backward pass, counted tensor by tensor. No torch here.

Counted is what autograd saves on a GPU, where norms and attention are fused kernels; a test holds it against torch's
own memory tracker. Sizes below: c bytes of compute precision, B micro batch, T tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.model_config import ModelConfig

FP32_BYTES = 4
TOKEN_BYTES = 8  # int64
FEED_FORWARD_SAVED = {
    # (B, T, d_ff) tensors that one block saves: inputs of the non-linearity and of down; of SwiGLU the gate before and
    # behind silu, what it multiplies, and the product; of ReLU its result alone
    "gelu_tanh": 2,
    "gelu": 2,
    "relu": 1,
    "swiglu": 4,
}
FEED_FORWARD_PASSING = {
    # (B, T, d_ff) gradients that exceed what was freed before them, at their fullest
    "gelu_tanh": 1,
    "gelu": 1,
    "relu": 2,
    "swiglu": 2,
}


@dataclass(frozen=True)
class Activations:
    """What one rank's micro batch leaves in memory.

    Args:
        model: a resolved ModelConfig.
        c: bytes of a number in compute precision.
        micro_size: B.
        document_mask: whether documents are kept apart.
    """

    model: ModelConfig
    c: int
    micro_size: int
    document_mask: bool = False

    @property
    def tokens(self) -> int:
        """B × T."""
        return self.micro_size * self.model.seq_len

    @property
    def stream(self) -> int:
        """Bytes of the residual stream, (B, T, d_model)."""
        return self.c * self.tokens * self.model.d_model

    @property
    def _wide(self) -> tuple[int, int]:
        """Numbers of a token's queries and of its keys."""
        return self.model.n_head * self.model.head_dim, self.model.n_kv_head * self.model.head_dim

    @property
    def _row_sums(self) -> int:
        """Bytes of fused attention's log-sum-exp, fp32 (B, n_head, T)."""
        return FP32_BYTES * self.tokens * self.model.n_head

    @property
    def saved_by_block(self) -> int:
        """Bytes that autograd saves of one block, its input included.

        Of the compute precision: the inputs of both norms, which are one tensor where the branches are parallel, and
        their outputs; q, k and v, and again what RoPE or QK-norm made of q and k; the attention's output; the
        feed-forward's. fp32: what the norms remember of a row, and attention of a head's. Dropout keeps a mask of a
        byte an element.
        """
        model, (queries, keys) = self.model, self._wide
        norms = (3 if model.parallel_residual else 4) * model.d_model
        attention = 2 * queries + 2 * keys
        if model.qk_norm or model.position == "rope":
            attention += queries + keys
        if self._masks_scores and keys < queries:  # each head gets keys and values of its own
            attention += 2 * queries
            if model.position == "rope":  # q, k and v as they were are needed by QK-norm alone
                attention -= keys + (0 if model.qk_norm else queries + 2 * keys)
        saved = self.c * self.tokens * (norms + attention + FEED_FORWARD_SAVED[model.activation] * model.d_ff)
        saved += FP32_BYTES * self.tokens * self._remembered_by_norms
        if model.dropout:
            saved += 2 * self.tokens * model.d_model
        return saved + (self._row_sums if model.attention != "plain" else self.saved_scores)

    @property
    def _remembered_by_norms(self) -> int:
        """Numbers that a block's norms keep of a token: mean and deviation, or the latter alone."""
        each = 2 if self.model.norm == "layernorm" else 1
        return 2 * each + (self.model.n_head + self.model.n_kv_head if self.model.qk_norm else 0)

    @property
    def _masks_scores(self) -> bool:
        """Whether documents are kept apart by a mask as large as the scores, which flash and flex attention don't need.

        Which kernel `auto` takes is known on the machine alone: the mask is counted.
        """
        return self.document_mask and self.model.attention in ("auto", "sdpa")

    @property
    def _places(self) -> int:
        """Bytes that all blocks share: RoPE's cosines and sines, and the document mask."""
        model, rows = self.model, self.micro_size if self.document_mask else 1
        turned = 2 * self.c * rows * model.seq_len * model.rotary_dim if model.position == "rope" else 0
        mask = self.c * self.tokens * model.seq_len if self._masks_scores else 0
        if self.document_mask and model.attention == "plain":
            mask = self.tokens * model.seq_len
        return turned + mask

    @property
    def kept_of_block(self) -> int:
        """Bytes of one block that wait for the backward pass; with activation checkpointing not all of them."""
        model, (queries, keys) = self.model, self._wide
        if model.activation_checkpointing == "none":
            return self.saved_by_block
        if model.activation_checkpointing == "full":
            return self.stream
        # the matrix products: qkv, proj, (gate,) up and down; and attention
        up = model.d_ff * (2 if model.activation == "swiglu" else 1)
        products = self.c * self.tokens * (queries + 2 * keys + 2 * model.d_model + up)
        return self.stream + products + self.c * self.tokens * queries + self._row_sums

    @property
    def kept_of_ends(self) -> int:
        """Bytes kept before the first block and behind the last: tokens, targets, masks, inputs of norm and head."""
        kept = 2 * self.stream + 2 * TOKEN_BYTES * self.tokens + self._places
        return kept + (self.tokens * self.model.d_model if self.model.dropout else 0)

    @property
    def kept(self) -> int:
        """Bytes of the whole model when the loss is there."""
        return self.model.n_layer * self.kept_of_block + self.kept_of_ends

    @property
    def passing(self) -> int:
        """Bytes by which gradients of activations exceed the activations freed before them, at a block's fullest.

        At the non-linearity there are the gradients of the stream, of the block's output behind dropout, and of the
        wide layer. In plain attention the softmax, its gradient and the scores' gradient, all fp32, when the wide layer
        is done.
        """
        model, wide = self.model, self.c * self.tokens * self.model.d_ff
        in_feed_forward = self.stream * (2 if model.dropout else 1) + FEED_FORWARD_PASSING[model.activation] * wide
        if model.attention != "plain":
            return in_feed_forward
        softmax = 3 * FP32_BYTES * self._scores - self.saved_scores
        return max(in_feed_forward, softmax + self.stream - 2 * (self.stream + wide))

    @property
    def _scores(self) -> int:
        """Elements of one block's attention matrices, (B, n_head, T, T)."""
        return self.tokens * self.model.n_head * self.model.seq_len

    @property
    def saved_scores(self) -> int:
        """Bytes that plain attention saves of (B, n_head, T, T): the softmax in fp32, what multiplies v, masks."""
        dropout = bool(self.model.dropout)
        multiplied = (
            self.c if self.c != FP32_BYTES or dropout else 0
        )  # the softmax where nothing was rounded or dropped
        mask = 0 if self.document_mask else self.model.seq_len**2  # of documents all blocks share one
        return self._scores * (FP32_BYTES + multiplied + dropout) + mask

    @property
    def loss(self) -> int:
        """Bytes of logits and loss in its backward pass: fp32 three times or more, for one chunk of the tokens.

        The saved log-probabilities, their gradient, and the logits' gradient made from both; the soft-cap's tangent,
        and the z-loss's part of the gradient, where there are any.
        """
        wide = 3 + bool(self.model.logit_softcap) + bool(self.model.z_loss)
        return wide * FP32_BYTES * -(-self.tokens // self.model.loss_chunks) * self.model.vocab_size

    @property
    def logits(self) -> int:
        """Bytes of the logits' gradient in compute precision, the padding of the vocabulary included, of one chunk."""
        return self.c * -(-self.tokens // self.model.loss_chunks) * self.model.padded_vocab_size
