"""From the config.json of a Hugging Face folder to ModelConfig; all that is wrong is told at once. No torch here.

An option that is left out or null has the default of its class in transformers; sizes must be said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.hf_config import CLASSES, CONFIG_FILE
from pretrain.model_config import ModelConfig, model_problems

PARTIAL = "partial_rotary_factor"
ANOTHER = "Name the folder of a model of one of these classes."
ACTIVATIONS = {
    # several names of one function
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}


class HFSource:
    """One config.json, read option by option.

    Args:
        path: of the file.

    Attributes:
        problems: what can't be right or can't be expressed here; each method appends to it and goes on.

    Raises:
        ConfigError: it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} can't be read: {error}", "Name the folder of a Hugging Face model.") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} must hold an object, found {type(tree).__name__}", "Fetch it again.")
        self.tree: dict[str, Any] = tree

    def get(self, name: str, default: Any = None) -> Any:
        """The option as it stands there."""
        value = self.tree.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.get(name, default)
        if type(value) is int and value > 0:
            return value
        self.problems.append(f"{name} is {value!r}, expected a positive whole number")
        return 1

    def number(self, name: str, default: float) -> float:
        """A number above 0."""
        return self._positive(name, self.get(name, default), default)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name, default)
        if isinstance(value, bool):
            return value
        self.problems.append(f"{name} is {value!r}, expected true or false")
        return default

    def only(self, name: str, able: Any) -> None:
        """Complain where the option has another value than the one that model.py computes."""
        if (value := self.get(name, able)) != able:
            self.problems.append(f"{name} is {value!r}; only {json.dumps(able)} can be expressed")

    def activation(self, name: str, default: str, names: dict[str, str]) -> str:
        """Our name of the non-linearity."""
        value = self.get(name, default)
        if value not in names:
            self.problems.append(f"{name} is {value!r}; known are {', '.join(names)}")
            return names[default]
        return names[value]

    def rope(self, theta_name: str = "rope_theta", share_name: str = PARTIAL, share: float = 1.0) -> dict[str, Any]:
        """Our fields of RoPE: what transformers 5 writes in rope_parameters and 4 beside the rest.

        Args:
            theta_name: of the base in transformers 4.
            share_name: of the rotated share of a head there.
            share: the class's default for it.
        """
        given: dict[str, Any] = {}
        for name in ("rope_parameters", "rope_scaling"):
            tree = self.get(name, {})
            if not isinstance(tree, dict) or any(isinstance(value, dict) for value in tree.values()):
                self.problems.append(f"{name} is {tree!r}; only one RoPE for all layers can be expressed")
                continue
            kind = tree.get("rope_type", tree.get("type", "default"))
            if kind != "default":
                self.problems.append(f"{name} has rope_type {kind!r}; only 'default' can be expressed")
            given |= tree
        theta = given.get("rope_theta", self.get(theta_name, 10_000.0))
        share = given.get(PARTIAL, self.get(share_name, share))
        return {
            "position": "rope",
            "rope_theta": self._positive(theta_name, theta, 10_000.0),
            "rotary_pct": self._positive(share_name, share, 1.0),
        }

    def _positive(self, name: str, value: Any, default: float) -> float:
        if type(value) in (int, float) and 0 < value < math.inf:
            return float(value)
        self.problems.append(f"{name} is {value!r}, expected a positive number")
        return default


def from_hf(folder: Path) -> dict[str, Any]:
    """The fields of ModelConfig that a folder's config.json means; dropout and kernels are left to the user.

    Raises:
        ConfigError: there is no config.json, its architecture is none of CLASSES, or it asks for something that
            model.py can't express; each such option is named.
    """
    source = HFSource(folder / CONFIG_FILE)
    model_type = _known_type(source)
    source.only("quantization_config", None)
    fields = {"family": CLASSES[model_type].family, "size": "custom", **_READERS[model_type](source)}
    if not source.problems:
        source.problems += model_problems(ModelConfig(**fields).resolve())
    if source.problems:
        raise ConfigError(
            [f"{source.path}: {problem}" for problem in source.problems],
            "This model can't be expressed here without changing what it computes.",
        )
    return fields


def _known_type(source: HFSource) -> str:
    """The model_type, or what the architecture says where that is given."""
    by_architecture = {kind.architecture: model_type for model_type, kind in CLASSES.items()}
    named = source.get("architectures", [])
    known = ", ".join(by_architecture)
    if named and isinstance(named, list):
        if named[0] not in by_architecture:
            raise ConfigError(f"{source.path}: the architecture {named[0]} is not one of ours: {known}", ANOTHER)
        return by_architecture[named[0]]
    model_type = source.get("model_type")
    if model_type not in CLASSES:
        raise ConfigError(
            f"{source.path}: the model_type {model_type!r} is none of {', '.join(CLASSES)} ({known})", ANOTHER
        )
    return str(model_type)


def _read_gpt2(source: HFSource) -> dict[str, Any]:
    source.only("scale_attn_weights", True)
    source.only("scale_attn_by_inverse_layer_idx", False)
    source.only("add_cross_attention", False)
    d_model, n_head = source.size("n_embd"), source.size("n_head")
    return {
        **_plain_heads(n_head, d_model),
        "n_layer": source.size("n_layer"),
        "d_ff": source.size("n_inner", 4 * d_model),
        "vocab_size": source.size("vocab_size"),
        "seq_len": source.size("n_positions"),
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": source.number("layer_norm_epsilon", 1e-5),
        "activation": source.activation("activation_function", "gelu_new", ACTIVATIONS),
        "bias": True,
        "parallel_residual": False,
        "qk_norm": False,
        "tie_embeddings": source.flag("tie_word_embeddings", True),
    }


def _read_opt(source: HFSource) -> dict[str, Any]:
    for name, able in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("enable_bias", True),
        ("layer_norm_elementwise_affine", True),
    ):
        source.only(name, able)
    d_model, n_head = source.size("hidden_size"), source.size("num_attention_heads")
    source.only("word_embed_proj_dim", d_model)
    return {
        **_plain_heads(n_head, d_model),
        "n_layer": source.size("num_hidden_layers"),
        "d_ff": source.size("ffn_dim"),
        "vocab_size": source.size("vocab_size"),
        "seq_len": source.size("max_position_embeddings"),
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": source.activation("activation_function", "relu", ACTIVATIONS),
        "bias": True,
        "parallel_residual": False,
        "qk_norm": False,
        "tie_embeddings": source.flag("tie_word_embeddings", True),
    }


def _read_neox(source: HFSource) -> dict[str, Any]:
    source.only("attention_bias", True)
    d_model, n_head = source.size("hidden_size"), source.size("num_attention_heads")
    return {
        **_plain_heads(n_head, d_model),
        "n_layer": source.size("num_hidden_layers"),
        "d_ff": source.size("intermediate_size"),
        "vocab_size": source.size("vocab_size"),
        "seq_len": source.size("max_position_embeddings"),
        **source.rope("rotary_emb_base", "rotary_pct", 0.25),
        "norm": "layernorm",
        "norm_eps": source.number("layer_norm_eps", 1e-5),
        "activation": source.activation("hidden_act", "gelu", ACTIVATIONS),
        "bias": True,
        "parallel_residual": source.flag("use_parallel_residual", True),
        "qk_norm": False,
        "tie_embeddings": source.flag("tie_word_embeddings", False),
    }


def _plain_heads(n_head: int, d_model: int) -> dict[str, Any]:
    """Heads that share nothing and fill the width."""
    return {"n_head": n_head, "n_kv_head": n_head, "d_model": d_model, "head_dim": d_model // n_head}


def _read_llama(source: HFSource) -> dict[str, Any]:
    bias = source.flag("attention_bias", False)
    if source.flag("mlp_bias", False) != bias:
        source.problems.append("attention_bias and mlp_bias differ; only both or none can be expressed")
    d_model, n_head = source.size("hidden_size"), source.size("num_attention_heads")
    head_dim = source.size("head_dim", max(1, d_model // n_head))
    return _read_gated(source, d_model, n_head, n_head, head_dim) | {"bias": bias, "qk_norm": False}


def _read_qwen3(source: HFSource) -> dict[str, Any]:
    source.only("attention_bias", False)
    source.only("use_sliding_window", False)
    layers = source.get("layer_types", [])
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        source.problems.append(f"layer_types is {layers!r}; only full_attention can be expressed")
    d_model, n_head = source.size("hidden_size"), source.size("num_attention_heads")
    return _read_gated(source, d_model, n_head, 32, source.size("head_dim", 128)) | {"bias": False, "qk_norm": True}


def _read_gated(source: HFSource, d_model: int, n_head: int, n_kv_head: int, head_dim: int) -> dict[str, Any]:
    """What Llama and Qwen3 share; n_kv_head is the class's default."""
    rope = source.rope()
    if rope["rotary_pct"] != 1:
        source.problems.append(f"partial_rotary_factor is {rope['rotary_pct']}; the class rotates whole heads")
    source.activation("hidden_act", "silu", {"silu": "swiglu", "swish": "swiglu"})
    return {
        "n_layer": source.size("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": source.size("num_key_value_heads", n_kv_head),
        "d_model": d_model,
        "head_dim": head_dim,
        "d_ff": source.size("intermediate_size"),
        "vocab_size": source.size("vocab_size"),
        "seq_len": source.size("max_position_embeddings"),
        **rope,
        "norm": "rmsnorm",
        "norm_eps": source.number("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "parallel_residual": False,
        "tie_embeddings": source.flag("tie_word_embeddings", False),
    }


_READERS: dict[str, Callable[[HFSource], dict[str, Any]]] = {
    "gpt2": _read_gpt2,
    "opt": _read_opt,
    "gpt_neox": _read_neox,
    "llama": _read_llama,
    "qwen3": _read_qwen3,
}


# ---- continued pretraining ----

SHAPE = ("family", "n_layer", "n_head", "n_kv_head", "d_model", "head_dim", "d_ff")


def starting_settings(folder: Path, settings: dict[str, Any], firm: dict[str, Any]) -> dict[str, Any]:
    """What `--model.init_from FOLDER` sets, as "model.FIELD" -> value.

    With RoPE the context is free, so a seq_len of the settings stays. A run that is resumed with the whole shape in its
    settings, as a checkpoint's config.yaml has it, needs the folder no more: where it isn't there, nothing is set.

    Args:
        settings: all that are given, by "section.field".
        firm: those of them that must not be overruled.

    Raises:
        ConfigError: naming each firm setting that contradicts the folder; else as `from_hf`.
    """
    whole = all(firm.get(f"model.{name}") for name in SHAPE)
    if whole and settings.get("checkpoint.resume") and not (folder / CONFIG_FILE).exists():
        return {}
    fields = {f"model.{name}": value for name, value in from_hf(folder).items()}
    if fields["model.position"] == "rope" and settings.get("model.seq_len"):
        del fields["model.seq_len"]
    wrong = [
        f"{name} {firm[name]} contradicts model.init_from: {folder / CONFIG_FILE} says {value}"
        for name, value in fields.items()
        if not _agrees(firm.get(name), value)
    ]
    if wrong:
        raise ConfigError(wrong, "Leave it out, or leave out --model.init_from.")
    return fields


def _agrees(given: Any, value: Any) -> bool:
    """Whether a setting leaves the field open (0, empty or null) or says the same; YAML reads 1e-5 as text."""
    if isinstance(given, bool) or isinstance(value, bool):
        return given is None or given == value
    if isinstance(value, float) and isinstance(given, str):
        try:
            return float(given) == value
        except ValueError:
            return False
    return given in (None, "", 0) or given == value
