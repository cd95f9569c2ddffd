"""Documents kept apart in packed sequences: equal to each document as a sequence of its own."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex

from model import GPT
from pretrain import document_mask
from pretrain.arguments import parse
from pretrain.document_mask import DOCUMENT_KERNELS, DocumentMask, document_starts
from pretrain.errors import CheckpointError, ConfigError, ShardError
from pretrain.kernels import Masking, choose_attention
from pretrain.kv_cache import KVCache
from pretrain.manifest import DataManifest, document_end
from pretrain.model_config import FAMILIES, ModelConfig
from pretrain.pretrained import load_document_end

CPU = torch.device("cpu")
END = 7
# of each row of 24 tokens, the lengths of its documents; the last one goes on behind the row
ROWS = [[24], [5, 1, 1, 10, 7], [1, 23], [23, 1], [12, 12]]
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "llama, grouped": {"family": "llama", "n_kv_head": 2},
    "selective": {"family": "qwen3", "activation_checkpointing": "selective"},
    "full, in chunks": {"family": "gpt", "activation_checkpointing": "full", "loss_chunks": 4},
    "grouped, selective, in chunks": {
        "family": "llama",
        "n_kv_head": 1,
        "activation_checkpointing": "selective",
        "loss_chunks": 3,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only get in each other's way over tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shape(**changes: Any) -> ModelConfig:
    base = ModelConfig(size="custom", n_layer=2, n_head=4, d_model=64, vocab_size=101, seq_len=24, dropout=0.0)
    return dataclasses.replace(base, **changes).resolve()


def make_model(kernel: str | None, dtype: torch.dtype = torch.float64, **changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(shape(**changes), "plain", DocumentMask(kernel, END) if kernel else None).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # attention far from uniform, no bias 0
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def packed(rows: list[list[int]] = ROWS, seed: int = 1) -> torch.Tensor:
    """Tokens (len(rows), 25) whose documents have these lengths; the token behind each row belongs to its last one."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, 101, (len(rows), 25), generator=draw)
    for row, lengths in enumerate(rows):
        for end in torch.tensor(lengths).cumsum(0)[:-1].tolist():
            tokens[row, end - 1] = END
    return tokens


def loss_apart(model: GPT, tokens: torch.Tensor, rows: list[list[int]] = ROWS) -> torch.Tensor:
    """The mean loss of the same targets with every document as a sequence of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for row, lengths in zip(tokens, rows, strict=True):
        begin = 0
        for length in lengths:
            window = row[None, begin : begin + length + 1]
            total = total + model(window[:, :-1], window[:, 1:]) * length
            begin += length
    return total / tokens[:, 1:].numel()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    """Flex attention by its reference in eager mode: the same masks, and with them gradients, which CPUs don't have."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(document_mask, "_compiled_flex", lambda: flex.flex_attention)


def varlen_by_hand(q, k, v, bounds, bounds_k, longest, longest_k, dropout_p, causal):
    """What flash_attn_varlen_func promises, one sequence at a time."""
    assert causal and dropout_p == 0.0 and bounds is bounds_k and bounds.dtype == torch.int32
    assert bounds.diff().max() <= longest == longest_k and bounds[-1] == len(q)
    parts = [
        document_mask.plain_attention(q[None, begin:end], k[None, begin:end], v[None, begin:end], dropout_p)[0]
        for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
    ]
    return torch.cat(parts)


@pytest.fixture
def flash_by_hand(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=varlen_by_hand))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_gradients_are_those_of_each_document_by_itself(changes):
    tokens, apart, model = packed(), make_model(None, **changes), make_model("sdpa", **changes)
    expected, loss = loss_apart(apart, tokens), model(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    loss.backward()
    # cross entropy is taken in fp32, all else here in fp64
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0)
    assert gradients(model).keys() == gradients(apart).keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(apart)[name], rtol=1e-5, atol=1e-7, msg=name)
    without = make_model(None, **changes)(tokens[:, :-1], tokens[:, 1:])
    assert abs(without.item() - loss.item()) > 1e-3  # or the equality above would say nothing


@pytest.mark.parametrize("kernel", ["plain", "flex", "flash"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_every_kernel_keeps_documents_apart_alike(kernel, family, flex_on_a_cpu, flash_by_hand):
    changes = {"family": family, "n_kv_head": 2 if family == "llama" else 0}
    tokens, found = packed(), []
    for each in ("sdpa", kernel):
        model = make_model(each, **changes)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        found.append((loss, gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", ["plain", "sdpa", "flex"])
def test_a_token_changes_nothing_outside_of_its_document(kernel):
    model = make_model(kernel, torch.float32).requires_grad_(False)
    tokens = packed([[9, 15]])[:, :-1]
    changed = tokens.clone()
    changed[0, 3] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :3], after[:, :3]) and torch.equal(before[:, 9:], after[:, 9:])
    assert not torch.allclose(before[:, 3:9], after[:, 3:9])


def test_where_documents_start():
    tokens = torch.tensor([[END, 1, 2, END, END, 3], [1, 1, 1, 1, 1, END]])
    assert document_starts(tokens, END).tolist() == [[0, 1, 1, 1, 4, 5], [0] * 6]
    places, _ = DocumentMask("plain", END).read(tokens, torch.float32)
    assert places.tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_a_compiled_model_is_one_graph_that_other_documents_do_not_compile_again():
    torch._dynamo.reset()
    model = make_model("sdpa", torch.float32, family="llama", n_kv_head=2, activation_checkpointing="selective")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed, rows in enumerate((ROWS, ROWS[::-1], [[8, 8, 8]] * 5, [[24]] * 5)):
        tokens = packed(rows, seed)
        loss = compiled(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        assert loss.item() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-6)
    assert counter.frame_count == 1


def test_flex_attention_compiles_into_the_models_graph():
    torch._dynamo.reset()
    model = make_model("flex", torch.float32).eval().requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (ROWS, [[8, 8, 8]] * 5):
        tokens = packed(rows)[:, :-1]
        torch.testing.assert_close(compiled(tokens), make_model("plain", torch.float32)(tokens), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_half_precision_stays_near():
    tokens = packed()
    exact = make_model("sdpa")(tokens[:, :-1], tokens[:, 1:])
    loss = make_model("sdpa", torch.bfloat16)(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


def test_generation_reads_one_document_whatever_it_holds():
    tokens = packed()[1:2, :-1]
    model, apart = make_model("sdpa", torch.float32).eval(), make_model(None, torch.float32).eval()
    with torch.no_grad():
        cached = model(tokens, cache=KVCache(model.config, torch.zeros(1, dtype=torch.int64), 24))
        torch.testing.assert_close(cached, apart(tokens), rtol=1e-4, atol=1e-4)


# ---- the choice of a kernel ----


def test_a_cpu_masks_the_scores_and_the_reason_names_what_can_not_run():
    name, reason = choose_attention("auto", CPU, torch.bfloat16, 64, Masking())
    assert name == "sdpa" and reason.startswith("the document mask by torch's fused attention; ")
    assert "torch's flex attention can't run: it has a backward pass on CUDA only, not on cpu" in reason
    assert choose_attention("plain", CPU, torch.float32, 64, Masking())[0] == "plain"
    with torch.inference_mode():
        assert choose_attention("auto", CPU, torch.float32, 64, Masking())[0] == "sdpa"


@pytest.mark.parametrize(
    ("name", "masking", "why"),
    [
        ("flash", Masking(compiled=True), "the number of documents varies"),
        ("flex", Masking(dropout=0.1), "it knows no dropout, and model.dropout is 0.1"),
        ("flex", None, "there is no such kernel, only flash, sdpa, plain"),
    ],
)
def test_a_gpus_kernels_are_refused_for_a_reason(name, masking, why):
    with pytest.raises(ValueError, match=why):  # before the device is touched
        choose_attention(name, torch.device("cuda"), torch.bfloat16, 64, masking)


def test_a_kernel_that_crosses_documents_is_passed_over(monkeypatch):
    kernel = DOCUMENT_KERNELS["sdpa"]
    crossing = dataclasses.replace(kernel, attend=lambda q, k, v, dropout, mask: kernel.attend(q, k, v, dropout, None))
    monkeypatch.setitem(DOCUMENT_KERNELS, "sdpa", crossing)
    name, reason = choose_attention("auto", CPU, torch.float32, 8, Masking())
    assert name == "plain" and "torch's fused attention can't run: it runs, but its results are wrong" in reason


# ---- which token ends a document ----


def manifest(eot_id: int | None) -> DataManifest:
    return DataManifest("bpe", 101, eot_id, ())


def test_the_manifest_or_the_setting_says_which_token_ends_a_document():
    assert document_end(-1, {"gs://b/a": manifest(3), "val": None, "other": manifest(None)}) == 3
    assert document_end(5, {"gs://b/a": None}) == 5
    assert document_end(3, {"gs://b/a": manifest(3)}) == 3
    with pytest.raises(ShardError, match=r"says which token ends .* in gs://b/a, v\. Give --data.eot_token_id ID"):
        document_end(-1, {"gs://b/a": None, "v": manifest(None)})
    with pytest.raises(ShardError, match=r"data.eot_token_id says that token 5 .*, a/manifest.json says 3"):
        document_end(5, {"a/": manifest(3)})
    with pytest.raises(ShardError, match=r"a/manifest.json says that token 0 .*, b/manifest.json says 3"):
        document_end(-1, {"a": manifest(0), "b": manifest(3)})


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--data.eot_token_id", "3"], "eot_token_id 3 means nothing without --data.document_mask true"),
        (["--data.document_mask", "true", "--data.eot_token_id", "8192"], "must be below model.vocab_size 8192, or -1"),
        (["--model.attention", "flex"], "flex is for --data.document_mask true: take auto, flash or sdpa"),
        (
            ["--model.attention", "flex", "--data.document_mask", "true", "--model.dropout", "0.1"],
            "flex knows no dropout: set model.dropout 0.1 to 0, or take auto or sdpa",
        ),
        (["--model.attention", "flash", "--data.document_mask", "true", "--compile"], "flash keeps documents apart in"),
    ],
)
def test_what_can_not_work_together_is_a_config_error(argv, why):
    with pytest.raises(ConfigError) as error:
        parse(argv)
    assert len(error.value.problems) == 1 and why in error.value.problems[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [("{}", None), ("{document_mask: false, eot_token_id: 3}", None), ("{document_mask: true, eot_token_id: 3}", 3)],
)
def test_a_checkpoints_config_says_which_token_ends_a_document(tmp_path, data, expected):
    (tmp_path / "config.yaml").write_text(f"data: {data}\n")
    assert load_document_end(tmp_path) == expected


def test_a_checkpoint_that_was_masked_by_nobody_knows_what_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {document_mask: true, eot_token_id: -1}\n")
    with pytest.raises(CheckpointError, match=r"document_mask is true and data.eot_token_id is -1"):
        load_document_end(tmp_path)
