"""Make a small real corpus from this machine: the Python standard library's sources and its help topics.

    python scripts/make_demo_data.py --output_dir demo [--upload gs://bucket/prefix]

Writes OUTPUT_DIR/shards/*.npz and OUTPUT_DIR/val/*.npz, each with a manifest.json beside them, and beside the first
tokenizer.json, a byte-level BPE trained on the training documents. The same text gives the same bytes; what is there
already is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np
from rich.console import Console

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, ShardError, StorageError, TrainerError
from pretrain.files import crc32c_of_file, new_file
from pretrain.manifest import MANIFEST_NAME, TOKENIZER_NAME, DataManifest, ShardEntry
from pretrain.npz import read_npz
from pretrain.storage import ObjectExists, ObjectStore, open_store
from pretrain.tokenizers import encode, end_of_text_id, save_tokenizer, train_bpe
from pretrain.transfers import TransferProgress

# 25 shards that hold 3,200 windows of 256 tokens: 400 steps of the test config's 8 windows, and not one left over.
DEFAULT_SHARDS = 25
DEFAULT_TOKENS = DEFAULT_SHARDS * 32_769
# Not part of the language's own text, or tables of numbers (encodings) that a model learns by heart.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
    "encodings",
}
VAL_PERCENT = 4
VAL_TOKENS_LIMIT = 100_000
PADDED_EVERY = 5  # every fifth shard is in the padded dialect, so that the demo reads both
PADDED_LENGTH = 512
RECIPE_NAME = "recipe.json"
TOKENIZER = f"shards/{TOKENIZER_NAME}"
UPLOAD_THREADS = 4


@dataclass(frozen=True)
class Document:
    """One text under a name that is the same on every machine."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.name}\0{self.text}".encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    try:
        options = parse(argv)
        make(options, console)
        if options.upload:
            upload(options.output_dir, open_store(options.upload, StorageConfig()), console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ConfigError where its numbers can't be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--upload", default="", metavar="URL", help="also upload there: gs://bucket/prefix or a folder")
    parser.add_argument("--shards", type=int, default=DEFAULT_SHARDS, help=f"training shards ({DEFAULT_SHARDS})")
    parser.add_argument("--vocab_size", type=int, default=8192, help="token ids of the tokenizer (8192)")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help=f"training tokens ({DEFAULT_TOKENS})")
    options = parser.parse_args(argv)
    if options.shards < 1 or options.tokens < options.shards:
        raise ConfigError(f"--tokens {options.tokens} can't fill --shards {options.shards}", "Give more tokens.")
    return options


# --- the corpus -------------------------------------------------------------------------------------------------------


def read_corpus() -> list[Document]:
    """The standard library's sources and the help topics, in an order that mixes them by hash."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [Document(f"topics/{name}", text) for name, text in topics.topics.items()]
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not SKIPPED_FOLDERS & set(inside.parts) and (text := _read_text(path)):
            documents.append(Document(inside.as_posix(), text))
    if not documents:
        raise ShardError(f"no Python sources under {root}", "Install the standard library's sources")
    return sorted(documents, key=lambda document: document.digest)


def _read_text(path: Path) -> str:
    """The file's text; empty for the few sources of the standard library that are not UTF-8 on purpose."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def split(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """(training texts, validation texts), told apart by the documents' hashes."""
    train: list[str] = []
    val: list[str] = []
    for document in documents:
        (val if int(document.digest[-8:], 16) % 100 < VAL_PERCENT else train).append(document.text)
    return train, val


# --- the shards -------------------------------------------------------------------------------------------------------


def make(options: argparse.Namespace, console: Console) -> None:
    """Write the corpus into options.output_dir, unless the same one is there, complete."""
    folder: Path = options.output_dir
    documents = read_corpus()
    corpus = hashlib.sha256("".join(document.digest for document in documents).encode()).hexdigest()
    recipe = {"shards": options.shards, "vocab_size": options.vocab_size, "tokens": options.tokens, "corpus": corpus}
    if is_complete(folder, recipe):
        console.print(f"demo data: complete in {folder}, nothing to do")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_NAME).unlink(missing_ok=True)  # written last: without it the folder counts as incomplete
    train_texts, val_texts = split(documents)
    n_mb = sum(len(text) for text in train_texts) / 1e6
    console.print(f"demo data: {len(documents)} documents of this Python's standard library, {n_mb:.1f} MB to train on")
    started_s = time.monotonic()
    tokenizer = train_bpe(train_texts, options.vocab_size)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    console.print(f"demo data: tokenizer of {options.vocab_size} ids, {time.monotonic() - started_s:.1f} s")

    train = take_tokens(encode(tokenizer, train_texts), options.tokens)
    if sum(map(len, train)) < options.tokens:
        found = sum(map(len, train))
        raise ShardError(
            f"the standard library gives {found} tokens, --tokens asks for {options.tokens}", "Ask for fewer."
        )
    val = take_tokens(encode(tokenizer, val_texts), VAL_TOKENS_LIMIT)
    entropy = unigram_entropy(train, val, options.vocab_size)
    header = DataManifest(f"bpe-{options.vocab_size}", options.vocab_size, end_of_text_id(tokenizer), (), entropy)
    write_shards(folder / "shards", train, options.shards, header)
    write_shards(folder / "val", val, 1, header)
    with new_file(folder / RECIPE_NAME) as file:
        file.write(json.dumps(recipe).encode())
    console.print(
        f"demo data: {options.shards} shards of {options.tokens:,} tokens, {sum(map(len, val)):,} for validation, "
        f"unigram entropy {entropy:.4f} nats, in {folder}"
    )


def is_complete(folder: Path, recipe: dict[str, object]) -> bool:
    """Whether every file is there that `recipe` gives, with the content that its manifest names."""
    try:
        if json.loads((folder / RECIPE_NAME).read_text(encoding="utf-8")) != recipe:
            return False
        if not (folder / TOKENIZER).is_file():
            return False
        for part in ("shards", "val"):
            manifest = DataManifest.from_json((folder / part / MANIFEST_NAME).read_bytes())
            if any(crc32c_of_file(folder / part / entry.name) != entry.crc32c for entry in manifest.shards):
                return False
    except (OSError, ValueError, ShardError):
        return False
    return True


def take_tokens(documents: Iterator[np.ndarray], n_tokens: int) -> list[np.ndarray]:
    """The first documents, the last one cut, that make `n_tokens`; all where there are fewer."""
    taken: list[np.ndarray] = []
    left = n_tokens
    for document in documents:
        taken.append(document[:left])
        left -= len(taken[-1])
        if left == 0:
            break
    return taken


def unigram_entropy(train: Sequence[np.ndarray], val: Sequence[np.ndarray], vocab_size: int) -> float:
    """Nats per validation token under the training tokens' frequencies, each id counted once more than it was seen."""
    counts = np.bincount(np.concatenate(train), minlength=vocab_size) + 1
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[np.concatenate(val)].mean())


def write_shards(folder: Path, documents: Sequence[np.ndarray], n_shards: int, header: DataManifest) -> None:
    """Write `n_shards` shards of equal size and their manifest; a document may go on in the next shard."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents])
    entries = []
    for index in range(n_shards):
        first, last = len(stream) * index // n_shards, len(stream) * (index + 1) // n_shards
        cuts = [first, *ends[(ends > first) & (ends < last)], last]
        path = folder / f"tokenized_cleaned_{index:05d}.npz"
        write = write_padded if index % PADDED_EVERY == PADDED_EVERY - 1 else write_stream
        write(path, stream[first:last], np.diff(cuts))
        entries.append(entry_of(path))
    manifest = DataManifest(header.tokenizer, header.vocab_size, header.eot_id, tuple(entries), header.unigram_entropy)
    with new_file(folder / MANIFEST_NAME) as file:
        file.write(manifest.to_json().encode())


def entry_of(path: Path) -> ShardEntry:
    """What the trainer will find in the shard, by its own reader."""
    tokens, lengths = read_npz(path)
    return ShardEntry(path.name, len(tokens), len(lengths), path.stat().st_size, crc32c_of_file(path))


def write_stream(path: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Our dialect: the tokens (n,) and the lengths of the documents in them."""
    with new_file(path) as file:
        np.savez_compressed(file, input_ids=tokens, sequence_lengths=lengths.astype(np.int64))


def write_padded(path: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """The dialect most common in the wild: rows (N, L) int32 padded with 0, a mask and the rows' lengths."""
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    rows = [
        row for document in documents for row in np.split(document, range(PADDED_LENGTH, len(document), PADDED_LENGTH))
    ]
    row_lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(PADDED_LENGTH) < row_lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int32)
    ids[mask] = tokens
    with new_file(path) as file:
        np.savez_compressed(file, input_ids=ids, attention_mask=mask.astype(np.int32), sequence_lengths=row_lengths)


# --- the upload -------------------------------------------------------------------------------------------------------


def upload(folder: Path, store: ObjectStore, console: Console) -> None:
    """Upload what the store lacks, manifests last; nothing that is there is replaced.

    Raises:
        StorageError: another content is there under one of the names.
    """
    names = [TOKENIZER]
    for part in ("shards", "val"):
        manifest = DataManifest.from_json((folder / part / MANIFEST_NAME).read_bytes())
        names += [f"{part}/{entry.name}" for entry in manifest.shards]
    manifests = [f"shards/{MANIFEST_NAME}", f"val/{MANIFEST_NAME}"]
    sizes = {name: (folder / name).stat().st_size for name in [*names, *manifests]}
    there = {info.name: info.crc32c for info in store.list()}

    with TransferProgress("upload", len(sizes), sum(sizes.values()), console) as progress:

        def send(name: str) -> None:
            if there.get(name) != crc32c_of_file(folder / name):
                _upload_one(store, folder / name, name)
            progress.add_bytes(sizes[name])
            progress.add_file()

        with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
            list(pool.map(send, names))
        for name in manifests:
            send(name)


def _upload_one(store: ObjectStore, path: Path, name: str) -> None:
    try:
        store.upload(path, name)
    except ObjectExists as error:
        raise StorageError(
            f"{store.url}/{name} is there with another content than {path}",
            "Give --upload an empty prefix, or delete that object",
        ) from error


if __name__ == "__main__":
    sys.exit(main())
