"""Zero-init, z-loss, soft-cap and QK-norm, each against an implementation of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from model import GPT
from pretrain.errors import ConfigError
from pretrain.hf_config import model_type_of, to_hf
from pretrain.kv_cache import KVCache
from pretrain.model_config import ModelConfig, model_problems

SHAPE = ModelConfig(
    size="custom", family="gpt", n_layer=2, n_head=2, d_model=32, vocab_size=61, seq_len=16, dropout=0.0
).resolve()
TOKENS = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def model_of(**options) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SHAPE, **options), "plain")
    with torch.no_grad():
        model.head_weight.mul_(20)  # so that logits are large enough to be bent
    return model


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_zero_init_makes_each_block_the_identity_and_changes_no_other_weight():
    model, plain = model_of(zero_init=True), model_of()
    zeros = {name for name, weight in model.named_parameters() if not weight.any() and not name.endswith("bias")}
    assert zeros == {f"blocks.{n}.{part}.weight" for n in (0, 1) for part in ("attn.proj", "mlp.down")}
    others = dict(plain.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in model.named_parameters() if name not in zeros)
    x = torch.randn(2, 5, 32)
    assert torch.equal(model.blocks[0](x), x) and not torch.equal(plain.blocks[0](x), x)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_z_loss_is_in_the_gradient_and_not_in_the_loss(chunks, cap):
    model = model_of(z_loss=0.1, loss_chunks=chunks, logit_softcap=cap)
    logits = model(INPUTS).float().flatten(0, 1)
    log_z = logits.exp().sum(-1).log()
    cross_entropy = (log_z - logits[torch.arange(48), TARGETS.flatten()]).mean()
    z_loss = 0.1 * log_z.square().mean()
    loss = model(INPUTS, TARGETS)
    assert loss.item() == pytest.approx(cross_entropy.item(), abs=1e-5)
    assert model.z_loss is not None and model.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-5)
    for found, expected in zip(gradients(model, loss), gradients(model, cross_entropy + z_loss), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    with torch.no_grad():
        assert model(INPUTS, TARGETS).item() == pytest.approx(loss.item(), abs=1e-6)
    without = model_of(loss_chunks=chunks, logit_softcap=cap)
    assert without(INPUTS, TARGETS).item() == pytest.approx(loss.item(), abs=1e-6) and without.z_loss is None


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_soft_cap_bends_logits_in_loss_evaluation_and_generation(chunks):
    plain, capped = model_of(), model_of(logit_softcap=2.0, loss_chunks=chunks)
    logits = plain(INPUTS)
    assert logits.abs().max() > 4
    expected = 2 * torch.tanh(logits / 2)
    assert torch.allclose(capped(INPUTS), expected, atol=1e-6)
    loss = nn.functional.cross_entropy(expected.flatten(0, 1), TARGETS.flatten())
    assert capped(INPUTS, TARGETS).item() == pytest.approx(loss.item(), abs=1e-5)
    cache = KVCache(capped.config, torch.zeros(3, dtype=torch.int64), 16)
    with torch.no_grad():
        pieces = [capped(INPUTS[:, :9], cache=cache), capped(INPUTS[:, 9:], cache=cache)]
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt", "neox", "llama", "opt"])
def test_qk_norm_is_an_option_of_every_family(family):
    config = ModelConfig(
        family=family, size="custom", n_layer=1, n_head=2, d_model=32, vocab_size=61, seq_len=16, qk_norm=True
    ).resolve()
    assert model_problems(config) == []
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(config, dropout=0.0), "plain")
    attention = model.blocks[0].attn
    seen = []
    attention.kernel = lambda q, k, v, dropout: seen.append((q, k)) or v
    with torch.no_grad():
        attention.q_norm.weight.fill_(3.0)
        model(INPUTS)
    (q, k) = seen[0]
    assert torch.allclose(q.square().mean(-1).sqrt(), torch.tensor(3.0), atol=0.02)  # RoPE turns, and keeps lengths
    assert torch.allclose(k.square().mean(-1).sqrt(), torch.tensor(1.0), atol=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logit_softcap": 30.0}, "model.logit_softcap is 30.0, and it knows only 0.0"),
        ({"qk_norm": True}, "model.qk_norm is True, and it knows only False"),
    ],
)
def test_an_export_refuses_what_no_class_expresses(options, words):
    with pytest.raises(ConfigError) as caught:
        to_hf(dataclasses.replace(SHAPE, **options), None, "fp32")
    assert words in caught.value.line() and "\n" not in caught.value.line()


def test_what_trains_otherwise_and_computes_alike_is_exported():
    assert model_type_of(dataclasses.replace(SHAPE, z_loss=1e-4, zero_init=True)) == "gpt2"


def test_options_out_of_range_are_told():
    problems = "; ".join(model_problems(dataclasses.replace(SHAPE, logit_softcap=-1.0, z_loss=-1e-4)))
    assert "model.logit_softcap -1.0 must be positive" in problems and "model.z_loss -0.0001 must be" in problems
