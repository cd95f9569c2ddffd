"""Raw text as a source of training: prepared into shards below data.cache_dir, before the first step or while it runs.

    prepare_source(data, storage, vocab_size=50257, may_be_larger=False, say=logger.info)     # on one rank of each node
    shards = open_shards(open_store(prepared(data).source, …), prepared(data), …)

It is `prepare` of `preparation`, with its guarantees: the same text and tokenizer give the same bytes on every machine,
a process that was killed goes on where it was, and every document is written or counted. So the order of training and
the position of a resume are those of the shards, and exact. What is prepared is in a folder that only the settings
name, whoever does it; `raw_shards` reads there what is made so far.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from pretrain.config import DataConfig, StorageConfig
from pretrain.encoders import open_encoder
from pretrain.errors import ConfigError, ShardError
from pretrain.files import digest
from pretrain.manifest import DataManifest
from pretrain.preparation import FORMAT, Preparation, Watcher, prepare
from pretrain.raw_files import list_inputs
from pretrain.recipes import METADATA_NAME, RECIPE_NAME, TOKENIZER, finished, parsed
from pretrain.shard_writer import SPLITS
from pretrain.storage import LocalStore
from pretrain.tokenizer_choice import TokenizerChoice
from pretrain.work_folder import InUse

LINE_EVERY_S, POLL_S = 30.0, 1.0


def prepared(data: DataConfig) -> DataConfig:
    """The data with the shards that its raw text becomes; as it is where it names shards."""
    if not data.tokenizer:
        return data
    return dataclasses.replace(data, source=str(folder_of(data) / SPLITS[0]), pattern="*.npz", tokenizer="")


def folder_of(data: DataConfig) -> Path:
    """Where the text is prepared, by the settings alone."""
    key: list[Any] = [FORMAT, data.source, data.tokenizer, data.text_key, data.on_bad_shard]
    if data.raw_shard_tokens != DataConfig.raw_shard_tokens:  # what was prepared before there was a choice stays valid
        key.append(data.raw_shard_tokens)
    return Path(data.cache_dir).absolute() / f"prepared-{digest(key)[:16]}"


def prepare_source(
    data: DataConfig,
    storage: StorageConfig,
    *,
    vocab_size: int,
    may_be_larger: bool,
    say: Callable[[str], None],
    watcher: Watcher | None = None,
) -> None:
    """Make the shards of `prepared(data)`, or what is left to do of them. Returns at once where nothing is.

    Args:
        storage: how patiently the text is fetched.
        vocab_size: the model's: a tokenizer with another is refused before the work.
        may_be_larger: whether it may exceed the tokenizer's.
        watcher: is told how far it is; None: lines for `say`.

    Raises:
        ConfigError: a tokenizer that can't be used, or text that changed since its shards were begun.
        ShardError: another tokenizer than the model's, no text, or, where data.on_bad_shard is stop, a document that
            can't be used.
        StorageError: the text or data.cache_dir can't be used.
    """
    folder, watcher = folder_of(data), watcher or Lines(say)
    options = Preparation(
        input=(data.source,),
        output_dir=str(folder),
        text_key=data.text_key,
        tokenizer=data.tokenizer,
        on_bad=data.on_bad_shard,
        shard_tokens=data.raw_shard_tokens,
        num_workers=data.tokenizer_num_workers,
        storage=storage,
    )
    choice = options.choice
    manifest = _header(choice.make((), options.reading, 0.0, stop=True), choice)
    manifest.check_vocab_size(vocab_size, "data.tokenizer", may_be_larger)
    waits = False
    while not _is_current(data, storage, folder):
        try:
            _prepare(data, options, folder, say, watcher)
            return
        except InUse as error:  # a node with the same disk, or another run of this machine
            if is_claimed(folder):
                watcher.claimed()
            if not waits:
                say(f"data: {error.what}: waiting until it is done")
            waits = True
            time.sleep(POLL_S)
    say(f"data: {data.source} was prepared before, in {folder}")
    watcher.claimed()


def _prepare(
    data: DataConfig, options: Preparation, folder: Path, say: Callable[[str], None], watcher: Watcher
) -> None:
    when = "while training runs" if data.prepares_ahead else "before the first step"
    say(f"data: preparing {data.source} with {data.tokenizer} in {folder}, {when}")
    try:
        result = prepare(options, lambda text: say(f"data: {text}"), watcher)["result"]
    except ConfigError as error:
        mend = f"To prepare what is there now, delete {folder}; runs that were trained on it can't go on then"
        raise ConfigError(error.problems, mend if str(folder) in error.what else error.mend) from error
    watcher.claimed()
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in result["skipped"].items()) or "none skipped"
    say(f"data: {data.source} is prepared: {result['documents']:,} documents, {skipped}")


# ---- what is known before the work is done ----


def is_claimed(folder: Path) -> bool:
    """Whether the folder has its recipe and its tokenizer, so that all shards to come are decided."""
    return (folder / RECIPE_NAME).exists() and (folder / TOKENIZER).exists()


def claim_of(data: DataConfig) -> tuple[str, DataManifest]:
    """What decides all shards of the text, as a hash, and a manifest that names its tokenizer and no shards.

    Raises:
        ConfigError: the package of the tokenizer is missing.
        ShardError: nobody has begun to prepare it.
    """
    folder = folder_of(data)
    if not is_claimed(folder):
        raise not_prepared(data, "not prepared yet")
    recipe = parsed((folder / RECIPE_NAME).read_bytes(), str(folder / RECIPE_NAME))
    # Where the text lies may change: another machine may have it elsewhere.
    inputs = [(PurePath(each["name"]).name, each["bytes"], each["crc32c"]) for each in recipe["inputs"]]
    decisive = {**recipe, "inputs": inputs, "max_files": data.max_files}
    choice = TokenizerChoice(given=data.tokenizer)
    return digest(decisive), _header((folder / TOKENIZER).read_text(encoding="utf-8"), choice)


def check_prepared(data: DataConfig) -> None:
    """Raises ShardError where raw text is not prepared to its end; all else passes."""
    if data.tokenizer and finished(LocalStore(folder_of(data))) is None:
        raise not_prepared(data, "not prepared to its end")


def not_prepared(data: DataConfig, found: str) -> ShardError:
    """That raw text is not prepared as far as it is needed, and what prepares it."""
    return ShardError(
        f"{data.source} is raw text, and {found} in {folder_of(data)}",
        "Start train.py with these settings, which prepares it there; or make shards of it with "
        "python scripts/prepare_data.py, and give their folder without --data.tokenizer",
    )


def _header(tokenizer_json: str, choice: TokenizerChoice) -> DataManifest:
    """A manifest without shards. Raises ConfigError or ShardError, as `prepare_source`."""
    choice.versions()
    encoder = open_encoder(tokenizer_json, choice.library)
    return DataManifest(choice.title(tokenizer_json, encoder.vocab_size), encoder.vocab_size, encoder.eot_id, ())


def _is_current(data: DataConfig, storage: StorageConfig, folder: Path) -> bool:
    """Whether the shards are complete, and no file of the text was written or listed anew since."""
    metadata = finished(LocalStore(folder))
    if metadata is None:
        return False
    done_ns = (folder / METADATA_NAME).stat().st_mtime_ns
    files, _ = list_inputs("", (data.source,), outside=folder, storage=storage)
    told: list[dict[str, Any]] = metadata["inputs"]
    if [(file.name, file.size) for file in files] != [(entry["name"], entry["bytes"]) for entry in told]:
        return False
    pairs = zip(files, told, strict=True)
    return all(
        file.generation < done_ns if file.is_local else file.identity == entry["crc32c"] for file, entry in pairs
    )


class Lines(Watcher):
    """Lines in the log."""

    def __init__(self, say: Callable[[str], None], every_s: float = LINE_EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._title, self._total, self._line_s = "", 0, time.monotonic()

    def begin(self, title: str, n_bytes: int) -> None:
        """See Watcher."""
        self._title, self._total = title, n_bytes

    def update(self, n_bytes: int, text_bytes: int, n_tokens: int) -> None:
        """See Watcher."""
        if time.monotonic() - self._line_s >= self._every_s:
            self._line_s = time.monotonic()
            tokens = f", {n_tokens:,} tokens" if n_tokens else ""
            self._say(f"data: {self._title}: {n_bytes / 1e6:,.1f} of {self._total / 1e6:,.1f} MB{tokens}")
