from __future__ import annotations

import dataclasses
import json

import pytest

from pretrain.arguments import parse, to_yaml
from pretrain.errors import ConfigError
from pretrain.hf_config import CLASSES, model_type_of, to_hf
from pretrain.hf_source import from_hf
from pretrain.model_config import ModelConfig

SMALL = {"size": "custom", "n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 101, "seq_len": 19}


def model(**options) -> ModelConfig:
    return ModelConfig(**{**SMALL, **options}).resolve()


def hf_folder(folder, model_type="llama", /, **changes):
    """A folder with the config.json of a small model, with changes; None leaves an option out."""
    family = CLASSES[model_type].family
    tree = {**to_hf(model(family=family), 5, "fp32"), **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in tree.items() if changes.get(name, 0) is not None})
    )
    return folder


# ---- out ----


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ({"family": "gpt"}, "gpt2"),
        ({"family": "gpt", "position": "rope"}, "gpt_neox"),
        ({"family": "gpt", "activation": "relu", "tie_embeddings": False}, "gpt2"),
        ({"family": "neox"}, "gpt_neox"),
        ({"family": "neox", "position": "learned", "parallel_residual": False}, "gpt2"),
        ({"family": "llama", "tie_embeddings": True}, "llama"),
        ({"family": "llama", "qk_norm": True}, "qwen3"),
        ({"family": "qwen3", "qk_norm": False}, "llama"),
        ({"family": "opt"}, "opt"),
        ({"family": "opt", "norm_eps": 1e-6}, "gpt2"),
    ],
)
def test_the_options_choose_the_class(options, model_type):
    assert model_type_of(model(**options)) == model_type


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "gpt", "norm": "rmsnorm"}, ["GPT2LMHeadModel", "model.norm is rmsnorm"]),
        ({"family": "gpt", "bias": False}, ["GPT2LMHeadModel", "model.bias is False"]),
        ({"family": "gpt", "n_kv_head": 2}, ["model.n_kv_head is 2"]),
        ({"family": "gpt", "head_dim": 16}, ["model.head_dim is 16"]),
        ({"family": "gpt", "parallel_residual": True}, ["GPT2LMHeadModel", "model.parallel_residual is True"]),
        ({"family": "neox", "qk_norm": True}, ["GPTNeoXForCausalLM", "model.qk_norm is True"]),
        ({"family": "neox", "n_kv_head": 1}, ["GPTNeoXForCausalLM", "model.n_kv_head is 1"]),
        ({"family": "llama", "rotary_pct": 0.5}, ["LlamaForCausalLM", "model.rotary_pct is 0.5"]),
        ({"family": "llama", "norm": "layernorm"}, ["LlamaForCausalLM", "model.norm is layernorm"]),
        ({"family": "llama", "activation": "relu"}, ["model.activation is relu"]),
        ({"family": "llama", "n_head": 3, "head_dim": 8}, ["model.d_model 32 is not divisible by model.n_head 3"]),
        ({"family": "qwen3", "bias": True}, ["Qwen3ForCausalLM", "model.bias is True"]),
        ({"family": "llama", "position": "learned"}, ["LlamaForCausalLM", "model.position is learned"]),
        ({"family": "opt", "activation": "swiglu"}, ["OPTForCausalLM", "model.activation is swiglu"]),
    ],
)
def test_what_no_class_can_express_names_the_option_in_the_way(options, words):
    with pytest.raises(ConfigError) as raised:
        to_hf(model(**options), None, "fp32")
    assert all(word in raised.value.line() for word in words), raised.value.line()
    assert "\n" not in raised.value.line()


def test_the_document_says_what_the_class_would_assume_otherwise():
    tree = to_hf(model(family="opt"), None, "bf16")
    assert (tree["dtype"], tree["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert tree["pad_token_id"] is None and tree["eos_token_id"] is None  # OPT's own defaults are 1 and 2
    assert to_hf(model(family="gpt"), 7, "fp32")["eos_token_id"] == 7
    neox = to_hf(model(family="neox", rotary_pct=0.5, rope_theta=500.0), None, "fp32")
    assert neox["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert (neox["rotary_pct"], neox["rotary_emb_base"]) == (0.5, 500.0)  # transformers 4


# ---- in ----


def test_both_spellings_of_rope_are_read(tmp_path):
    new = from_hf(hf_folder(tmp_path, "gpt_neox", rotary_pct=None, rotary_emb_base=None))
    old = from_hf(hf_folder(tmp_path, "gpt_neox", rope_parameters=None))
    assert new == old and new["rotary_pct"] == 0.25
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert from_hf(hf_folder(tmp_path, "llama", rope_theta=None, rope_parameters=rope))["rope_theta"] == 5e5
    assert from_hf(hf_folder(tmp_path, "llama", rope_theta=5e5, rope_parameters=None))["rope_theta"] == 5e5


def test_what_a_class_leaves_out_has_its_default(tmp_path):
    assert from_hf(hf_folder(tmp_path, "gpt2", n_inner=None))["d_ff"] == 128
    llama = from_hf(hf_folder(tmp_path, "llama", head_dim=None, num_key_value_heads=None, rms_norm_eps=None))
    assert (llama["head_dim"], llama["n_kv_head"], llama["norm_eps"]) == (8, 4, 1e-6)
    assert from_hf(hf_folder(tmp_path, "gpt2", tie_word_embeddings=None))["tie_embeddings"] is True
    assert from_hf(hf_folder(tmp_path, "llama", tie_word_embeddings=None))["tie_embeddings"] is False
    assert from_hf(hf_folder(tmp_path, "qwen3", head_dim=None, rope_theta=None))["head_dim"] == 128


@pytest.mark.parametrize(
    ("model_type", "changes", "word"),
    [
        ("llama", {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ("llama", {"architectures": None, "model_type": "mamba"}, "mamba"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "n_kv_head"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ("opt", {"enable_bias": False}, "enable_bias"),
        ("opt", {"activation_function": "tanh"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_its_option(tmp_path, model_type, changes, word):
    with pytest.raises(ConfigError) as raised:
        from_hf(hf_folder(tmp_path, model_type, **changes))
    assert word in str(raised.value) and str(tmp_path) in str(raised.value)


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as raised:
        from_hf(hf_folder(tmp_path, "opt", enable_bias=False, do_layer_norm_before=False, vocab_size=-1))
    assert len(raised.value.problems) >= 3


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_a_config_that_is_none_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        from_hf(tmp_path)


# ---- --model.init_from ----

BASE = ["--data", "shards", "--no-version-check"]


def test_init_from_takes_the_shape_of_the_folder(tmp_path):
    folder = hf_folder(tmp_path, "qwen3", num_key_value_heads=2, rms_norm_eps=1e-5)
    config = parse([*BASE, "--model.init_from", str(folder), "--model.dropout", "0"]).config.model
    assert (config.family, config.n_layer, config.n_kv_head, config.d_model) == ("qwen3", 2, 2, 32)
    assert (config.vocab_size, config.norm_eps, config.qk_norm, config.dropout) == (101, 1e-5, True, 0)
    assert config.init_from == str(folder)


def test_an_explicit_setting_that_agrees_is_no_contradiction(tmp_path):
    folder = hf_folder(tmp_path, "gpt2")
    argv = [*BASE, "--model.init_from", str(folder), "--model.n_layer", "2", "--model.norm_eps", "1e-5"]
    assert parse([*argv, "--model.bias", "true", "--model.n_head", "0"]).config.model.n_head == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [("n_layer", "3"), ("family", "llama"), ("bias", "false"), ("size", "125M"), ("seq_len", "7"), ("norm_eps", "0.1")],
)
def test_an_explicit_setting_that_contradicts_is_named(tmp_path, option, value):
    folder = hf_folder(tmp_path, "gpt2")
    with pytest.raises(ConfigError) as raised:
        parse([*BASE, "--model.init_from", str(folder), f"--model.{option}", value])
    (problem,) = raised.value.problems
    assert problem.startswith(f"model.{option} ") and "contradicts model.init_from" in problem


def test_with_rope_the_context_is_free(tmp_path):
    folder = hf_folder(tmp_path, "llama", max_position_embeddings=100_000)
    argv = [*BASE, "--model.init_from", str(folder)]
    assert parse([*argv, "--model.seq_len", "64"]).config.model.seq_len == 64
    of_the_file = parse(BASE).config.model.seq_len
    assert parse(argv).config.model.seq_len == of_the_file  # of configs/test.yaml, not 100,000


def test_the_saved_config_is_read_back(tmp_path):
    folder = hf_folder(tmp_path, "llama")
    config = parse([*BASE, "--model.init_from", str(folder)]).config
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert parse(["--config", str(saved)]).config.model == config.model
    saved.write_text(to_yaml(dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=3))))
    with pytest.raises(ConfigError, match=r"model\.n_layer 3 contradicts"):
        parse(["--config", str(saved)])


def test_a_checkpoints_config_resumes_where_the_folder_is_gone(tmp_path):
    folder = hf_folder(tmp_path, "llama", num_key_value_heads=2)
    config = parse([*BASE, "--model.init_from", str(folder)]).config
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    (folder / "config.json").unlink()
    assert parse(["--config", str(saved), "--resume", "auto"]).config.model == config.model
    for argv in (["--config", str(saved)], [*BASE, "--model.init_from", str(folder), "--resume", "auto"]):
        with pytest.raises(ConfigError, match=r"config\.json can't be read"):
            parse(argv)
