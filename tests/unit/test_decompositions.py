"""What the compiler writes other code for on a CPU means the same as torch's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from model import GPT
from pretrain import decompositions
from pretrain.compiler import compile_model
from pretrain.decompositions import OURS, attention_backward, cpu_backend, gelu, gelu_backward
from pretrain.model_config import ModelConfig

aten = torch.ops.aten
CPU = torch.device("cpu")


def small_model(dtype: torch.dtype) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 64, "seq_len": 150, "dropout": 0.0}
    torch.manual_seed(0)
    return GPT(ModelConfig(family="gpt", size="custom", **shape).resolve()).to(dtype)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_and_its_gradient_are_torchs(approximate):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float32, requires_grad=True)
    grad = torch.linspace(1, 2, 4001)
    expected = F.gelu(x, approximate=approximate)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(gelu(x, approximate), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gelu_backward(grad, x, approximate), expected_grad, rtol=1e-5, atol=5e-6)


def attention(n_tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All that the backward pass is given: two sequences of three heads."""
    generator = torch.Generator().manual_seed(n_tokens)
    q, k, v, grad = (torch.randn(2, 3, n_tokens, 16, generator=generator).to(dtype) for _ in range(4))
    y, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return {"grad": grad, "q": q, "k": k, "v": v, "y": y, "logsumexp": logsumexp}


@pytest.mark.parametrize("n_tokens", [1, 20, 128, 300, 1000])  # a full block; an uneven last one; the most
def test_attentions_gradient_is_that_of_exact_arithmetic(n_tokens):
    given = attention(n_tokens, torch.bfloat16)
    exact = [given[name].double().requires_grad_() for name in "qkv"]
    y = F.scaled_dot_product_attention(*exact, is_causal=True)
    expected = torch.autograd.grad(y, exact, given["grad"].double())
    for ours, right in zip(attention_backward(*given.values(), 0.0, True), expected, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == right.shape
        # of one token the gradient of q and k is 0, so what counts is what came in
        assert (ours - right).norm() <= 0.01 * max(right.norm(), given["grad"].double().norm())


@pytest.mark.parametrize(
    ("dtype", "dropout", "is_causal", "mask"),
    [
        (torch.float32, 0.0, True, None),
        (torch.bfloat16, 0.1, True, None),
        (torch.bfloat16, 0.0, False, None),
        (torch.bfloat16, 0.0, False, torch.zeros(20, 20)),
    ],
)
def test_attention_that_it_is_not_for_is_left_to_torch(dtype, dropout, is_causal, mask):
    given = attention(20, dtype).values()
    assert attention_backward(*given, dropout, is_causal, attn_mask=mask) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_graphs_of_a_model_have_our_operations_in_them(dtype):
    graphs = []

    def keep(graph, _inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph

    model = small_model(dtype)
    model.compile(backend=aot_autograd(fw_compiler=keep, decompositions={**select_decomp_table(), **OURS}))
    tokens = torch.randint(64, (2, 151))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    reference = small_model(dtype)
    expected = reference(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    assert len(graphs) == 2
    forward, backward = graphs
    assert aten.gelu.default not in forward and aten.tanh.default not in forward | backward
    torchs_own = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert (torchs_own in backward) == (dtype == torch.float32)
    torch.testing.assert_close(loss, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        off = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert off < (0.1 if dtype == torch.bfloat16 else 1e-4), name


def test_the_compilers_cache_knows_the_table_from_torchs(monkeypatch):
    seen = []

    def compile_fx(graph, inputs):
        seen.append((torch.compiler.config.cache_key_tag, dict(select_decomp_table())))
        return graph

    monkeypatch.setattr(decompositions, "compile_fx", compile_fx)
    before = torch.compiler.config.cache_key_tag
    cpu_backend(lambda: None, [])
    ((tag, table),) = seen
    assert tag and tag != before == torch.compiler.config.cache_key_tag
    assert table[aten.gelu.default] is gelu is not select_decomp_table()[aten.gelu.default]


def test_a_model_on_a_cpu_is_compiled_with_them(monkeypatch):
    monkeypatch.setattr("pretrain.compiler.compiler_problem", lambda _device: "")
    used, alone = [], SimpleNamespace(any=bool)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: used.append(options))
    compile_model(torch.nn.Linear(1, 1), CPU, alone)
    compile_model(torch.nn.Linear(1, 1), torch.device("cuda"), alone)
    assert used == [{"backend": cpu_backend}, {"mode": "default"}]
