from __future__ import annotations

import dataclasses
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, KERNELS
from pretrain.kernels import choose_attention
from pretrain.model_config import FAMILIES, MODEL_SIZES, ModelConfig, parameter_shapes
from pretrain.pretrained import first_weights

CPU = torch.device("cpu")
FAMILY_NAMES = list(FAMILIES)


def shape(**changes: Any) -> ModelConfig:
    # 257 like 50257: odd, so that it must be padded
    tiny = ModelConfig(size="custom", n_layer=2, n_head=4, d_model=32, vocab_size=257, seq_len=16, dropout=0.0)
    return dataclasses.replace(tiny, **changes).resolve()


def tiny(attention: str = "sdpa", seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape(**changes), attention)


def data(batch: int = 3, length: int = 16, vocab: int = 257, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (batch, length + 1), generator=draw)
    return tokens[:, :-1], tokens[:, 1:]


def shaken(model: GPT) -> GPT:
    """Weights far from their initial values, so that no bias is 0, no gain is 1 and attention is not uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.tok_emb.weight[model.config.vocab_size :].zero_()
    return model


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


# The reference: GPT-2 in NumPy, float64, one sequence, one head and one position at a time, and its own padding-free
# weights. It shares no code with the model.


def reference_logits(weights: dict[str, np.ndarray], n_layer: int, n_head: int, tokens: list[int]) -> np.ndarray:
    def norm(rows: np.ndarray, name: str) -> np.ndarray:
        centred = rows - rows.mean(axis=1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return centred / scale * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(rows: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("ti,oi->to", rows, weights[name + ".weight"]) + weights[name + ".bias"]

    def gelu_new(rows: np.ndarray) -> np.ndarray:
        return 0.5 * rows * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (rows + 0.044715 * rows**3)))

    stream = np.stack([weights["tok_emb.weight"][t] + weights["pos_emb.weight"][i] for i, t in enumerate(tokens)])
    width = stream.shape[1]
    size = width // n_head
    for layer in range(n_layer):
        prefix = f"blocks.{layer}."
        qkv = linear(norm(stream, prefix + "ln_1"), prefix + "attn.qkv")
        heads = np.zeros_like(stream)
        for head in range(n_head):
            first = head * size
            query = qkv[:, first : first + size]
            key = qkv[:, width + first : width + first + size]
            value = qkv[:, 2 * width + first : 2 * width + first + size]
            for i in range(len(tokens)):
                scores = np.array([query[i] @ key[j] / math.sqrt(size) for j in range(i + 1)])
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                for j in range(i + 1):
                    heads[i, first : first + size] += shares[j] * value[j]
        stream = stream + linear(heads, prefix + "attn.proj")
        hidden = gelu_new(linear(norm(stream, prefix + "ln_2"), prefix + "mlp.up"))
        stream = stream + linear(hidden, prefix + "mlp.down")
    return norm(stream, "ln_f") @ weights["tok_emb.weight"].T


def reference_loss(weights: dict[str, np.ndarray], n_layer: int, n_head: int, tokens: np.ndarray, targets: np.ndarray):
    total = 0.0
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        for logits, target in zip(reference_logits(weights, n_layer, n_head, row), wanted, strict=True):
            total += math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
    return total / targets.size


def unpadded(model: GPT) -> dict[str, np.ndarray]:
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    weights["tok_emb.weight"] = weights["tok_emb.weight"][: model.config.vocab_size]
    return weights


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_logits_and_loss_equal_a_hand_written_gpt2_without_padding(attention: str) -> None:
    model = shaken(tiny(attention))
    assert model.tok_emb.num_embeddings == 384
    tokens, targets = data()
    expected = np.stack([reference_logits(unpadded(model), 2, 4, row) for row in tokens.tolist()])
    np.testing.assert_allclose(model(tokens).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    loss = reference_loss(unpadded(model), 2, 4, tokens.numpy(), targets.numpy())
    assert model(tokens, targets).item() == pytest.approx(loss, rel=1e-6)


def test_every_gradient_equals_the_slope_of_the_hand_written_gpt2() -> None:
    model = shaken(tiny(n_layer=1, n_head=2, d_model=8, d_ff=12, vocab_size=11, seq_len=5))
    tokens, targets = data(batch=2, length=5, vocab=11)
    model(tokens, targets).backward()
    weights = unpadded(model)
    place = np.random.default_rng(0)
    for name, gradient in gradients(model).items():
        flat = weights[name].reshape(-1)
        for i in place.choice(flat.size, size=min(6, flat.size), replace=False):
            kept = flat[i]
            slope = 0.0
            for side in (1, -1):
                flat[i] = kept + side * 1e-5
                slope += side * reference_loss(weights, 1, 2, tokens.numpy(), targets.numpy()) / 2e-5
            flat[i] = kept
            assert gradient.flatten()[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_plain_and_sdpa_give_the_same_gradients() -> None:
    found = []
    for attention in ("plain", "sdpa"):
        model = shaken(tiny(attention))
        model(*data()).backward()
        found.append(gradients(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


def test_padding_rows_get_no_gradient_and_no_logit() -> None:
    model = tiny()
    tokens, targets = data()
    model(tokens, targets).backward()
    gradient = gradients(model)["tok_emb.weight"]
    assert gradient[257:].abs().max() == 0
    assert gradient[:257].abs().sum(1).min() > 0
    assert model(tokens).shape == (3, 16, 257)


def test_padding_rows_stay_zero_under_adamw_with_decay() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(*data()).backward()
        optimizer.step()
    assert model.tok_emb.weight[257:].abs().max() == 0


def test_an_id_of_the_padding_is_no_target() -> None:
    tokens, targets = data()
    targets[0, 0] = 300
    with pytest.raises(IndexError):
        tiny()(tokens, targets)


@pytest.mark.parametrize("size", list(MODEL_SIZES))
def test_every_size_has_exactly_the_documented_parameters(size: str) -> None:
    table = {
        "125M": 125_226_240,
        "350M": 355_871_744,
        "760M": 760_300_032,
        "1.2B": 1_315_723_264,
        "1.3B": 1_315_723_264,
        "3B": 2_651_553_280,
        "7B": 6_658_404_352,
        "8B": 7_463_923_712,
        # by hand: 2·vocab·d + L·(d·(d + 2·kv) + d·d + 3·d·d_ff + 2d) + d, with d_ff 768, 2048, 2816, 4096, 5632
        "tiny": 30_846_720,
        "small": 162_148_608,
        "medium": 386_092_032,
        "large": 777_318_912,
        "xl": 1_648_826_368,
    }
    config = ModelConfig(size=size).resolve()
    with torch.device("meta"):
        model = GPT(config)
    assert model.n_parameters() == config.n_parameters == table[size]


def test_parameter_names_and_shapes_are_the_canonical_ones() -> None:
    block = {
        "ln_1.weight": (32,), "ln_1.bias": (32,), "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,),
        "attn.proj.weight": (32, 32), "attn.proj.bias": (32,), "ln_2.weight": (32,), "ln_2.bias": (32,),
        "mlp.up.weight": (128, 32), "mlp.up.bias": (128,), "mlp.down.weight": (32, 128), "mlp.down.bias": (32,),
    }  # fmt: skip
    expected = {"tok_emb.weight": (384, 32), "pos_emb.weight": (16, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    expected |= {f"blocks.{layer}.{name}": shape for layer in (0, 1) for name, shape in block.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tiny().state_dict().items()} == expected


VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILY_NAMES},
    "llama, grouped": {"family": "llama", "n_kv_head": 1, "bias": True, "tie_embeddings": True},
    "qwen3, wide heads": {"family": "qwen3", "n_kv_head": 2, "head_dim": 12},
    "gpt, modern": {"family": "gpt", "position": "rope", "rotary_pct": 0.5, "norm": "rmsnorm", "qk_norm": True},
    "gpt, bare": {"family": "gpt", "bias": False, "tie_embeddings": False, "parallel_residual": True},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


@every_variant
def test_the_config_knows_every_parameter(options: dict[str, Any]) -> None:
    config, model = shape(**options), tiny(**options)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == list(parameter_shapes(config))
    assert model.n_parameters() == config.n_parameters


@every_variant
def test_what_is_recomputed_and_the_chunks_of_the_loss_change_neither_loss_nor_gradients(options) -> None:
    losses, found = [], []
    for how in ({}, {"activation_checkpointing": "selective"}, {"activation_checkpointing": "full", "loss_chunks": 5}):
        model = shaken(tiny(dropout=0.2, **options, **how))
        torch.manual_seed(7)
        loss = model(*data())
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    for other in found[1:]:
        for name, gradient in found[0].items():  # by norm: sums in another order leave little of what cancels out
            assert (gradient - other[name]).norm() <= 1e-5 * gradient.norm(), name


def test_chunks_never_hold_the_full_logits() -> None:
    model = tiny(loss_chunks=4)
    tokens, targets = data(batch=8)
    rows: set[int] = set()  # of every tensor as wide as the vocabulary, forward and backward

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor) and each.dim()]
            rows.update(each.numel() // each.size(-1) for each in tensors if each.size(-1) in (257, 384))
            return result

    with Wide():
        model(tokens, targets).backward()
    assert max(rows) == 8 * 16 // 4


@every_variant
def test_every_variant_is_causal_and_alike_by_both_kernels(options: dict[str, Any]) -> None:
    tokens, _ = data()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 257
    plain, fused = shaken(tiny("plain", **options)), shaken(tiny("sdpa", **options))
    before, after = plain(tokens), plain(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])
    torch.testing.assert_close(fused(tokens), before, rtol=1e-4, atol=1e-4)


@every_variant
def test_every_variant_compiles_as_one_graph_that_is_compiled_once(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = shaken(tiny(**options))
    eager = model(*data())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        loss = compiled(*data())
        loss.backward()
    assert loss.item() == pytest.approx(eager.item(), rel=1e-6)
    assert counter.frame_count == 1


def test_initial_weights_are_gpt2s() -> None:
    model = tiny(d_model=128, d_ff=512, n_layer=8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif ".ln_" in name or name.startswith("ln_f"):
            assert (parameter == 1).all(), name
        else:
            scaled = name.endswith(("attn.proj.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(16) if scaled else 0.02
            values = parameter[:257] if name == "tok_emb.weight" else parameter
            assert values.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(values.mean().item()) < 0.1 * expected, name


def test_initial_weights_follow_the_seed() -> None:
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.pos_emb.weight, other.pos_emb.weight)


def test_a_model_made_on_the_meta_device_gets_the_same_initial_weights() -> None:
    with torch.device("meta"):
        model = tiny()
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(seed=3).parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_weights_drawn_one_at_a_time_are_those_of_a_whole_model(family: str) -> None:
    config = shape(family=family, tie_embeddings=False)
    torch.manual_seed(3)
    whole = dict(GPT(config).named_parameters())
    for (name, weight), (expected, parameter) in zip(first_weights(config, 3), whole.items(), strict=True):
        assert name == expected
        assert torch.equal(weight, parameter), name


def test_initial_loss_is_the_logarithm_of_the_vocabulary() -> None:
    assert tiny()(*data(batch=16)).item() == pytest.approx(math.log(257), abs=0.05)


def test_a_future_token_does_not_change_the_logits_before_it() -> None:
    model = shaken(tiny("plain"))
    tokens, _ = data()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 257
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_a_shorter_sequence_gives_the_same_logits_as_the_start_of_a_longer_one() -> None:
    model = shaken(tiny())
    tokens, _ = data()
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5], rtol=1e-5, atol=1e-5)


def test_a_longer_sequence_than_there_are_positions_is_refused() -> None:
    tokens, targets = data(length=17)
    with pytest.raises(ValueError, match="17 tokens is longer than the model's seq_len of 16"):
        tiny()(tokens, targets)


def test_checkpointed_blocks_run_twice_and_give_the_same_gradients_with_the_same_dropout() -> None:
    runs, found = [], []
    for recompute in ("none", "full"):
        model = shaken(tiny(dropout=0.2, activation_checkpointing=recompute))
        calls: list[int] = []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(7)
        model(*data()).backward()
        runs.append(len(calls))
        found.append(gradients(model))
    assert runs == [1, 2]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_checkpointing_is_off_where_no_backward_pass_follows() -> None:
    model = shaken(tiny(activation_checkpointing="full"))
    assert model._recomputes()
    with torch.no_grad():
        assert not model._recomputes()
    assert not model.eval()._recomputes()


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_dropout_repeats_with_its_seed_differs_with_another_and_is_off_in_eval(attention: str) -> None:
    model = shaken(tiny(attention, dropout=0.3))

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(*data()).item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2) == shaken(tiny(attention))(*data()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_stays_near_fp32_and_its_loss_is_fp32(dtype: torch.dtype) -> None:
    tokens, targets = data()
    exact = shaken(tiny())(tokens, targets)
    model = shaken(tiny("plain")).to(dtype)
    loss = model(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and model(tokens).dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_it_compiles_as_one_graph_with_checkpointing(recompute: str) -> None:
    torch._dynamo.reset()
    model = shaken(tiny(activation_checkpointing=recompute))
    eager = model(*data())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(*data())
    loss.backward()
    assert loss.item() == pytest.approx(eager.item(), rel=1e-6)
    assert gradients(model)["pos_emb.weight"].abs().sum() > 0


def test_it_learns_one_batch_by_heart() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(*data())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("options", [{}, {"family": "neox"}, {"family": "qwen3", "n_kv_head": 2, "head_dim": 6}])
def test_flops_per_token_are_the_matrix_products_that_torch_counts(options: dict[str, Any]) -> None:
    config = shape(vocab_size=256, **options)  # nothing to pad: torch counts the padding's products too
    model = GPT(config, "plain")  # plain: fused kernels recompute the scores in the backward pass, which is not counted
    with FlopCounterMode(display=False) as counter:
        model(*data(batch=3, length=16, vocab=256)).backward()
    assert counter.get_total_flops() == config.flops_per_token * 3 * 16


def test_flops_per_token_of_the_production_model() -> None:
    config = ModelConfig().resolve()
    n_matmul = 24 * 12 * 2048**2 + 50257 * 2048
    assert config.flops_per_token == 6 * n_matmul + 12 * 24 * 2048 * 2048


def test_auto_takes_sdpa_on_a_cpu_and_says_why_not_flash() -> None:
    name, reason = choose_attention("auto", CPU, torch.bfloat16, 64)
    assert name == "sdpa"
    assert "FlashAttention package can't run: it takes fp16 and bf16 on CUDA only, not bfloat16 on cpu" in reason


def test_a_requested_kernel_is_taken_or_refused_with_the_reason() -> None:
    assert choose_attention("plain", CPU, torch.float32, 64)[0] == "plain"
    with torch.inference_mode():  # whoever only evaluates
        assert choose_attention("auto", CPU, torch.float32, 64)[0] == "sdpa"
    with pytest.raises(ValueError, match=r"'flash' can't run on cpu: it takes fp16 and bf16 on CUDA only"):
        choose_attention("flash", CPU, torch.float32, 64)
    with pytest.raises(ValueError, match="there is no such kernel, only flash, sdpa, plain"):
        choose_attention("xformers", CPU, torch.float32, 64)


def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def not_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize(("kernel", "why"), [(broken, "no kernel image is available$"), (not_causal, "are wrong$")])
def test_a_kernel_that_fails_or_computes_something_else_is_passed_over(monkeypatch, kernel, why: str) -> None:
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    name, reason = choose_attention("auto", CPU, torch.float32, 8)
    assert name == "plain" and "torch's fused attention can't run: " in reason
    with pytest.raises(ValueError, match=why):
        choose_attention("sdpa", CPU, torch.float32, 8)


def test_choosing_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    choose_attention("auto", CPU, torch.float32, 8)
    assert torch.equal(torch.rand(1), expected)


def test_the_flash_kernel_calls_the_package_causally_in_its_own_layout(monkeypatch) -> None:
    def flash_attn_func(q, k, v, dropout_p, causal):
        assert causal and dropout_p == 0.0 and q.shape == (3, 16, 4, 8)
        return KERNELS["plain"](q, k, v, dropout_p)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    assert shaken(tiny("flash"))(*data()).item() == shaken(tiny("plain"))(*data()).item()
