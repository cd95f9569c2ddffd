"""Raw text as a source of training: prepared into shards below data.cache_dir before the first step.

    prepare_source(data, vocab_size=50257, say=logger.info)     # on one rank of each node
    shards = open_shards(open_store(prepared(data).source, …), prepared(data), …)

It is `prepare` of `preparation`, with its guarantees: the same text and tokenizer give the same bytes on every machine,
a process that was killed goes on where it was, and every document is written or counted. So the order of training and
the position of a resume are those of the shards, and exact. The whole text is prepared first: the order of an epoch is
a permutation of all its shards, and how many tokens each has is known only then.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.cache import digest
from pretrain.config import DataConfig
from pretrain.encoders import open_encoder
from pretrain.errors import ConfigError
from pretrain.manifest import DataManifest
from pretrain.preparation import FORMAT, Preparation, Watcher, prepare
from pretrain.raw_files import list_inputs
from pretrain.recipes import METADATA_NAME, finished
from pretrain.shard_writer import SPLITS
from pretrain.storage import LocalStore
from pretrain.work_folder import InUse

LINE_EVERY_S, POLL_S = 30.0, 1.0


def prepared(data: DataConfig) -> DataConfig:
    """The data with the shards that its raw text becomes; as it is where it names shards."""
    if not data.tokenizer:
        return data
    return dataclasses.replace(data, source=str(_folder(data) / SPLITS[0]), pattern="*.npz", tokenizer="")


def prepare_source(data: DataConfig, *, vocab_size: int, may_be_larger: bool, say: Callable[[str], None]) -> None:
    """Make the shards of `prepared(data)`, or what is left to do of them. Returns at once where nothing is.

    Args:
        vocab_size: the model's: a tokenizer with another is refused before the work.
        may_be_larger: whether it may exceed the tokenizer's.

    Raises:
        ConfigError: a tokenizer that can't be used, or text that changed since its shards were begun.
        ShardError: another tokenizer than the model's, no text, or, where data.on_bad_shard is stop, a document that
            can't be used.
        StorageError: the text or data.cache_dir can't be used.
    """
    folder = _folder(data)
    options = Preparation(
        input=(data.source,),
        output_dir=str(folder),
        text_key=data.text_key,
        tokenizer=data.tokenizer,
        on_bad=data.on_bad_shard,
        num_workers=data.tokenizer_num_workers,
    )
    _check_vocabulary(options, vocab_size, may_be_larger)
    waits = False
    while not _is_current(data, folder):
        try:
            _prepare(data, options, folder, say)
            return
        except InUse as error:  # a node with the same disk, or another run of this machine
            if not waits:
                say(f"data: {error.what}: waiting until it is done")
            waits = True
            time.sleep(POLL_S)
    say(f"data: {data.source} was prepared before, in {folder}")


def _prepare(data: DataConfig, options: Preparation, folder: Path, say: Callable[[str], None]) -> None:
    say(f"data: preparing {data.source} with {data.tokenizer} in {folder}, before the first step")
    try:
        result = prepare(options, lambda text: say(f"data: {text}"), _Lines(say))["result"]
    except ConfigError as error:
        mend = f"To prepare what is there now, delete {folder}; runs that were trained on it can't go on then"
        raise ConfigError(error.problems, mend if str(folder) in error.what else error.mend) from error
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in result["skipped"].items()) or "none skipped"
    say(f"data: {result['documents']:,} documents, {skipped}")


def _folder(data: DataConfig) -> Path:
    key = digest([FORMAT, data.source, data.tokenizer, data.text_key, data.on_bad_shard])[:16]
    return Path(data.cache_dir).absolute() / f"prepared-{key}"


def _check_vocabulary(options: Preparation, vocab_size: int, may_be_larger: bool) -> None:
    """Compare the tokenizer with the model. Raises ConfigError or ShardError, as `prepare_source`."""
    choice = options.choice
    choice.versions()
    encoder = open_encoder(choice.make((), options.reading, 0.0, stop=True), choice.library)
    manifest = DataManifest(options.tokenizer, encoder.vocab_size, encoder.eot_id, ())
    manifest.check_vocab_size(vocab_size, "data.tokenizer", may_be_larger)


def _is_current(data: DataConfig, folder: Path) -> bool:
    """Whether the shards are complete, and no file of the text was written or listed anew since."""
    metadata = finished(LocalStore(folder))
    if metadata is None:
        return False
    done_ns = (folder / METADATA_NAME).stat().st_mtime_ns
    files, _ = list_inputs("", (data.source,), outside=folder)
    told: list[dict[str, Any]] = metadata["inputs"]
    if [(file.name, file.size) for file in files] != [(entry["name"], entry["bytes"]) for entry in told]:
        return False
    pairs = zip(files, told, strict=True)
    return all(
        file.generation < done_ns if file.is_local else file.identity == entry["crc32c"] for file, entry in pairs
    )


class _Lines(Watcher):
    """Lines in the log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._title, self._total, self._line_s = "", 0, time.monotonic()

    def begin(self, title: str, n_bytes: int) -> None:
        """See Watcher."""
        self._title, self._total = title, n_bytes

    def update(self, n_bytes: int, text_bytes: int, n_tokens: int) -> None:
        """See Watcher."""
        if time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            tokens = f", {n_tokens:,} tokens" if n_tokens else ""
            self._say(f"data: {self._title}: {n_bytes / 1e6:,.1f} of {self._total / 1e6:,.1f} MB{tokens}")
