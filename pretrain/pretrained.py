"""A trained model to run or to export: found, verified and loaded, from a checkpoint or a Hugging Face folder.

    pretrained = load_pretrained("checkpoints/test", device=torch.device("cpu"), dtype=torch.float32)
    logits = pretrained.model(tokens)

A place is the folder of a checkpoint or of a run (its newest that verifies), its gs:// or file:// url, or a folder with
a Hugging Face config.json. The optimizer's moments are neither fetched nor verified here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from model import GPT, draw
from pretrain import log
from pretrain.checkpoint import CheckpointReader, damaged_files, read_manifest
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName, Manifest
from pretrain.config import StorageConfig
from pretrain.discovery import fetch, take_inventory
from pretrain.document_mask import DocumentMask
from pretrain.errors import CheckpointError, ConfigError
from pretrain.hf_config import CONFIG_FILE as HF_CONFIG_FILE
from pretrain.hf_source import from_hf
from pretrain.hf_weights import load_hf
from pretrain.kernels import Masking, choose_attention
from pretrain.manifest import TOKENIZER_NAME
from pretrain.model_config import ModelConfig, model_problems, parameter_shapes
from pretrain.run_lock import sole_use
from pretrain.storage import open_store
from pretrain.tokenizers import load_tokenizer
from pretrain.uploads import list_commits

logger = log.get(__name__)

CACHE_DIR = Path("cache/checkpoints")
STORAGE, CONFIG_FILE = StorageConfig(), "config.yaml"
RETIRED = {"compile"}  # settings of older versions that said nothing about the shape
SEE = "Name a checkpoint's folder or a run's, or a gs:// url: python scripts/checkpoint_viewer.py list"


@dataclass(frozen=True)
class Pretrained:
    """A model ready to run, in eval mode.

    Args:
        tokenizer: the one beside the weights; None where there is none.
        name: of the checkpoint, or of the folder.
        step: optimizer steps it was trained for; 0 where it is not our checkpoint.
    """

    model: GPT
    config: ModelConfig
    tokenizer: Tokenizer | None
    name: str
    step: int


def load_pretrained(
    where: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    storage: StorageConfig = STORAGE,
    attention: str = "auto",
    cache_dir: Path = CACHE_DIR,
    packed: bool = False,
) -> Pretrained:
    """The model of a place, its weights cast to `dtype` on `device`.

    Args:
        where: see the module.
        attention: kernel, as `choose_attention` takes it.
        cache_dir: where what is in a bucket is kept after it was fetched.
        packed: sequences will hold several documents, which the model keeps apart where it was trained so
            (`data.document_mask`); else all of a sequence is one.

    Raises:
        CheckpointError: there is no checkpoint, a damaged one, or one of another shape than its config says.
        ConfigError: its config is wrong or can't be expressed here, or the kernel can't run.
        StorageError: the bucket or the disk can't be used.
        ShardError: its tokenizer can't be read.
    """
    if is_hf_folder(where):
        return _load_hf(Path(where), device, dtype, attention)
    reader = open_checkpoint(where, storage, cache_dir)
    config = load_model_config(reader.folder)
    check_shapes(reader, config)
    weights = ((name, reader.weight(name)) for name, _ in parameter_shapes(config))
    document_end = load_document_end(reader.folder) if packed else None
    model = build(config, weights, device, dtype, attention, document_end)
    return Pretrained(model, config, tokenizer_of(reader.folder), str(reader.manifest.name), reader.manifest.name.step)


def _load_hf(folder: Path, device: torch.device, dtype: torch.dtype, attention: str) -> Pretrained:
    config = ModelConfig(**from_hf(folder)).resolve()
    model = build(config, load_hf(folder, config), device, dtype, attention)
    return Pretrained(model, config, tokenizer_of(folder), folder.resolve().name, 0)


def build(
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "auto",
    document_end: int | None = None,
) -> GPT:
    """A model in eval mode with these weights: every parameter once, by canonical name and full shape.

    Args:
        document_end: token that ends a document, where documents are kept apart.

    Raises:
        ConfigError: the kernel can't run.
    """
    try:
        masking = None if document_end is None else Masking()
        kernel, _ = choose_attention(attention, device, dtype, config.head_dim, masking)
    except ValueError as error:
        raise ConfigError(str(error), "Choose another attention kernel, or auto.") from error
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = GPT(config, kernel, None if document_end is None else DocumentMask(kernel, document_end))
    model.to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            parameters.pop(name).copy_(weight)
    assert not parameters, f"no weights for {', '.join(parameters)}"
    return model.requires_grad_(False).eval()


def first_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, fp32 on the CPU of its full shape) of every parameter of a fresh model, one at a time.

    They are those of the Hugging Face folder `init_from`, or drawn: the same as `GPT(config)` draws after
    `torch.manual_seed(seed)`, to the last bit.

    Raises:
        CheckpointError: the folder's files are damaged, or their tensors are not the model's.
        ConfigError: transformers has no class for the model.
    """
    if config.init_from:
        logger.info("weights from %s", config.init_from)
        yield from load_hf(Path(config.init_from), config)
        return
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(config):
        yield name, draw(torch.empty(shape), name, config, generator)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer.json, if it has one. Raises ShardError where that can't be read."""
    path = folder / TOKENIZER_NAME
    return load_tokenizer(path) if path.exists() else None


def is_hf_folder(where: str) -> bool:
    """Whether a place is a folder in the layout of Hugging Face."""
    return "://" not in where and (Path(where) / HF_CONFIG_FILE).is_file()


# ---- our own checkpoints ----


def load_model_config(folder: Path) -> ModelConfig:
    """The resolved model section of a checkpoint's config.yaml; what an older version did not write has its default.

    Raises:
        CheckpointError: it is missing or unreadable, says something this version doesn't know, or can't be right.
    """
    path, section = folder / CONFIG_FILE, _section(folder, "model")
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(map(str, section)) - set(fields) - RETIRED):
        raise CheckpointError(
            f"{path}: this version knows no model.{', model.'.join(unknown)}", "Use the version that wrote it."
        )
    values = {name: _as_now(name, value) for name, value in section.items() if name in fields}
    wrong = [f"model.{name} is {value!r}" for name, value in values.items() if not _fits(fields[name].default, value)]
    config = None if wrong else _resolved(values, wrong)
    if config is None or wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}", "Use the config.yaml that was saved with the weights.")
    return config


def load_document_end(folder: Path) -> int | None:
    """The token that ends a document, where a checkpoint's config.yaml says that it was trained to keep them apart.

    Raises:
        CheckpointError: it is missing or unreadable, or says that without saying which token it is.
    """
    section = _section(folder, "data")
    if section.get("document_mask") is not True:
        return None
    token_id = section.get("eot_token_id")
    if not isinstance(token_id, int) or token_id < 0:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: data.document_mask is true and data.eot_token_id is {token_id!r}",
            "Use the config.yaml that was saved with the weights.",
        )
    return token_id


def _section(folder: Path, name: str) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} can't be read: {' '.join(str(error).split())}", SEE) from error
    section = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has no section {name}", SEE)
    return section


def _as_now(name: str, value: Any) -> Any:
    """A value as this version spells it: once activation checkpointing was a switch."""
    if name == "activation_checkpointing" and isinstance(value, bool):
        return "full" if value else "none"
    return value


def _fits(default: Any, value: Any) -> bool:
    if default is None or isinstance(default, bool):
        return value is None or isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def _resolved(values: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    """The resolved config; its problems are appended."""
    try:
        config = ModelConfig(**values).resolve()
    except KeyError as error:
        problems.append(f"model.family {error} is unknown")
        return None
    problems += model_problems(config)
    return config


def check_shapes(reader: CheckpointReader, config: ModelConfig) -> None:
    """Raises CheckpointError naming the first tensors that are missing, left over or of another shape."""
    try:
        reader.check_shapes(dict(parameter_shapes(config)))
    except CheckpointError as error:
        raise CheckpointError(error.what, f"Its {CONFIG_FILE} is of another model than its weights.") from error


def open_checkpoint(
    where: str,
    storage: StorageConfig = STORAGE,
    cache_dir: Path = CACHE_DIR,
) -> CheckpointReader:
    """A checkpoint's verified weights and documents, without the optimizer's moments.

    Args:
        where: a checkpoint's folder or a run's, or the gs:// or file:// url of either.
        cache_dir: where what is in a bucket is kept after it was fetched.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: the url can't be right.
        StorageError: the bucket or the disk can't be used.
    """
    if "://" in where:
        return _open_in_bucket(where.rstrip("/"), storage, Path(cache_dir))
    folder = Path(where).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}", SEE)
    if CheckpointName.parse(folder.name) or (folder / MANIFEST_FILE).exists():
        return _verified(folder)
    return _open_newest(folder)


def without_moments(manifest: Manifest) -> Manifest:
    """The manifest without the optimizer's files: two thirds of the bytes, and nothing but training needs them.

    A commit that is packed into archives stays whole: they can't be fetched in part.
    """
    if manifest.archives:
        return manifest
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("optimizer-")}
    return dataclasses.replace(manifest, files=files)


def _verified(folder: Path) -> CheckpointReader:
    manifest = without_moments(read_manifest(folder))
    if problems := damaged_files(manifest, folder):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems[:3])}", "Take another checkpoint.")
    return CheckpointReader(folder, manifest)


def _open_newest(run: Path) -> CheckpointReader:
    """The newest checkpoint of a run's folder that verifies."""
    inventory = take_inventory(run, None, run.name)
    passed_over = [f"{name}: {problem}" for name, problem in inventory.damaged.items()]
    for manifest, _ in inventory.newest_first():
        try:
            return _verified(run / str(manifest.name))
        except CheckpointError as error:
            logger.warning("passed over: %s", error.what)
            passed_over.append(error.what)
    raise _none(str(run), passed_over)


def _open_in_bucket(url: str, storage: StorageConfig, cache_dir: Path) -> CheckpointReader:
    """The named checkpoint, or the newest of the named run that verifies, fetched where it is not in the cache."""
    root, _, run = url.rpartition("/")
    if name := CheckpointName.parse(run):
        root, _, run = root.rpartition("/")
    if "://" not in root or not run:
        raise ConfigError(f"{url} names no run", "Give gs://bucket/prefix/RUN or gs://bucket/prefix/RUN/checkpoint-….")
    store = open_store(root, storage)
    commits = {found: commit for found, commit in list_commits(store, run).items() if name in (None, found)}
    passed_over = [f"{found}: {commit.problem}" for found, commit in commits.items() if not commit.manifest]
    manifests = [commit.manifest for commit in commits.values() if commit.manifest]
    for manifest in sorted(manifests, key=lambda manifest: manifest.sequence, reverse=True):
        wanted, folder = without_moments(manifest), cache_dir / run / str(manifest.name)
        with sole_use(folder.parent):
            problems = [] if _holds(folder, wanted) else fetch(wanted, folder, store, run)
        if not problems:
            return CheckpointReader(folder, wanted)
        passed_over.append(f"{manifest.name}: {'; '.join(problems[:3])}")
        logger.warning("passed over %s", passed_over[-1])
    raise _none(url, passed_over)


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Whether this very commit is in the folder, whole."""
    if not (folder / MANIFEST_FILE).exists():
        return False
    try:
        return read_manifest(folder) == manifest and not damaged_files(manifest, folder)
    except CheckpointError:  # a torn copy in the cache is fetched again
        return False


def _none(where: str, passed_over: list[str]) -> CheckpointError:
    if passed_over:
        return CheckpointError(f"{where} has no checkpoint that verifies: {' | '.join(passed_over)}", SEE)
    return CheckpointError(f"{where} is no checkpoint and holds none", SEE)
