"""A checkpoint as a folder that Hugging Face transformers loads: written beside its place, tried out, then renamed.

Tensors are read and written one file at a time, so that about one file of `max_shard_bytes` is in memory. The trial
holds one fp32 model at a time: ours with the weights as they were rounded, then what was written.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pretrain.checkpoint import CheckpointReader
from pretrain.engine.base import PRECISION_DTYPES
from pretrain.errors import CheckpointError, ConfigError, StorageError
from pretrain.files import disk_problem, sync
from pretrain.generation import end_of_text, plainly
from pretrain.hf_config import CLASSES, CONFIG_FILE, model_type_of, to_hf
from pretrain.hf_source import from_hf
from pretrain.hf_weights import INDEX_FILE, WEIGHTS_FILE, Entry, entries, load_hf
from pretrain.manifest import TOKENIZER_NAME
from pretrain.model_config import ModelConfig
from pretrain.pretrained import build, check_shapes, load_model_config, tokenizer_of

TRIAL_ROWS, TRIAL_TOKENS = 2, 128
TOLERANCE = 1e-4  # of the largest logit, or absolute where that is below 1: fp32 in another order of sums
SAMPLE = "Hello, world! 1 + 1 = 2\n\tüñí → ∑\n"
ANOTHER_VERSION = "Nothing is left behind. Is the version of transformers the one of requirements-dev.txt?"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Exported:
    """What was written and how it was tried out.

    Args:
        architecture: class of transformers that it is.
        files: names in the folder.
        bytes: of the weights.
        loaded_by: "transformers VERSION", or "our own importer" where that is not installed.
        logits_difference: largest absolute difference between our logits and those of what was written.
        logits_scale: largest absolute logit of ours.
    """

    architecture: str
    files: tuple[str, ...]
    bytes: int
    loaded_by: str
    logits_difference: float
    logits_scale: float

    @property
    def allowed_difference(self) -> float:
        """The difference above which what was written counts as another model."""
        return TOLERANCE * max(1.0, self.logits_scale)


def export(
    reader: CheckpointReader,
    out: Path,
    *,
    dtype: str = "fp32",
    max_shard_bytes: int = 5 * 10**9,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the folder `out`, which appears complete and tried out, or not at all.

    Args:
        reader: of a verified checkpoint.
        out: must not exist, or be an empty folder.
        dtype: of the weights: fp32, bf16 or fp16.
        max_shard_bytes: most bytes of a file, unless a single parameter has more.
        say: told what happens, a line at a time.

    Raises:
        ConfigError: transformers has no class for the model, `out` is taken, or a weight is too big for the dtype.
        CheckpointError: the checkpoint is of another shape than its config says, or what was written computes
            something else.
        StorageError: the disk can't be written.
        ShardError: the checkpoint's tokenizer can't be read.
    """
    config = load_model_config(reader.folder)
    check_shapes(reader, config)
    architecture = CLASSES[model_type_of(config)].architecture
    tokenizer = tokenizer_of(reader.folder)
    say(f"{reader.folder.name}: {config.family}, {config.n_parameters:,} parameters, as {architecture} in {dtype}")
    with _new_folder(out) as folder:
        n_bytes = _write_weights(reader, config, folder, dtype, max_shard_bytes, say)
        _write_documents(config, tokenizer, reader.folder, folder, dtype)
        say("trying out what was written")
        loaded_by, difference, scale = _try_out(reader, config, folder, dtype, tokenizer)
        files = tuple(sorted(path.name for path in folder.iterdir()))
        exported = Exported(architecture, files, n_bytes, loaded_by, difference, scale)
        if not difference <= exported.allowed_difference:  # so that nan is caught, too
            raise CheckpointError(
                f"what was written computes other logits, off by {difference:.2e} of {scale:.3g} ({loaded_by})",
                ANOTHER_VERSION,
            )
    return exported


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name beside `out`, which takes its name when the block ends well."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not empty", "Name a folder that doesn't exist, or remove it.")
    temporary = out.absolute().with_name(f".{out.absolute().name}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        temporary.rename(out.absolute())
        sync(temporary.parent)
    except (OSError, safetensors.SafetensorError) as error:
        problem = disk_problem(error, out.absolute().parent) if isinstance(error, OSError) else None
        raise problem or StorageError(f"can't write {out}: {error}", "Free space, or name another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- weights ----


def _write_weights(
    reader: CheckpointReader,
    config: ModelConfig,
    folder: Path,
    dtype: str,
    max_shard_bytes: int,
    say: Callable[[str], None],
) -> int:
    """Write the safetensors, and their index where there are several; bytes of all tensors."""
    parts = _divide(entries(config), PRECISION_DTYPES[dtype].itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        path = folder / (WEIGHTS_FILE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors")
        say(f"writing {path.name}")
        tensors: dict[str, Tensor] = {}
        for entry in part:
            weight = _rounded(reader.weight(entry.ours), entry.ours, dtype)
            # clone: a tensor that shares memory with its neighbours can't be saved by itself
            made = (tensor.clone(memory_format=torch.contiguous_format) for tensor in entry.out(weight))
            tensors |= zip(entry.theirs, made, strict=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors lets only the owner read; the folder knows better
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(parts) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _divide(wanted: list[Entry], itemsize: int, max_bytes: int) -> list[list[Entry]]:
    """The parameters in files of at most `max_bytes`, in order; a bigger one has a file of its own."""
    parts: list[list[Entry]] = []
    room = 0
    for entry in wanted:
        size = itemsize * sum(torch.Size(shape).numel() for shape in entry.their_shapes().values())
        if not parts or size > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(entry)
        room -= size
    return parts


def _rounded(weight: Tensor, name: str, dtype: str) -> Tensor:
    """A weight in the dtype of the export.

    Raises:
        ConfigError: it has numbers that are not finite in that dtype.
    """
    rounded = weight.to(PRECISION_DTYPES[dtype])
    if not rounded.isfinite().all():
        largest = weight.abs().max().item()
        raise ConfigError(f"{name} has {largest:.3g}, which {dtype} can't hold", "Export with --dtype bf16 or fp32.")
    return rounded


# ---- documents ----


def _write_documents(
    config: ModelConfig, tokenizer: Tokenizer | None, checkpoint: Path, folder: Path, dtype: str
) -> None:
    """config.json, generation_config.json, and the tokenizer's files where there is one."""
    eot_id = end_of_text(tokenizer) if tokenizer else None
    _write_json(folder / CONFIG_FILE, to_hf(config, eot_id, dtype))
    ends = {} if eot_id is None else {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    _write_json(folder / "generation_config.json", ends)
    if tokenizer is None:
        return
    shutil.copyfile(checkpoint / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    end = None if eot_id is None else tokenizer.id_to_token(eot_id)
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.seq_len,
            "clean_up_tokenization_spaces": False,  # it would drop spaces that were in the text
            **special,
        },
    )
    if special:
        _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


# ---- trial ----


def _try_out(
    reader: CheckpointReader, config: ModelConfig, folder: Path, dtype: str, tokenizer: Tokenizer | None
) -> tuple[str, float, float]:
    """(what loaded the folder, largest difference of the logits, largest logit) on random tokens, computed in fp32.

    Our weights are rounded to the dtype first, so the comparison is as strict in bf16 as in fp32.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (TRIAL_ROWS, min(config.seq_len, TRIAL_TOKENS))
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    weights = ((entry.ours, _rounded(reader.weight(entry.ours), entry.ours, dtype)) for entry in entries(config))
    with torch.no_grad():
        expected = build(config, weights, CPU, torch.float32)(tokens)
        if importlib.util.find_spec("transformers"):
            loaded_by, found = _logits_of_transformers(folder, tokens)
            _compare_tokenizers(folder, tokenizer)
        else:
            read = ModelConfig(**from_hf(folder)).resolve()
            loaded_by = "our own importer, as transformers is not installed"
            found = build(read, load_hf(folder, read), CPU, torch.float32)(tokens)
    return loaded_by, (found - expected).abs().max().item(), expected.abs().max().item()


def _logits_of_transformers(folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
    import transformers

    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # what it returns depends on its arguments
    try:
        with _quiet(transformers):
            model, report = load(folder, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        version = transformers.__version__
        raise CheckpointError(
            f"transformers {version} can't load what was written: {error}", ANOTHER_VERSION
        ) from error
    if wrong := {what: sorted(map(str, names)) for what, names in report.items() if names}:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not load what was written: {wrong}", ANOTHER_VERSION
        )
    return f"transformers {transformers.__version__}", model.eval()(tokens).logits


def _compare_tokenizers(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Raises CheckpointError where AutoTokenizer reads other ids than the checkpoint's tokenizer."""
    if tokenizer is None:
        return
    import transformers

    with _quiet(transformers):
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = theirs.encode(SAMPLE, add_special_tokens=False)  # it remarks that a tiny context can't hold the sample
    expected = plainly(tokenizer).encode(SAMPLE, add_special_tokens=False).ids
    if found != expected:
        raise CheckpointError(
            f"AutoTokenizer reads {SAMPLE!r} as {found}, the checkpoint's tokenizer as {expected}", ANOTHER_VERSION
        )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and remarks of transformers; its errors are raised as ever."""
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
