"""From ModelConfig to the config.json of Hugging Face transformers; `hf_source` reads it back. No torch here.

Which class a model is exported to is told by its options and not by the family's name: a gpt with RoPE is a GPT-NeoX,
a llama with QK-norm is a Qwen3. What no class can express exactly is refused, by the option that stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.errors import ConfigError
from pretrain.model_config import ModelConfig

CONFIG_FILE = "config.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # ours -> as transformers writes it
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
DENSE = tuple(ACTIVATIONS)


@dataclass(frozen=True)
class HFClass:
    """A class of transformers.

    Args:
        architecture: its name.
        family: of ours that it is read as.
        options: field of ModelConfig -> the values that it can express; any value of a field that is not here.
        grouped: whether several heads may share a key head.
        free_head_dim: whether head_dim may differ from d_model / n_head.
    """

    architecture: str
    family: str
    options: dict[str, tuple[Any, ...]]
    grouped: bool = False
    free_head_dim: bool = False


_DENSE_LEARNED = {
    "position": ("learned",),
    "norm": ("layernorm",),
    "activation": DENSE,
    "bias": (True,),
    "parallel_residual": (False,),
    "qk_norm": (False,),
}
_GATED_ROPE = {
    "position": ("rope",),
    "rotary_pct": (1.0,),
    "norm": ("rmsnorm",),
    "activation": ("swiglu",),
    "parallel_residual": (False,),
}
_NOWHERE = {"logit_softcap": (0.0,)}  # what no class of these has
CLASSES: dict[str, HFClass] = {  # by model_type
    "gpt2": HFClass("GPT2LMHeadModel", "gpt", _DENSE_LEARNED),
    "opt": HFClass("OPTForCausalLM", "opt", {**_DENSE_LEARNED, "norm_eps": (1e-5,)}),
    "gpt_neox": HFClass(
        "GPTNeoXForCausalLM",
        "neox",
        {"position": ("rope",), "norm": ("layernorm",), "activation": DENSE, "bias": (True,), "qk_norm": (False,)},
    ),
    "llama": HFClass("LlamaForCausalLM", "llama", {**_GATED_ROPE, "qk_norm": (False,)}, True, True),
    "qwen3": HFClass("Qwen3ForCausalLM", "qwen3", {**_GATED_ROPE, "bias": (False,), "qk_norm": (True,)}, True, True),
}


def model_type_of(model: ModelConfig) -> str:
    """The model_type of the class that a resolved model is, exactly; of several the one of its family.

    Raises:
        ConfigError: transformers has none; names each option that keeps it from being the nearest one.
    """
    found = {model_type: _obstacles(model, kind) for model_type, kind in CLASSES.items()}
    own = next(model_type for model_type, kind in CLASSES.items() if kind.family == model.family)
    nearest = min(found, key=lambda model_type: (len(found[model_type]), model_type != own))
    if found[nearest]:
        architecture = CLASSES[nearest].architecture
        raise ConfigError(
            f"transformers has no class for this model; {architecture} is nearest, but {'; '.join(found[nearest])}",
            "Train with options that a class of transformers has, or keep the model in its own format.",
        )
    return nearest


def _obstacles(model: ModelConfig, kind: HFClass) -> list[str]:
    """Each option of the model that the class can't express."""
    found = []
    for field, able in {**kind.options, **_NOWHERE}.items():
        value = getattr(model, field)
        if value not in able:
            found.append(f"model.{field} is {value}, and it knows only {' and '.join(map(str, able))}")
    if not kind.grouped and model.n_kv_head != model.n_head:
        found.append(f"model.n_kv_head is {model.n_kv_head}, and it has as many key heads as heads ({model.n_head})")
    if not kind.free_head_dim and model.head_dim * model.n_head != model.d_model:
        found.append(f"model.head_dim is {model.head_dim}, and it has d_model / n_head only")
    if kind.family == "llama" and model.d_model % model.n_head:
        found.append(f"model.d_model {model.d_model} is not divisible by model.n_head {model.n_head}")
    return found


def to_hf(model: ModelConfig, eot_id: int | None, dtype: str) -> dict[str, Any]:
    """The config.json of a resolved model.

    Args:
        eot_id: token that ends a document: beginning and end of a text; None: unknown.
        dtype: of the weights: fp32, bf16 or fp16.

    Raises:
        ConfigError: transformers has no class for it.
    """
    model_type = model_type_of(model)
    return {
        "architectures": [CLASSES[model_type].architecture],
        "model_type": model_type,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],  # transformers 4
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "pad_token_id": None,  # said, because OPT's own default would take token 1 for padding
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": model.vocab_size,
        "initializer_range": 0.02,
        "use_cache": True,
        **_WRITERS[model_type](model),
    }


def _write_gpt2(m: ModelConfig) -> dict[str, Any]:
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), m.dropout)
    return {
        "n_positions": m.seq_len,
        "n_embd": m.d_model,
        "n_layer": m.n_layer,
        "n_head": m.n_head,
        "n_inner": m.d_ff,
        "activation_function": ACTIVATIONS[m.activation],
        "layer_norm_epsilon": m.norm_eps,
        **dropout,
    }


def _write_opt(m: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sizes(m),
        "ffn_dim": m.d_ff,
        "word_embed_proj_dim": m.d_model,
        "do_layer_norm_before": True,
        "activation_function": ACTIVATIONS[m.activation],
        "dropout": m.dropout,
        "attention_dropout": m.dropout,
    }


def _write_neox(m: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sizes(m),
        "intermediate_size": m.d_ff,
        "hidden_act": ACTIVATIONS[m.activation],
        "layer_norm_eps": m.norm_eps,
        "use_parallel_residual": m.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": m.dropout,
        "attention_dropout": m.dropout,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": m.rope_theta,
            "partial_rotary_factor": m.rotary_pct,
        },
        "rotary_emb_base": m.rope_theta,  # transformers 4
        "rotary_pct": m.rotary_pct,
    }


def _write_llama(m: ModelConfig) -> dict[str, Any]:
    return {
        **_write_sizes(m),
        "num_key_value_heads": m.n_kv_head,
        "head_dim": m.head_dim,
        "intermediate_size": m.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": m.norm_eps,
        "attention_bias": m.bias,
        "mlp_bias": m.bias,
        "attention_dropout": m.dropout,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "rope_theta": m.rope_theta,  # transformers 4
    }


def _write_qwen3(m: ModelConfig) -> dict[str, Any]:
    fields = _write_llama(m)
    del fields["mlp_bias"]  # Qwen3's feed-forward never has one
    return {**fields, "use_sliding_window": False}


def _write_sizes(m: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layer,
        "num_attention_heads": m.n_head,
        "max_position_embeddings": m.seq_len,
    }


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _write_gpt2,
    "opt": _write_opt,
    "gpt_neox": _write_neox,
    "llama": _write_llama,
    "qwen3": _write_qwen3,
}
