from __future__ import annotations

import gzip
import json
import math
import zlib

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

from model import GPT
from pretrain.batches import validation_batches
from pretrain.config import DataConfig
from pretrain.errors import ConfigError, DivergenceError, ShardError
from pretrain.eval_sources import shard_source, text_source
from pretrain.evaluation import Source, Text, TokenStream, bytes_per_token, evaluate, windows
from pretrain.harness import TaskFigure, check_harness, check_tasks, task_figures
from pretrain.model_config import ModelConfig
from pretrain.shards import fetch_shards
from pretrain.storage import LocalStore
from pretrain.tokenizers import END_OF_TEXT, encode, end_of_text_id, save_tokenizer, train_bpe

VOCAB, SEQ_LEN = 300, 16
TEXTS = [f"def f_{i}(x):\n    return x + {i}  # grüße, 世界 🙂 {i * 7919}\r\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, VOCAB)


def make_model(family: str = "gpt", vocab_size: int = VOCAB) -> GPT:
    config = ModelConfig(
        family=family,
        size="custom",
        n_layer=2,
        n_head=4,
        n_kv_head=2 if family == "llama" else 0,
        d_model=32,
        vocab_size=vocab_size,
        seq_len=SEQ_LEN,
        dropout=0.5,  # that evaluation has none must show
    ).resolve()
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform, so that a wrong context changes the loss
    return model.eval()


def make_source(n_tokens: int, seed: int = 0, **known: object) -> Source:
    ids = np.random.default_rng(seed).integers(0, VOCAB, n_tokens)
    pieces = [Text(part) for part in np.array_split(ids, 5)] if n_tokens >= 5 else [Text(ids)]
    return Source("random", TokenStream(pieces), known.pop("token_bytes", None), **known)


def tokens_of(source: Source) -> torch.Tensor:
    return torch.from_numpy(source.stream.read(0, source.stream.n_tokens))


def score(model, source, stride=SEQ_LEN, **more):
    return evaluate(model, source, **{"seq_len": SEQ_LEN, "stride": stride, "batch_size": 3, **more})


# ---- windows ----


@pytest.mark.parametrize("n_targets", [1, 2, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("stride", [1, 3, 15, 16])
def test_every_target_is_scored_once_with_all_the_context_its_window_promises(n_targets, stride):
    seen = []
    for window in windows(n_targets, SEQ_LEN, stride):
        end = window.start + window.length
        scored = range(end - window.scored, end)
        seen += scored
        assert window.length == min(SEQ_LEN, n_targets) and window.start >= 0
        if window.start:  # tokens before a target, in its window
            assert all(target - window.start >= SEQ_LEN - stride for target in scored)
    assert seen == list(range(n_targets))


def test_a_stream_reads_across_its_pieces():
    ids = np.arange(40)
    stream = TokenStream([Text(ids[:1]), Text(ids[1:20]), Text(ids[20:20]), Text(ids[20:])])
    assert stream.n_tokens == 40
    for start, count in ((0, 40), (0, 1), (1, 1), (19, 2), (20, 20), (5, 30)):
        assert np.array_equal(stream.read(start, count), ids[start : start + count])


# ---- the loss ----


def loss_by_hand(model, tokens: torch.Tensor, stride: int) -> float:
    """Each target by a forward pass of its own over exactly the tokens that its window shows it."""
    n_targets, nats = len(tokens) - 1, 0.0
    for target in range(1, n_targets + 1):
        end = SEQ_LEN  # of the first window that reaches this target
        while end < target:
            end += stride
        first = max(0, min(end, n_targets) - SEQ_LEN)
        with torch.no_grad():
            logits = model(tokens[None, first:target])[0, -1]
        nats -= torch.log_softmax(logits.double(), -1)[tokens[target]].item()
    return nats / n_targets


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize(("stride", "n_tokens"), [(1, 40), (5, 70), (11, 71), (16, 49), (16, 60), (4, 9)])
def test_the_strided_loss_is_that_of_one_forward_pass_a_target(family, stride, n_tokens):
    model, source = make_model(family), make_source(n_tokens)
    found = score(model, source, stride)
    assert found.tokens == n_tokens - 1
    assert found.loss == pytest.approx(loss_by_hand(model, tokens_of(source), stride), rel=1e-5)


def test_more_context_changes_the_loss():
    model, source = make_model(), make_source(200)
    losses = {stride: score(model, source, stride).loss for stride in (1, 8, 16)}
    assert len({round(loss, 4) for loss in losses.values()}) == 3  # else the test above could not fail


def test_the_batch_size_changes_nothing():
    model, source = make_model(), make_source(150)
    losses = [score(model, source, 7, batch_size=size).loss for size in (1, 2, 50)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_full_stride_gives_the_loss_of_trainings_validation(tmp_path):
    ids = np.random.default_rng(3).integers(0, VOCAB, 12 * SEQ_LEN + 6).astype(np.uint16)
    for index, part in enumerate(np.array_split(ids, 3)):
        np.savez(tmp_path / f"{index}.npz", input_ids=part)
    data = DataConfig(source=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    model = make_model()
    shards = fetch_shards(LocalStore(tmp_path), data, vocab_size=VOCAB).shards
    sequences = torch.from_numpy(validation_batches(shards, SEQ_LEN, 1000))
    with torch.no_grad():
        expected = model(sequences[:, :-1], sequences[:, 1:]).item()
    source = shard_source(data, VOCAB, None)
    assert score(model, source, max_tokens=12 * SEQ_LEN).loss == pytest.approx(expected, rel=1e-6)
    assert score(model, source).tokens == len(ids) - 1  # what is left of a window is scored as well


@pytest.mark.parametrize("stride", [1, 16])
def test_a_model_that_knows_nothing_has_the_loss_of_its_vocabulary(stride):
    found = score(lambda tokens: torch.zeros(*tokens.shape, VOCAB), make_source(90), stride)
    assert found.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert found.bytes is None and found.bits_per_byte is None


def test_half_precision_logits_lose_nothing_more():
    """In bf16 log(300) is 5.6875, and a sum stands still at 256 times its summands."""
    n = 20_001
    found = score(lambda tokens: torch.zeros(*tokens.shape, VOCAB, dtype=torch.bfloat16), make_source(n))
    assert found.nats == pytest.approx((n - 1) * math.log(VOCAB), rel=3e-7)


def model_by_ids(tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model that thinks the same id comes again."""
    return F.one_hot(tokens, VOCAB).float() * 3


def test_max_tokens_scores_the_first_and_progress_ends_at_all():
    source, seen = make_source(100), []
    found = score(model_by_ids, source, 4, max_tokens=41, on_progress=lambda *at: seen.append(at))
    tokens = tokens_of(source)
    expected = F.cross_entropy(model_by_ids(tokens[:41]), tokens[1:42]).item()
    assert found.tokens == 41 and found.loss == pytest.approx(expected, rel=1e-6)
    assert seen[-1] == (41, 41) and [at[0] for at in seen] == sorted({at[0] for at in seen})
    assert score(model_by_ids, source, max_tokens=1000).tokens == 99


def test_what_can_not_be_scored_is_said():
    source = make_source(100)
    for stride in (0, SEQ_LEN + 1):
        with pytest.raises(ConfigError, match=r"--stride \d+ must be in \[1, 16\]"):
            score(model_by_ids, source, stride)
    with pytest.raises(ShardError, match="found 1 tokens, expected at least 2"):
        score(model_by_ids, make_source(1))
    with pytest.raises(DivergenceError, match="loss is nan"):
        score(lambda tokens: model_by_ids(tokens) * math.nan, source)


def test_a_loss_beyond_all_floats_has_an_infinite_perplexity():
    source = Source("x", TokenStream([Text(np.array([0, 1]))]), None)
    assert score(lambda tokens: F.one_hot(tokens, VOCAB) * 1e6, source).perplexity == math.inf


# ---- bytes ----


def test_the_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer):
    lengths = bytes_per_token(tokenizer, VOCAB)
    odd = [*TEXTS, "never seen: 🙂 \x00\t\r\n", "é", f"a{END_OF_TEXT}b", ""]
    for text, ids in zip(odd, encode(tokenizer, odd), strict=True):
        assert lengths[ids].sum() == len(text.encode())
    assert lengths[end_of_text_id(tokenizer)] == 0
    assert (bytes_per_token(tokenizer, VOCAB + 5)[VOCAB:] == -1).all()


def test_a_tokenizer_that_is_not_byte_level_has_no_bytes_per_token():
    vocabulary = {"▁a": 0, "b": 1, "<unk>": 2}
    metaspace = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    assert bytes_per_token(metaspace, 3) is None
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert bytes_per_token(metaspace, 3) is None


def test_bits_per_byte_by_hand(tokenizer, tmp_path):
    """A uniform model over V ids costs log2(V) bits a token, the ends of the documents included."""
    (tmp_path / "a.txt").write_bytes("grüße 🙂\r\n".encode())
    (tmp_path / "b.txt").write_bytes(b"def f_1(x):")
    source = text_source([str(tmp_path)], tokenizer, VOCAB)
    found = score(lambda tokens: torch.zeros(*tokens.shape, VOCAB), source)
    n_bytes = 3 + 2 * 2 + 1 + 4 + 2 + 11  # gre, ü and ß, the blank, the smiley, the line's end; the second document
    n_tokens = sum(len(ids) for ids in encode(tokenizer, ["grüße 🙂\r\n", "def f_1(x):"]))
    assert found.bytes == n_bytes == len("grüße 🙂\r\ndef f_1(x):".encode())
    assert found.tokens == n_tokens
    assert found.bits_per_byte == pytest.approx(n_tokens * math.log2(VOCAB) / n_bytes, rel=1e-6)


def test_the_bytes_are_those_of_the_scored_tokens(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    source = text_source([str(tmp_path)], tokenizer, VOCAB)
    lengths, tokens = bytes_per_token(tokenizer, VOCAB), tokens_of(source)
    for n in (1, 7, len(tokens) - 2):
        assert score(model_by_ids, source, 4, max_tokens=n).bytes == lengths[tokens[1 : n + 1]].sum()


# ---- text ----


def test_text_is_read_as_documents_that_end_with_the_end_of_text(tokenizer, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(TEXTS[1].encode())
    lines = [json.dumps({"text": TEXTS[2]}), "", json.dumps({"text": ""}), json.dumps({"text": TEXTS[3]})]
    (folder / "deep" / "c.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "ignored.md").write_text("not this")
    (folder / "empty.txt").write_text("")
    single = tmp_path / "single.txt"
    single.write_bytes(TEXTS[0].encode())
    source = text_source([str(single), str(folder)], tokenizer, VOCAB)
    expected = np.concatenate([[end_of_text_id(tokenizer)], *encode(tokenizer, TEXTS[:4])])
    assert np.array_equal(tokens_of(source), expected)
    assert source.text_bytes == sum(len(text.encode()) for text in TEXTS[:4])
    assert source.title == f"{single} and 1 more"


def test_another_key_and_only_as_much_as_is_scored(tokenizer, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS * 5) + "{")
    source = text_source(
        [str(path)], tokenizer, VOCAB, text_key="content", max_tokens=100
    )  # never reaches the bad line
    whole = sum(len(ids) for ids in encode(tokenizer, TEXTS * 5))
    assert 100 < source.stream.n_tokens < whole
    with pytest.raises(ShardError, match=r"many\.jsonl, byte \d{3,}: not JSON"):
        text_source([str(path)], tokenizer, VOCAB, text_key="content")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "found no text"),
        ("a.jsonl", b"\n\n", "found no text"),
        ("a.txt", b"fine \xff\xfe", "a.txt: not UTF-8: .*position 5"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl, byte 0: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "byte 0: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"texts": 1}', "byte 14: 'text' is not among the keys texts.*--text_key"),
        ("a.jsonl", b"[1]", "byte 0: a JSON list, not an object"),
        ("a.jsonl", b'{"text": ', "byte 0: not JSON"),
        ("a.npz", b"PK", "no raw text behind .*Read here: .txt, .jsonl"),
    ],
)
def test_text_that_can_not_be_read_is_explained(tokenizer, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShardError, match=says):
        text_source([str(tmp_path / name)], tokenizer, VOCAB)


def test_no_such_file_and_another_tokenizer(tokenizer, tmp_path):
    with pytest.raises(ShardError, match=r"no raw text behind .*none\.txt"):
        text_source([str(tmp_path / "none.txt")], tokenizer, VOCAB)
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    with pytest.raises(ShardError, match="the model's vocabulary has 260"):
        text_source([str(tmp_path)], tokenizer, 260)


def test_what_a_tokenizer_says_of_lengths_is_not_obeyed(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    expected = tokens_of(text_source([str(tmp_path)], tokenizer, VOCAB)).tolist()
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(2)
    cutting.enable_padding(length=50)
    assert tokens_of(text_source([str(tmp_path)], cutting, VOCAB)).tolist() == expected


def test_a_tokenizer_with_another_end_of_text_or_none(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    words = {"a": 0, "b": 1, "</s>": 2}
    source = text_source([str(tmp_path)], word_tokenizer(words), 3)
    assert tokens_of(source).tolist() == [2, 0, 1, 2]
    assert score(model_by_ids, source).bytes == 3  # the text's own, whatever the tokenizer
    assert score(model_by_ids, source, max_tokens=2).bytes is None
    assert (
        not source.note
        and "not byte-level" in text_source([str(tmp_path)], word_tokenizer(words), 3, max_tokens=2).note
    )
    with pytest.raises(ShardError, match="no end of text"):
        text_source([str(tmp_path)], word_tokenizer({"a": 0, "b": 1}), 3)


def word_tokenizer(words: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


# ---- shards ----


def make_shards(folder, tokenizer, beside=True, vocab_size=VOCAB):
    folder.mkdir()
    ids = np.concatenate(list(encode(tokenizer, TEXTS[:6])))
    for index, part in enumerate(np.array_split(ids, 2)):  # cut in the midst of a document, maybe of a character
        np.savez(folder / f"{index}.npz", input_ids=part)
    if beside:
        save_tokenizer(tokenizer, folder / "tokenizer.json")
    manifest = {"tokenizer": "bpe", "vocab_size": vocab_size, "eot_id": 0, "shards": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return DataConfig(source=str(folder), cache_dir=str(folder.parent / f"cache-{zlib.crc32(str(folder).encode())}"))


def test_the_bytes_of_shards_come_from_the_tokenizer_beside_them_or_the_models(tokenizer, tmp_path):
    n_bytes = len("".join(TEXTS[:6]).encode())
    for data, known in (
        (make_shards(tmp_path / "with", tokenizer), None),
        (make_shards(tmp_path / "without", tokenizer, beside=False), tokenizer),
    ):
        source = shard_source(data, VOCAB, known)
        first = bytes_per_token(tokenizer, VOCAB)[source.stream.read(0, 1)[0]]
        assert score(model_by_ids, source).bytes == n_bytes - first  # nothing stands before it, so it is not scored
        assert not source.note


def test_without_any_tokenizer_there_are_no_bits_per_byte_and_it_is_said(tokenizer, tmp_path):
    source = shard_source(make_shards(tmp_path / "shards", tokenizer, beside=False), VOCAB, None)
    assert score(model_by_ids, source).bits_per_byte is None
    assert "no bits per byte" in source.note


def test_shards_of_another_vocabulary_or_tokenizer_are_refused(tokenizer, tmp_path):
    with pytest.raises(ShardError, match=r"vocab_size 300 .*the model has model\.vocab_size 512"):
        shard_source(make_shards(tmp_path / "a", tokenizer), 512, None)
    assert shard_source(make_shards(tmp_path / "rows", tokenizer), 512, None, may_be_larger=True).stream.n_tokens > 2
    with pytest.raises(ShardError, match=r"vocab_size 300 .*the model has model\.vocab_size 299"):
        shard_source(make_shards(tmp_path / "less", tokenizer), 299, None, may_be_larger=True)
    other = train_bpe(["quite another text, with other pairs. " * 9, *TEXTS], VOCAB)
    with pytest.raises(ShardError, match="other tokens than the model's"):
        shard_source(make_shards(tmp_path / "b", tokenizer), VOCAB, other)
    data = make_shards(tmp_path / "c", tokenizer, vocab_size=0)  # a manifest that doesn't know it
    with pytest.raises(ShardError, match="expected ids below the vocabulary of 200"):
        shard_source(data, 200, None)
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    with pytest.raises(ShardError, match=r"c/tokenizer.json is not a tokenizer"):
        shard_source(data, VOCAB, None)


def test_an_id_that_the_tokenizer_does_not_have_has_no_bytes(tokenizer):
    source = make_source(20, token_bytes=np.full(VOCAB, -1))
    with pytest.raises(ShardError, match="none of its tokenizer's"):
        score(model_by_ids, source)


# ---- tasks ----


def test_the_harness_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed. Install it: pip install .*requirements-eval.txt"):
        check_harness()


def test_unknown_tasks_are_named_with_their_nearest():
    check_tasks(["hellaswag"], ["arc_easy", "hellaswag"])
    with pytest.raises(ConfigError) as caught:
        check_tasks(["helaswag", "hellaswag", "zzz"], ["arc_easy", "hellaswag"])
    assert caught.value.problems == [
        "lm-eval-harness knows no task 'helaswag'; near are hellaswag",
        "lm-eval-harness knows no task 'zzz'",
    ]


def test_the_harness_results_become_figures():
    results = {
        "mine": {
            "alias": "mine",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "f1,strict": 1,
            "f1_stderr,strict": "N/A",
            "sample_len": 6,
        }
    }
    assert task_figures(results) == [
        TaskFigure("mine", "acc", "none", 0.5, 0.1),
        TaskFigure("mine", "f1", "strict", 1.0, None),
    ]


def test_text_is_read_in_every_form_that_is_prepared(tokenizer, tmp_path):
    with gzip.open(tmp_path / "c4-train.00000-of-01024.json.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[:3])
    source = text_source([str(tmp_path / "c4-*.json.gz")], tokenizer, VOCAB)
    expected = np.concatenate([[end_of_text_id(tokenizer)], *encode(tokenizer, TEXTS[:3])])
    assert np.array_equal(tokens_of(source), expected)
