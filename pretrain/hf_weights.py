"""Our parameters as the tensors of a transformers class, both ways and one at a time.

    GPT-2     Conv1D keeps matrices (in, out): transposed
    GPT-NeoX  queries, keys and values fused head by head: (n_head, 3, D) where ours are (3, n_head, D)
    OPT       two rows of positions in front that nothing reads; queries, keys and values apart, as in Llama and Qwen3

The tables of tokens have vocab_size rows there and padded_vocab_size here. Nothing is computed, so what goes out and
comes back in fp32 is the same to the last bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.hf_config import model_type_of
from pretrain.model_config import ModelConfig, parameter_shapes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OPT_OFFSET = 2  # rows in front of OPT's positions
READABLE = ("F32", "F16", "BF16", "F64")
SHOWN = 12  # problems in one line
# Buffers that old versions of transformers saved; they hold no weights.
BUFFERS = re.compile(r".*\.(attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias|rotary_emb\.inv_freq)")
Names = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and what it is over there.

    Args:
        ours: canonical name.
        shape: of ours.
        theirs: names in the files of the transformers class, in the order of the tensors below.
        out: our tensor to theirs.
        back: their tensors to ours.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: Names
    out: Callable[[Tensor], Sequence[Tensor]]
    back: Callable[[Sequence[Tensor]], Tensor]

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each of their tensors."""
        tensors = self.out(torch.empty(self.shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in zip(self.theirs, tensors, strict=True)}


@dataclass(frozen=True)
class Layout:
    """Names of a class's modules: outside the blocks by our name, and of one block.

    Args:
        base: prefix that files of the bare model, without its head, leave out.
        blocks: their name of `blocks`.
    """

    base: str
    blocks: str
    outside: dict[str, str]
    block: dict[str, Names]


def _split_block(norms: tuple[str, str], proj: str, mlp: dict[str, Names]) -> dict[str, Names]:
    """A block with queries, keys and values apart."""
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    return {"ln_1": (norms[0],), "attn.qkv": qkv, "attn.proj": (f"self_attn.{proj}",), "ln_2": (norms[1],), **mlp}


_GATED_BLOCK = {
    **_split_block(
        ("input_layernorm", "post_attention_layernorm"),
        "o_proj",
        {f"mlp.{part}": (f"mlp.{part}_proj",) for part in ("gate", "up", "down")},
    ),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
}
_GATED = Layout(
    "model.",
    "model.layers",
    {"tok_emb": "model.embed_tokens", "ln_f": "model.norm", "head": "lm_head"},
    _GATED_BLOCK,
)
LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        "transformer.",
        "transformer.h",
        {
            "tok_emb": "transformer.wte",
            "pos_emb": "transformer.wpe",
            "ln_f": "transformer.ln_f",
            "head": "lm_head",
        },
        {
            "ln_1": ("ln_1",),
            "attn.qkv": ("attn.c_attn",),
            "attn.proj": ("attn.c_proj",),
            "ln_2": ("ln_2",),
            "mlp.up": ("mlp.c_fc",),
            "mlp.down": ("mlp.c_proj",),
        },
    ),
    "opt": Layout(
        "model.",
        "model.decoder.layers",
        {
            "tok_emb": "model.decoder.embed_tokens",
            "pos_emb": "model.decoder.embed_positions",
            "ln_f": "model.decoder.final_layer_norm",
            "head": "lm_head",
        },
        _split_block(
            ("self_attn_layer_norm", "final_layer_norm"), "out_proj", {"mlp.up": ("fc1",), "mlp.down": ("fc2",)}
        ),
    ),
    "gpt_neox": Layout(
        "gpt_neox.",
        "gpt_neox.layers",
        {"tok_emb": "gpt_neox.embed_in", "ln_f": "gpt_neox.final_layer_norm", "head": "embed_out"},
        {
            "ln_1": ("input_layernorm",),
            "attn.qkv": ("attention.query_key_value",),
            "attn.proj": ("attention.dense",),
            "ln_2": ("post_attention_layernorm",),
            "mlp.up": ("mlp.dense_h_to_4h",),
            "mlp.down": ("mlp.dense_4h_to_h",),
        },
    ),
    "llama": _GATED,
    "qwen3": _GATED,
}


def entries(config: ModelConfig) -> list[Entry]:
    """Every parameter of a resolved model, in the order of the module.

    Raises:
        ConfigError: transformers has no class for it.
    """
    model_type = model_type_of(config)
    layout = LAYOUTS[model_type]
    found = []
    for ours, shape in parameter_shapes(config):
        module, _, kind = ours.rpartition(".")
        if module.startswith("blocks."):
            _, layer, part = module.split(".", 2)
            theirs = tuple(f"{layout.blocks}.{layer}.{name}.{kind}" for name in layout.block[part])
        else:
            part, theirs = module, (f"{layout.outside[module]}.{kind}",)
        found.append(Entry(ours, shape, theirs, *_moves(config, model_type, part, kind)))
    return found


Moves = tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[Sequence[Tensor]], Tensor]]


def _moves(config: ModelConfig, model_type: str, part: str, kind: str) -> Moves:
    """How a parameter goes out and comes back."""
    if part in ("tok_emb", "head"):
        padding = config.padded_vocab_size - config.vocab_size
        return (lambda t: [t[: config.vocab_size]]), (lambda ts: torch.cat([ts[0], _zeros(ts[0], padding)]))
    if part == "pos_emb" and model_type == "opt":
        return (lambda t: [torch.cat([_zeros(t, OPT_OFFSET), t])]), (lambda ts: ts[0][OPT_OFFSET:])
    if part == "attn.qkv" and model_type == "gpt_neox":
        sizes = (config.n_head, config.head_dim)
        return (
            lambda t: [t.unflatten(0, (3, *sizes)).transpose(0, 1).flatten(0, 2)],
            lambda ts: ts[0].unflatten(0, (sizes[0], 3, sizes[1])).transpose(0, 1).flatten(0, 2),
        )
    if part == "attn.qkv" and model_type != "gpt2":
        rows = [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
        return (lambda t: t.split(rows)), (lambda ts: torch.cat(tuple(ts)))
    if part in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down") and model_type == "gpt2" and kind == "weight":
        return (lambda t: [t.t()]), (lambda ts: ts[0].t())
    return (lambda t: [t]), (lambda ts: ts[0])


def _zeros(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros((rows, *like.shape[1:]))


# ---- in ----


def load_hf(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, fp32 tensor of our full shape) of every parameter, read from the folder's safetensors.

    Everything is checked before the first tensor is read; one tensor is held at a time.

    Raises:
        CheckpointError: there are no safetensors, a file is damaged, or tensors are missing, left over, of another
            shape or of another dtype; each is named.
        ConfigError: transformers has no class for the model.
    """
    wanted = entries(config)
    files = HFFiles(folder, LAYOUTS[model_type_of(config)].base)
    shapes = {name: shape for entry in wanted for name, shape in entry.their_shapes().items()}
    files.check(shapes, config)
    for entry in wanted:
        yield entry.ours, entry.back([files.tensor(name) for name in entry.theirs])


class HFFiles:
    """The tensors of a Hugging Face folder, by the names that its class gives them.

    Args:
        base: prefix of the class's names that files of the bare model leave out.

    Raises:
        CheckpointError: there are no safetensors, or one can't be read.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        self._where: dict[str, tuple[Path, str]] = {}  # name -> file, name in the file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in _files(folder):
            try:
                with safetensors.safe_open(path, framework="pt") as part:
                    for name in list(part.keys()):
                        tensor = part.get_slice(name)
                        self._add(name, path, tuple(tensor.get_shape()), tensor.get_dtype(), base)
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read: {error}", "Fetch it again.") from error

    def _add(self, stored: str, path: Path, shape: tuple[int, ...], dtype: str, base: str) -> None:
        name = stored
        if base == "gpt_neox." and stored == "lm_head.weight":  # as transformers 5 calls it in memory
            name = "embed_out.weight"
        elif not stored.startswith((base, "lm_head.", "embed_out.")):
            name = base + stored
        if not BUFFERS.fullmatch(name):
            self._where[name], self._shapes[name], self._dtypes[name] = (path, stored), shape, dtype

    def check(self, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
        """Compare with what the model needs.

        Raises:
            CheckpointError: naming each tensor that is missing, left over, of another shape or of another dtype.
        """
        left_over = sorted(set(self._shapes) - set(shapes))
        if config.tie_embeddings and (head := self._tied_head(left_over)):
            left_over.remove(head)
        problems = [f"{name} is missing" for name in shapes if name not in self._shapes]
        problems += [f"{name} is not in the model" for name in left_over]
        for name in shapes:
            if name in self._shapes and self._shapes[name] != shapes[name]:
                problems.append(f"{name} is {self._shapes[name]}, {shapes[name]} was expected")
            elif self._dtypes.get(name, "F32") not in READABLE:
                problems.append(f"{name} is {self._dtypes[name]}, one of {', '.join(READABLE)} was expected")
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise CheckpointError(
                f"{self.folder} does not hold the model of its config.json: {'; '.join(problems[:SHOWN])}{more}",
                "Fetch the folder again, config.json and safetensors of one revision.",
            )

    def _tied_head(self, left_over: list[str]) -> str:
        """A head that is stored although it is tied: the same tensor as the embedding, or none of the model's."""
        heads = [name for name in left_over if name in ("lm_head.weight", "embed_out.weight")]
        tables = [name for name in self._shapes if re.search(r"\.(wte|embed_tokens|embed_in)\.weight$", name)]
        if heads and tables and torch.equal(self.tensor(heads[0]), self.tensor(tables[0])):
            return heads[0]
        return ""

    def tensor(self, name: str) -> Tensor:
        """One tensor, fp32 on the CPU."""
        path, stored = self._where[name]
        with safetensors.safe_open(path, framework="pt") as part:
            tensor: Tensor = part.get_tensor(stored)
            return tensor.float()


def _files(folder: Path) -> list[Path]:
    """The folder's weight files: what the index names, or the only one."""
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / WEIGHTS_FILE).is_file():
            return [folder / WEIGHTS_FILE]
        pickled = any(folder.glob("*.bin"))
        mend = "Save it again in transformers: save_pretrained(…) writes safetensors." if pickled else "Name another."
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_FILE}" + (", only pickles, which are never read" if pickled else ""), mend
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of safetensors: {error}", "Fetch it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}, which is no safetensors file of the folder", "Fetch the folder again."
            )
    return [folder / name for name in names]
