from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import pretrain.generation
from model import GPT
from pretrain.errors import ConfigError, DivergenceError
from pretrain.generation import (
    Sampling,
    check_sample,
    draw,
    end_of_text,
    generate,
    probabilities_of,
    prompt_ids,
    sample_text,
)
from pretrain.kv_cache import KVCache
from pretrain.model_config import ModelConfig
from pretrain.text_stream import TextStream
from pretrain.tokenizers import END_OF_TEXT, train_bpe

VOCAB_SIZE, SEQ_LEN = 301, 40
SMALL: dict[str, Any] = {
    "size": "custom", "n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN,
    "dropout": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"family": "gpt"},
    "neox": {"family": "neox"},
    "llama-gqa": {"family": "llama", "n_kv_head": 2},
    "llama-one-key-head": {"family": "llama", "n_kv_head": 1},
    "qwen3": {"family": "qwen3", "n_kv_head": 2, "head_dim": 16},
    "opt": {"family": "opt"},
}
GREEDY = Sampling(temperature=0)
TEXTS = [f"def f_{i}(x):\n    return x + {i}  # grüße, 世界 🙂 {i * 7919}\n" for i in range(200)]
PROMPTS = [[5, 8, 13], [21], [34, 55, 89, 144, 233, 7, 11, 13, 17, 19], [2, 3]]


def build(seed: int = 0, **shape: Any) -> GPT:
    """A model that has strong opinions, in training mode."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**{**SMALL, **shape}).resolve())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.tok_emb.weight[VOCAB_SIZE:] = 0
        model.head_weight[VOCAB_SIZE:] = 0
    return model


@pytest.fixture(params=FAMILIES)
def family(request) -> GPT:
    return build(**FAMILIES[request.param])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, VOCAB_SIZE)


@torch.no_grad()
def uncached(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    """Greedy text by reading everything again for each token."""
    model = copy.deepcopy(model).eval()
    tokens = list(prompt)
    for _ in range(n_new):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---- the cache ----


@torch.no_grad()
def test_the_cache_gives_the_logits_of_each_step_also_for_padded_rows(family):
    model = family.eval()
    whole = torch.randint(VOCAB_SIZE, (3, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([4, 0, 7])
    batch = torch.stack(
        [torch.cat([row.new_zeros(pad), row])[:SEQ_LEN] for row, pad in zip(whole, padding, strict=True)]
    )
    cache = KVCache(model.config, padding, SEQ_LEN)
    first = 0
    for count in (9, 5, 1, 1, 1, 3, 1):  # the prompt in two pieces, then one by one, and several at once
        logits = model(batch[:, first : first + count], cache=cache)
        first += count
        for row, pad in enumerate(padding.tolist()):
            n = min(count, first - pad)  # of them, so many are not padding
            expected = model(whole[row : row + 1, : first - pad])[0, -n:]
            torch.testing.assert_close(logits[row, -n:], expected, rtol=1e-4, atol=2e-5)
    assert cache.length == first


def test_a_batch_gives_each_prompt_what_it_gets_alone_and_what_no_cache_gives(family):
    together = generate(family, PROMPTS, Sampling(temperature=0, max_new_tokens=12))
    assert together == [uncached(family, prompt, 12) for prompt in PROMPTS]


def test_a_prompt_read_in_pieces_gives_the_same(family, monkeypatch):
    expected = generate(family, PROMPTS, Sampling(temperature=0, max_new_tokens=8))
    monkeypatch.setattr(pretrain.generation, "PREFILL_TOKENS", 3)
    assert generate(family, PROMPTS, Sampling(temperature=0, max_new_tokens=8)) == expected


def test_each_row_fills_the_context_by_itself(family):
    written = generate(family, PROMPTS, GREEDY)
    assert [len(prompt) + len(row) for prompt, row in zip(PROMPTS, written, strict=True)] == [SEQ_LEN] * 4
    assert written == [uncached(family, prompt, SEQ_LEN - len(prompt)) for prompt in PROMPTS]


def test_a_cache_that_is_full_says_so():
    model = build(family="gpt").eval()
    cache = KVCache(model.config, torch.zeros(1, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="4 tokens don't fit into a cache of 3"):
        model(torch.ones(1, 4, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.unit.test_parity import write_hf

    ours = build(seed=1, **FAMILIES[name])
    write_hf(tmp_path, ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    written = generate(ours, PROMPTS, Sampling(temperature=0, max_new_tokens=24))
    assert len({tuple(row) for row in written}) == len(PROMPTS)  # a model that hears its prompt
    for prompt, row in zip(PROMPTS, written, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=24)
        assert row == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_writes(dtype):
    written = generate(build(**FAMILIES["qwen3"]).to(dtype), PROMPTS, Sampling(max_new_tokens=5))
    assert [len(row) for row in written] == [5] * 4


# ---- how a row ends ----


def test_a_stop_id_ends_its_row_and_no_other():
    model = build(family="llama")
    free = generate(model, PROMPTS, Sampling(temperature=0, max_new_tokens=20))
    stop = free[0][4]
    stopped = generate(model, PROMPTS, Sampling(temperature=0, max_new_tokens=20, stop_ids=(stop,)))
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len(stopped[0]) < 20 and max(map(len, stopped)) == 20


def test_the_listener_hears_every_token_and_can_end_a_row():
    model = build(family="gpt")
    free = generate(model, PROMPTS, Sampling(temperature=0, max_new_tokens=6))
    heard: list[list[tuple[int, bool]]] = [[] for _ in PROMPTS]

    def on_token(row: int, token: int, ends: bool) -> bool:
        heard[row].append((token, ends))
        return row == 2 and len(heard[row]) == 2

    written = generate(model, PROMPTS, Sampling(temperature=0, max_new_tokens=6), on_token)
    assert written == [free[0], free[1], free[2][:2], free[3]]
    assert [[token for token, _ in row] for row in heard] == written
    assert [ends for _, ends in heard[0]] == [False] * 5 + [True]
    assert [ends for _, ends in heard[2]] == [False, False]


@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [
        ([1] * 50, 5, "the prompt has 50 tokens, 10 more than the model's context of 40: shorten it"),
        ([1] * 40, 0, "the prompt has 40 tokens and fills the model's context"),
        ([1] * 30, 15, "5 more than the model's context of 40: ask for at most 10"),
        ([], 5, "the prompt is empty"),
        ([1, VOCAB_SIZE], 5, "token id 301, outside the model's vocabulary of 301"),
        ([1, -1], 5, "token id -1, outside"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_anything_runs(prompt, new, said):
    model = build(family="gpt")
    model.forward = None
    with pytest.raises(ConfigError, match=said):
        generate(model, [prompt], Sampling(max_new_tokens=new))


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        generate(build(family="gpt"), [[1], [1] * 50], Sampling(-1.0, -2, 1.5, max_new_tokens=-3))
    said = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for each in ("temperature -1.0", "top_k -2", "top_p 1.5", "max_new_tokens -3", "prompt 2 has 50 tokens"):
        assert each in said


# ---- drawing ----


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (10_000, 1.0), (0, 0.5), (0, 1e-6), (9, 0.7)]
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(16, 97, generator=torch.Generator().manual_seed(2))
    logits[0, :7] = logits[0].max()  # equals at the edge
    warpers = [process.TemperatureLogitsWarper(temperature)]
    warpers += [process.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    found = probabilities_of(logits, Sampling(temperature, top_k, top_p))
    assert torch.equal(found == 0, expected.softmax(-1) == 0)
    torch.testing.assert_close(found, expected.softmax(-1))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    sampling = Sampling(temperature=1.5, top_k=3)
    generator = [torch.Generator().manual_seed(0)]
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(logits, sampling, generator)] += 1
    expected = probabilities_of(logits, sampling)[0]
    assert counts[0] == 0
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.03)  # about four standard deviations


def test_a_seed_repeats_and_another_one_does_not():
    model = build(family="gpt")
    same = [generate(model, PROMPTS, Sampling(seed=seed, max_new_tokens=20)) for seed in (3, 3, 4)]
    assert same[0] == same[1] != same[2]


def test_a_row_is_drawn_the_same_whatever_stands_below_it_and_equal_prompts_differ():
    model = build(family="neox")
    sampling = Sampling(seed=1, max_new_tokens=20)
    assert generate(model, PROMPTS[:1], sampling)[0] == generate(model, PROMPTS, sampling)[0]
    first, second = generate(model, [PROMPTS[0]] * 2, sampling)
    assert first != second


def test_logits_that_are_no_numbers_are_no_text():
    model = build(family="gpt")
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    for temperature in (0, 1):
        with pytest.raises(DivergenceError, match="logits are not finite"):
            generate(model, [[1]], Sampling(temperature, max_new_tokens=2))


# ---- during training ----


def train(model: GPT, between: Any = None) -> list[float]:
    """Losses of three steps with dropout, with something between them."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        tokens = torch.randint(VOCAB_SIZE, (4, SEQ_LEN + 1))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if between:
            between()
    return losses


def test_samples_leave_training_bit_for_bit_as_it_was(tokenizer):
    plain, sampled = build(family="llama"), build(family="llama")
    seen = []
    expected = train(plain)
    assert train(sampled, lambda: seen.append(sample_text(sampled, tokenizer.to_str(), "def ", 16, seed=1))) == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), sampled.parameters(), strict=True))
    assert len(seen) == 3 and all(seen) and sampled.training and sampled.blocks[0].training


def test_the_mode_comes_back_also_after_an_error():
    model = build(family="gpt")

    def on_token(row: int, token: int, ends: bool) -> bool:
        assert not model.training and not torch.is_grad_enabled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], GREEDY, on_token)
    assert model.training and torch.is_grad_enabled()
    generate(model.eval(), [[1]], Sampling(max_new_tokens=1))
    assert not model.training


def test_a_compiled_model_is_not_compiled_again_for_samples():
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = build(family="llama", dropout=0.0)
    model.compile(backend=backend)
    tokens = torch.ones(2, 9, dtype=torch.long)
    model(tokens, tokens)
    before = len(compiled)
    assert before
    expected = uncached(build(family="llama", dropout=0.0), [5, 8, 13], 10)
    assert generate(model, [[5, 8, 13]], Sampling(temperature=0, max_new_tokens=10)) == [expected]
    model(tokens, tokens)
    assert len(compiled) == before


def test_a_sample_is_text_up_to_the_end_of_text(tokenizer):
    model = build(family="gpt")
    text = sample_text(model, tokenizer.to_str(), "def ", 20, seed=2)
    assert text == sample_text(model, tokenizer.to_str(), "def ", 20, seed=2)
    with torch.no_grad():  # whatever comes, its end of text is the likeliest
        model.ln_f.bias.zero_()
        model.ln_f.weight.zero_()
        model.ln_f.bias[0] = 1.0
        model.tok_emb.weight[end_of_text(tokenizer), 0] = 1000.0
    assert sample_text(model, tokenizer.to_str(), "def ", 20, seed=2) == ""
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    assert sample_text(model, tokenizer.to_str(), "def ", 20, 2) == "(no sample: the model's logits are not finite)"


def test_samples_run_as_often_as_they_are_long_whatever_is_drawn(tokenizer):
    """Under FSDP a forward pass is a collective: no rank may leave early."""
    model = build(family="gpt")
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias[0] = 1.0
        model.tok_emb.weight[end_of_text(tokenizer), 0] = 1000.0
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    sample_text(model, tokenizer.to_str(), "d", 20, seed=0)
    assert len(passes) == 20


def test_what_no_sample_can_be_drawn_from_is_said_at_the_start(tokenizer):
    config = build(family="gpt").config
    check_sample("", None, config, 64)
    check_sample("def ", tokenizer.to_str(), config, 16)
    for prompt, text, tokens, said in (
        ("def ", None, 16, "no tokenizer.json lies beside the shards"),
        ("def ", json.dumps({"model": 3}), 16, "is no tokenizer"),
        ("def ", tokenizer.to_str(), 64, r"more than the model's context of 40: ask for at most .*sample_tokens is 64"),
        ("x" * 99, tokenizer.to_str(), 16, "shorten it"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_sample(prompt, text, config, tokens)


# ---- text ----


def test_a_prompt_is_encoded_as_training_data_is_and_an_empty_one_begins_after_a_text(tokenizer):
    eot_id = end_of_text(tokenizer)
    assert prompt_ids(tokenizer, "") == [eot_id]
    assert eot_id not in prompt_ids(tokenizer, END_OF_TEXT)
    assert tokenizer.decode(prompt_ids(tokenizer, "grüße")) == "grüße"
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(2)
    cutting.enable_padding(length=50)
    assert prompt_ids(cutting, "one two three four") == prompt_ids(tokenizer, "one two three four")
    without = Tokenizer(models.BPE())
    assert end_of_text(without) is None
    with pytest.raises(ConfigError, match="no end of text"):
        prompt_ids(without, "")


def streamed(tokenizer: Tokenizer, ids: list[int], *stops: str) -> list[str]:
    stream = TextStream(tokenizer, stops)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """A tokenizer whose tokens are single bytes, so that every character is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("text", ["plain", "grüße 世界 🙂👍🏽", "🙂", ""])
def test_streamed_text_is_whole_characters_and_all_of_them(bytewise, text):
    ids = bytewise.encode(text).ids
    pieces = streamed(bytewise, ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)  # one at a time, none torn
    if text == "🙂":
        assert pieces == ["", "", "", "🙂", ""]


def test_bytes_that_are_no_text_are_shown_as_such_and_hold_nothing_up(bytewise):
    draw_byte = torch.Generator().manual_seed(0)
    good = bytewise.encode("🙂 ü").ids
    for _ in range(200):
        noise = torch.randint(256, (12,), generator=draw_byte).tolist()
        pieces = streamed(bytewise, [*noise, *good, *noise])
        assert "".join(pieces) == bytewise.decode([*noise, *good, *noise], skip_special_tokens=False)
    replaced = "a\ufffdb\ufffd"  # the very character that decoders write for broken bytes
    assert "".join(streamed(bytewise, bytewise.encode(replaced).ids)) == replaced
    broken = bytewise.encode("🙂").ids[0]
    pieces = streamed(bytewise, [broken] * 9)
    assert "".join(pieces[:-1]).count("\ufffd") >= 6
    assert "".join(streamed(bytewise, [broken, *good])) == "\ufffd🙂 ü"


def test_a_stop_text_ends_the_stream_before_it_and_is_never_shown_in_part(tokenizer):
    ids = prompt_ids(tokenizer, "one two\nUser: three")
    pieces = streamed(tokenizer, ids, "\nUser:", "never")
    assert "".join(pieces) == "one two"
    ids = prompt_ids(tokenizer, "one\nUse it\nUs")  # begins like the stop text, twice
    assert "".join(streamed(tokenizer, ids, "\nUser:")) == "one\nUse it\nUs"
    stream = TextStream(tokenizer, ["two"])
    shown = "".join(stream.push(token) for token in prompt_ids(tokenizer, "one two three"))
    assert stream.stopped and shown + stream.finish() == "one "
