from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pretrain.errors import ConfigError, ShardError
from pretrain.tokenizers import END_OF_TEXT, encode, end_of_text_id, load_tokenizer, save_tokenizer, train_bpe

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # grüße, 世界 {i * 7919}\n" for i in range(200)]


def test_a_trained_tokenizer_has_exactly_so_many_ids_and_gives_any_text_back():
    tokenizer = train_bpe(TEXTS, 400)
    assert tokenizer.get_vocab_size() == 400
    texts = [*TEXTS, "never seen: 🙂 \x00\t\r\n", ""]
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert ids.dtype == np.uint16 and ids.ndim == 1
        assert ids[-1] == end_of_text_id(tokenizer) and (ids[:-1] != ids[-1]).all()
        assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_text_that_spells_the_end_of_text_does_not_end_a_document():
    tokenizer = train_bpe(TEXTS, 300)
    (ids,) = encode(tokenizer, [f"a{END_OF_TEXT}b"])
    assert (ids == end_of_text_id(tokenizer)).sum() == 1


def test_training_is_the_same_in_every_process():
    code = (
        "from tests.unit.test_tokenizers import TEXTS, train_bpe;import hashlib;"
        "print(hashlib.sha256(train_bpe(TEXTS, 500).to_str().encode()).hexdigest())"
    )
    hashes = set()
    for seed, parallel in (("1", "true"), ("2", "false")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        hashes.add(run.stdout)
    assert len(hashes) == 1


def test_saved_and_loaded_it_encodes_the_same(tmp_path):
    tokenizer = train_bpe(TEXTS, 400)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    ours, theirs = encode(tokenizer, TEXTS), encode(loaded, TEXTS)
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_wrong_sizes_and_files_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="256"):
        train_bpe(TEXTS, 200)
    with pytest.raises(ShardError, match="expected 30000"):
        train_bpe(TEXTS, 30000)
    with pytest.raises(ShardError, match="can't read tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(ShardError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "bad.json")
