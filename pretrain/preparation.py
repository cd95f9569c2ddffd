"""From raw text to shards: what is to be done is fixed in a recipe, what is done is on disk, and a restart goes on.

    options = Preparation(output_dir="data", input_dir="raw", vocab_size=8192)
    result = prepare(options, print)

Units of the input (`raw_files`) are read (`documents`) and encoded into parts (`parts`) by workers (`encoding_pool`);
one writer (`shard_writer`) cuts the parts into shards in the order of the units. The recipe names the input with its
checksums, the options and the versions that the bytes depend on: the same recipe gives the same bytes, whatever the
number of workers and of interruptions, and an output that was begun with another recipe is refused.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config import StorageConfig
from pretrain.documents import Reading, TxtDocuments
from pretrain.encoders import open_encoder
from pretrain.encoding_pool import LocalPool, Pool, RayPool, Take, Work
from pretrain.errors import ConfigError
from pretrain.failpoints import failpoint
from pretrain.files import crc32c_of_file, disk_explained, make_writable, new_file
from pretrain.manifest import TOKENIZER_NAME
from pretrain.parts import Part, find_part, remove_part, token_dtype
from pretrain.raw_files import RawFile, Unit, cut_units, list_inputs
from pretrain.recipes import TOKENIZER, Product, create, finished, publish
from pretrain.shard_writer import Cutting, ShardWriter
from pretrain.storage import LocalStore, ObjectStore, open_store
from pretrain.tokenizer_choice import TokenizerChoice
from pretrain.work_folder import (
    OPEN_SHARDS,
    SCRATCH,
    claim_both,
    remove_leftovers,
    sole_use,
    with_checksums,
    work_folder,
)

FORMAT = 1  # of the recipe: a change of what the same options write is another number
UNITS_AHEAD = 2  # for each worker: parts that wait on disk for their turn

Say = Callable[[str], None]


class Watcher:
    """Is told how far it is; overridden by who shows it."""

    def claimed(self) -> None:
        """The output has its recipe and its tokenizer; shards follow."""

    def begin(self, title: str, n_bytes: int) -> None:
        """`title` begins; it goes through `n_bytes` of input, 0: unknown."""

    def update(self, n_bytes: int, text_bytes: int, n_tokens: int) -> None:
        """So far: bytes of the input that are complete, and by this process bytes of text and tokens."""


@dataclass(frozen=True)
class Preparation:
    """What is to be prepared. Only the first group of fields decides which bytes are written."""

    input_dir: str = ""
    input: tuple[str, ...] = ()
    split: str = "train"
    text_key: str = "text"
    txt_documents: TxtDocuments = "file"
    max_document_mb: int = 64
    on_bad: str = "stop"
    dedup: bool = False
    val_fraction: float = 0.0
    tokenizer_type: str = "bpe"
    tokenizer: str = ""
    vocab_size: int = 32000
    sample_mb: int = 100
    shard_tokens: int = 10_000_000
    max_length: int = 0
    stride: int = 0
    unit_mb: float = 16.0

    output_dir: str = ""
    work_dir: str = ""
    num_workers: int = 1
    ray: str = ""
    storage: StorageConfig = field(default_factory=StorageConfig)

    @property
    def unit_bytes(self) -> int:
        return max(1, int(self.unit_mb * 2**20))

    @property
    def reading(self) -> Reading:
        return Reading(self.text_key, self.txt_documents, self.max_document_mb << 20)

    @property
    def cutting_fields(self) -> dict[str, Any]:
        names = ("shard_tokens", "val_fraction", "dedup", "max_length")
        return {**{name: getattr(self, name) for name in names}, "overlap": self.stride}

    @property
    def choice(self) -> TokenizerChoice:
        return TokenizerChoice(self.tokenizer_type, self.tokenizer, self.vocab_size, self.sample_mb << 20)

    def decisive(self) -> dict[str, Any]:
        """The options that decide which bytes are written."""
        tree = dataclasses.asdict(self)
        for name in ("input_dir", "input", "output_dir", "work_dir", "num_workers", "ray", "storage"):
            del tree[name]
        return tree

    def check(self) -> None:
        """Every option that can't be, in one go. Raises ConfigError."""
        at_least = {"max_document_mb": 1, "sample_mb": 1, "shard_tokens": 1, "max_length": 0, "stride": 0}
        at_least |= {"num_workers": 1, "vocab_size": 1}
        problems = [
            f"--{name} {getattr(self, name)} must be at least {least}"
            for name, least in at_least.items()
            if getattr(self, name) < least
        ]
        if not 0 <= self.val_fraction < 1:
            problems.append(f"--val_fraction {self.val_fraction} must be at least 0 and below 1")
        if self.unit_mb <= 0:
            problems.append(f"--unit_mb {self.unit_mb} must be above 0")
        if self.stride and self.stride >= max(1, self.max_length):
            problems.append(f"--stride {self.stride} must be below --max_length {self.max_length}: it is the overlap")
        if not self.input_dir and not self.input:
            problems.append("there is no input: give --input_dir or --input")
        problems += self.choice.problems()
        if problems:
            raise ConfigError(problems)


# ---- the whole ----


def prepare(options: Preparation, say: Say, watcher: Watcher | None = None) -> dict[str, Any]:
    """Make the shards, or what is left to do of them; the content of metadata.json.

    Raises:
        ConfigError: options that can't be, or an output that was begun with others.
        ShardError: no text, or with on_bad=stop a document or file that can't be used.
        StorageError: the input, the output or the working folder can't be used.
    """
    options.check()
    choice = options.choice
    watcher = watcher or Watcher()
    store = open_store(options.output_dir, options.storage)
    work = work_folder(options.work_dir, store)
    make_writable(work, "--work_dir")
    with disk_explained(work), sole_use(work):
        outside = store.root if isinstance(store, LocalStore) else None
        remove_leftovers(work, store)
        files, passed = list_inputs(
            options.input_dir, options.input, split=options.split, outside=outside, storage=options.storage
        )
        if passed:
            say(f"input: {len(files)} files; {len(passed)} others are passed over, such as {passed[0]}")
        watcher.begin("checksums", sum(file.size for file in files))
        files = with_checksums(files, work, lambda n_bytes: watcher.update(n_bytes, 0, 0))
        units = cut_units(files, options.unit_bytes, lines_of_txt=options.txt_documents == "line")
        recipe = _recipe(options, choice, files)
        claim_both(store, work, recipe)
        if metadata := finished(store):
            say(f"complete in {store.url}, nothing to do")
        else:
            product = _tokenizer(options, choice, units, work, say, watcher)
            create(store, TOKENIZER, product.tokenizer_json)
            watcher.claimed()
            writer = _encode_all(options, units, product, choice.library, work, store, say, watcher)
            metadata = publish(store, recipe, product, writer)
        shutil.rmtree(work)
    return metadata


def _encode_all(
    options: Preparation,
    units: Sequence[Unit],
    product: Product,
    library: str,
    work: Path,
    store: ObjectStore,
    say: Say,
    watcher: Watcher,
) -> ShardWriter:
    """Encode every unit that is left, and cut shards in the units' order."""
    parts = work / "parts"
    cutting = Cutting(product.vocab_size, product.eot_id, **options.cutting_fields)
    writer = ShardWriter(work / OPEN_SHARDS, store, cutting, token_dtype(product.vocab_size))
    _remove_parts(parts, writer.next_unit)
    n_done = sum(unit.n_bytes for unit in units[: writer.next_unit])
    if writer.next_unit:
        say(f"goes on: {writer.next_unit} of {len(units)} units are done")
    reading = dataclasses.replace(options.reading, scratch=str(work / SCRATCH))
    task = Work(reading, product.tokenizer_json, library, options.on_bad == "stop", str(parts))
    watcher.begin("encode", sum(unit.n_bytes for unit in units))
    taken: list[int] = []
    with _pool(options, task) as pool:

        def show() -> None:
            watcher.update(n_done, *pool.progress())

        for unit, part in _in_order(units[writer.next_unit :], pool, parts, UNITS_AHEAD * options.num_workers, show):
            past = writer.take(part, parts)
            taken.append(unit.index)
            n_done += unit.n_bytes
            show()
            if past:
                failpoint("prepare.after_journal")
                for index in taken:
                    remove_part(parts, index)
                taken.clear()
    writer.finish()
    return writer


def _pool(options: Preparation, task: Work) -> Pool:
    return RayPool(task, options.ray) if options.ray else LocalPool(task, options.num_workers)


def _in_order(
    units: Sequence[Unit], pool: Pool, parts: Path, ahead: int, meanwhile: Callable[[], None]
) -> Iterator[tuple[Unit, Part]]:
    """Each unit and its part, those of an earlier process included; so many units ahead are being worked on."""
    waiting: deque[tuple[Unit, Take]] = deque()
    for unit in units:
        waiting.append((unit, _take_found(unit, parts) or pool.submit(unit)))
        if len(waiting) > ahead:
            first, take = waiting.popleft()
            yield first, take(meanwhile)
    while waiting:
        first, take = waiting.popleft()
        yield first, take(meanwhile)


def _take_found(unit: Unit, parts: Path) -> Take | None:
    part = find_part(parts, unit.index)
    return (lambda meanwhile: part) if part is not None else None


def _remove_parts(parts: Path, before: int) -> None:
    """Remove parts that the journal is past: a process was killed before it did."""
    parts.mkdir(parents=True, exist_ok=True)
    for path in parts.iterdir():
        if not path.stem.isdecimal() or int(path.stem) < before:
            path.unlink()


# ---- what is fixed before the work ----


def _recipe(options: Preparation, choice: TokenizerChoice, files: Sequence[RawFile]) -> dict[str, Any]:
    """All that the bytes of the shards depend on."""
    try:
        given = crc32c_of_file(choice.path) if choice.path else choice.encoding
    except OSError as error:
        raise ConfigError(f"can't read --tokenizer {choice.path}: {error.strerror}", "Give a tokenizer.json") from error
    return {
        "format": FORMAT,
        "options": {**options.decisive(), "tokenizer": given},
        "versions": choice.versions(),
        "inputs": [{"name": file.name, "bytes": file.size, "crc32c": file.identity} for file in files],
    }


def _tokenizer(
    options: Preparation, choice: TokenizerChoice, units: Sequence[Unit], work: Path, say: Say, watcher: Watcher
) -> Product:
    """The tokenizer, made once: what was made is kept for a restart."""
    path = work / TOKENIZER_NAME
    if not path.exists():
        watcher.begin("tokenizer", 0)
        text = choice.make(units, options.reading, options.val_fraction, stop=options.on_bad == "stop")
        with new_file(path) as file:
            file.write(text.encode())
    text = path.read_text(encoding="utf-8")
    encoder = open_encoder(text, choice.library)
    title = choice.title(text, encoder.vocab_size)
    say(f"tokenizer: {title}, {encoder.vocab_size} ids")
    return Product(title, text, encoder.vocab_size, encoder.eot_id)
