"""Every family against its class in transformers: the same logits, the same loss, the same gradient of every weight."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPT
from pretrain.hf_config import CLASSES, model_type_of, to_hf
from pretrain.hf_source import from_hf
from pretrain.hf_weights import WEIGHTS_FILE, entries, load_hf
from pretrain.model_config import ModelConfig

transformers = pytest.importorskip("transformers")

SMALL = {"size": "custom", "n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 101, "seq_len": 19, "dropout": 0.0}
EXACT = 1e-4
CASES = {
    "gpt": {"family": "gpt"},
    "gpt-untied": {"family": "gpt", "tie_embeddings": False, "n_layer": 3, "n_head": 1},
    "gpt-full-vocab": {"family": "gpt", "vocab_size": 128, "d_ff": 48, "norm_eps": 1e-3},
    "gpt-exact-gelu": {"family": "gpt", "activation": "gelu", "vocab_size": 257},
    "gpt-relu": {"family": "gpt", "activation": "relu", "norm_eps": 1e-6},
    "neox-quarter": {"family": "neox", "rotary_pct": 0.25},
    "neox-half-tied": {"family": "neox", "rotary_pct": 0.5, "tie_embeddings": True, "n_head": 2},
    "neox-whole-sequential": {"family": "neox", "rotary_pct": 1.0, "parallel_residual": False, "rope_theta": 500.0},
    "neox-tanh": {"family": "neox", "activation": "gelu_tanh", "vocab_size": 129, "d_ff": 56},
    "llama": {"family": "llama"},
    "llama-one-key-head": {"family": "llama", "n_kv_head": 1, "d_ff": 40, "vocab_size": 128},
    "llama-four-key-heads": {"family": "llama", "n_head": 8, "n_kv_head": 4, "tie_embeddings": True, "d_ff": 72},
    "llama-wide-heads": {"family": "llama", "head_dim": 24, "n_kv_head": 2, "rope_theta": 5e5, "norm_eps": 1e-6},
    "llama-biases": {"family": "llama", "bias": True, "n_kv_head": 2},
    "qwen3": {"family": "qwen3"},
    "qwen3-one-key-head": {"family": "qwen3", "n_kv_head": 1, "head_dim": 16, "tie_embeddings": True},
    "qwen3-four-key-heads": {"family": "qwen3", "n_head": 8, "n_kv_head": 4, "d_ff": 36, "vocab_size": 211},
    "qwen3-odd-width": {"family": "qwen3", "d_model": 36, "n_head": 8, "head_dim": 10, "n_kv_head": 2},
    "opt": {"family": "opt"},
    "opt-untied": {"family": "opt", "tie_embeddings": False, "n_head": 8, "vocab_size": 128},
    "opt-gelu": {"family": "opt", "activation": "gelu", "d_ff": 44, "n_layer": 1},
}


def shaken(config: ModelConfig) -> GPT:
    """A model none of whose weights, biases and norms is what it is initialised to."""
    torch.manual_seed(0)
    model = GPT(config, "sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "ln_" in name or "norm" in name else 0.1))
        model.tok_emb.weight[config.vocab_size :] = 0
        model.head_weight[config.vocab_size :] = 0
    return model


def write_hf(folder, model, dtype="fp32"):
    """The Hugging Face folder of a model, by nothing but hf_config and hf_weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(model.config, 7, dtype)))
    weights = dict(model.named_parameters())
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for entry in entries(model.config)
        for name, tensor in zip(entry.theirs, entry.out(weights[entry.ours]), strict=True)
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return tensors


def in_memory(name):
    """transformers 5 calls GPT-NeoX's head otherwise than its files do."""
    return name.replace("embed_out.", "lm_head.")


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(our model, theirs with the same weights), both in fp32 and without dropout."""
    config = ModelConfig(**{**SMALL, **CASES[request.param]}).resolve()
    ours = shaken(config)
    write_hf(tmp_path, ours)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(theirs).__name__ == CLASSES[model_type_of(config)].architecture
    return ours, theirs


def batch(config, length):
    tokens = torch.randint(config.vocab_size, (3, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def test_parity_of_logits(pair):
    ours, theirs = pair[0].eval(), pair[1].eval()
    for length in (ours.config.seq_len, 5, 1):
        tokens, _ = batch(ours.config, length)
        with torch.no_grad():
            expected, found = theirs(tokens).logits, ours(tokens)
        assert found.shape == expected.shape == (*tokens.shape, ours.config.vocab_size)
        assert expected.abs().max() > 0.5  # logits that say something
        assert (found - expected).abs().max() <= EXACT


def test_parity_of_loss_and_gradients(pair):
    ours, theirs = pair[0].train(), pair[1].train()  # in training mode: without dropout it must make no difference
    tokens, targets = batch(ours.config, ours.config.seq_len)
    loss = ours(tokens, targets)
    logits = theirs(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    assert abs(loss.item() - expected.item()) <= EXACT
    loss.backward()
    expected.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    our_gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert len(our_gradients) == len(entries(ours.config))
    for entry in entries(ours.config):
        gradient = entry.back([their_gradients.pop(in_memory(name)) for name in entry.theirs])
        found = our_gradients[entry.ours]
        assert found.shape == gradient.shape, entry.ours
        relative = (found - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert relative <= EXACT, f"{entry.ours}: {relative:.2e}"
    assert not their_gradients  # every weight of theirs was compared


def test_parity_of_a_fresh_model_of_theirs(pair, tmp_path):
    """What transformers initialises and saves itself comes in by the importer."""
    torch.manual_seed(3)
    theirs = type(pair[1])(pair[1].config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "saved")
    config = ModelConfig(**from_hf(tmp_path / "saved")).resolve()
    ours = GPT(config).eval()
    loaded = dict(load_hf(tmp_path / "saved", config))
    ours.load_state_dict(loaded)
    tokens, _ = batch(config, config.seq_len)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= EXACT


def test_what_goes_out_comes_back_bit_for_bit(pair, tmp_path):
    ours = pair[0]
    config = ModelConfig(**{**from_hf(tmp_path), "dropout": 0.0}).resolve()
    fields = ("n_layer", "n_head", "n_kv_head", "d_model", "head_dim", "d_ff", "vocab_size", "seq_len", "position")
    fields += ("rotary_pct", "rope_theta", "norm", "norm_eps", "activation", "bias", "parallel_residual", "qk_norm")
    for field in (*fields, "tie_embeddings"):
        assert getattr(config, field) == getattr(ours.config, field), field
    back = dict(load_hf(tmp_path, config))
    assert list(back) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        assert torch.equal(back[name], parameter), name
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / WEIGHTS_FILE).values())
