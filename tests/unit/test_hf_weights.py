from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError
from pretrain.hf_config import to_hf
from pretrain.hf_weights import INDEX_FILE, WEIGHTS_FILE, entries, load_hf
from pretrain.model_config import ModelConfig, parameter_shapes
from pretrain.pretrained import first_weights
from tests.helpers_training import flip_a_byte

SMALL = {"size": "custom", "n_layer": 1, "n_head": 4, "d_model": 32, "vocab_size": 101, "seq_len": 19}
FAMILIES = ("gpt", "neox", "llama", "qwen3", "opt")


def config_of(family, **options):
    return ModelConfig(**{**SMALL, "family": family, **options}).resolve()


def numbered(config):
    """Tensors in which every number is another one, the vocabulary's padding 0."""
    weights = {}
    for number, (name, shape) in enumerate(parameter_shapes(config)):
        weights[name] = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + number * 1e5 + 1
        if name in ("tok_emb.weight", "head.weight"):
            weights[name][config.vocab_size :] = 0
    return weights


def theirs_of(config):
    weights = numbered(config)
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for entry in entries(config)
        for name, tensor in zip(entry.theirs, entry.out(weights[entry.ours]), strict=True)
    }


def write(folder, config, tensors=None):
    """A Hugging Face folder of the numbered tensors, or of others."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config, None, "fp32")))
    save_file(theirs_of(config) if tensors is None else tensors, folder / WEIGHTS_FILE)
    return folder


@pytest.fixture(params=FAMILIES)
def config(request):
    return config_of(request.param, **({"n_kv_head": 2} if request.param in ("llama", "qwen3") else {}))


def test_every_tensor_goes_out_once_and_comes_back(config):
    weights = numbered(config)
    names = [name for entry in entries(config) for name in entry.theirs]
    assert len(set(names)) == len(names)
    assert [entry.ours for entry in entries(config)] == list(weights)
    for entry in entries(config):
        out = entry.out(weights[entry.ours])
        assert {name: tuple(t.shape) for name, t in zip(entry.theirs, out, strict=True)} == entry.their_shapes()
        assert torch.equal(entry.back(out), weights[entry.ours]), entry.ours


def test_tables_lose_their_padding_and_get_it_back(config, tmp_path):
    table = next(entry for entry in entries(config) if entry.ours == "tok_emb.weight")
    assert list(table.their_shapes().values()) == [(101, 32)]
    loaded = dict(load_hf(write(tmp_path, config), config))
    assert loaded["tok_emb.weight"].shape == (128, 32)
    assert not loaded["tok_emb.weight"][101:].any() and loaded["tok_emb.weight"][:101].all()


def test_opt_has_two_rows_of_positions_that_nothing_reads():
    config = config_of("opt")
    positions = theirs_of(config)["model.decoder.embed_positions.weight"]
    assert positions.shape == (21, 32) and not positions[:2].any() and positions[2:].all()


def test_heads_of_neox_are_fused_one_by_one():
    config = config_of("neox", n_head=2)
    ours = torch.arange(96.0)  # 3 × 2 heads × 16
    (entry,) = [entry for entry in entries(config) if entry.ours == "blocks.0.attn.qkv.bias"]
    (theirs,) = entry.out(ours)
    # the first head's query, key and value, then the second's
    assert theirs.view(2, 3, 16)[0, :, 0].tolist() == [0, 32, 64]
    assert theirs.view(2, 3, 16)[1, :, 0].tolist() == [16, 48, 80]


def test_half_precision_is_read_as_fp32(tmp_path):
    config = config_of("llama")
    rounded = {name: tensor.bfloat16() for name, tensor in theirs_of(config).items()}
    loaded = dict(load_hf(write(tmp_path, config, rounded), config))
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["blocks.0.mlp.up.weight"], numbered(config)["blocks.0.mlp.up.weight"].bfloat16().float())


def test_several_files_are_found_by_their_index(config, tmp_path):
    whole, parts = write(tmp_path / "whole", config), tmp_path / "parts"
    parts.mkdir()
    tensors = load_file(whole / WEIGHTS_FILE)
    weight_map = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, of in weight_map.items() if of == file}, parts / file)
    (parts / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    for (name, one), (other_name, other) in zip(load_hf(whole, config), load_hf(parts, config), strict=True):
        assert name == other_name and torch.equal(one, other)


def test_names_of_the_bare_model_and_old_buffers_are_understood(tmp_path):
    config = config_of("gpt")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in theirs_of(config).items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 19, 19), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert dict(load_hf(write(tmp_path, config, bare), config)).keys() == numbered(config).keys()


def test_a_tied_head_may_be_stored_where_it_is_the_embedding(tmp_path):
    config = config_of("gpt")
    tensors = theirs_of(config)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    dict(load_hf(write(tmp_path, config, tensors), config))
    tensors["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not in the model"):
        dict(load_hf(write(tmp_path, config, tensors), config))


def test_each_wrong_tensor_is_named_before_anything_is_loaded(tmp_path):
    config = config_of("llama")
    tensors = theirs_of(config)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.1.input_layernorm.weight"] = torch.zeros(32)
    tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(32, dtype=torch.int32)
    weights = first_weights(replace(config, init_from=str(write(tmp_path, config, tensors))), 0)
    with pytest.raises(CheckpointError) as raised:
        next(weights)
    for words in (
        "model.norm.weight is missing",
        "model.layers.1.input_layernorm.weight is not in the model",
        "model.layers.0.mlp.up_proj.weight is (3, 5)",
        "model.layers.0.input_layernorm.weight is I32",
    ):
        assert words in str(raised.value)


def test_a_fresh_model_begins_with_the_weights(tmp_path):
    config = config_of("neox", tie_embeddings=True)
    found = list(first_weights(replace(config, init_from=str(write(tmp_path, config))), 0))
    weights = numbered(config)
    assert [name for name, _ in found] == list(dict(parameter_shapes(config)))
    assert all(torch.equal(weight, weights[name]) for name, weight in found)


def test_files_that_are_none_are_named(tmp_path):
    config = config_of("llama")
    folder = write(tmp_path, config)
    flip_a_byte(folder / WEIGHTS_FILE, 9)  # in the header
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        dict(load_hf(folder, config))
    (folder / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        dict(load_hf(folder, config))
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        dict(load_hf(folder, config))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickles, which are never read"):
        dict(load_hf(folder, config))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": [1]}'])
def test_an_index_that_is_none_is_named(tmp_path, index):
    config = config_of("llama")
    folder = write(tmp_path / "inner", config)
    shutil.copy(folder / WEIGHTS_FILE, tmp_path / WEIGHTS_FILE)
    (folder / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        dict(load_hf(folder, config))
