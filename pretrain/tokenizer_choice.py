"""The tokenizer of a preparation: trained on a sample of its input, given as a file, or one of tiktoken's."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.documents import EMPTY, Document, Reading, read_unit
from pretrain.encoders import TIKTOKEN, open_encoder, tiktoken_json
from pretrain.errors import ConfigError
from pretrain.manifest import TOKENIZER_NAME
from pretrain.parts import digest, is_validation
from pretrain.raw_files import Unit
from pretrain.tokenizers import load_tokenizer, train_bpe, train_wordpiece

TRAINERS = {"bpe": train_bpe, "wordpiece": train_wordpiece}
DEFAULT_ENCODING = "gpt2"
SAMPLED_UNITS = 256


@dataclass(frozen=True)
class TokenizerChoice:
    """What makes the ids.

    Args:
        kind: bpe, wordpiece or tiktoken.
        given: a tokenizer.json, a folder with one, or tiktoken:NAME; empty: trained, or tiktoken's gpt2.
        vocab_size: of one that is trained.
        sample_bytes: of text that it is trained on at most.
    """

    kind: str = "bpe"
    given: str = ""
    vocab_size: int = 32000
    sample_bytes: int = 100 << 20

    @property
    def encoding(self) -> str:
        """The name of a tiktoken encoding, or empty."""
        if self.given.startswith(TIKTOKEN):
            return self.given.removeprefix(TIKTOKEN)
        return DEFAULT_ENCODING if self.kind == "tiktoken" and not self.given else ""

    @property
    def library(self) -> str:
        return "tiktoken" if self.encoding else "tokenizers"

    @property
    def path(self) -> Path | None:
        """The file that was given."""
        if not self.given or self.encoding:
            return None
        path = Path(self.given).expanduser()
        return path / TOKENIZER_NAME if path.is_dir() else path

    def problems(self) -> list[str]:
        """Why it can't be; empty where it can."""
        if self.kind == "tiktoken" and self.path:
            return [
                f"--tokenizer_type tiktoken takes no file {self.given}: name an encoding, --tokenizer tiktoken:gpt2"
            ]
        return []

    def versions(self) -> dict[str, str]:
        """Of the libraries that the ids depend on. Raises ConfigError where one is missing."""
        try:
            return {self.library: importlib.metadata.version(self.library)}
        except importlib.metadata.PackageNotFoundError as error:
            mend = "pip install -r requirements-data.txt"
            raise ConfigError(f"tiktoken encodings need the package {self.library}", mend) from error

    def make(self, units: Sequence[Unit], reading: Reading, val_fraction: float, *, stop: bool) -> str:
        """The text of the tokenizer.json.

        Raises:
            ConfigError: a vocabulary that can't be, or an encoding that tiktoken can't give.
            ShardError: too little text, or (with `stop`) text that can't be used, or no tokenizer there.
        """
        if self.encoding:
            return tiktoken_json(self.encoding)
        if self.path:
            text = str(load_tokenizer(self.path).to_str(pretty=True))
            open_encoder(text, self.library)  # has it an end of text?
            return text
        sample = sample_documents(units, reading, val_fraction, self.sample_bytes, stop=stop)
        return str(TRAINERS[self.kind](sample, self.vocab_size).to_str(pretty=True))

    def title(self, tokenizer_json: str, vocab_size: int) -> str:
        """Its name in manifest.json: bpe-8192, tiktoken-gpt2."""
        if self.encoding:
            return f"tiktoken-{self.encoding}"
        kind = json.loads(tokenizer_json)["model"].get("type", "tokenizer")
        return f"{str(kind).lower()}-{vocab_size}"


def sample_documents(
    units: Sequence[Unit], reading: Reading, val_fraction: float, sample_bytes: int, *, stop: bool
) -> Iterator[str]:
    """All training documents in their order, or where that is more than `sample_bytes` of text, the first ones of up
    to 256 units that stand evenly through the input.

    Raises:
        ShardError: with `stop`, the first document among them that can't be used.
    """
    chosen = units
    if sum(unit.n_bytes for unit in units) > sample_bytes and len(units) > SAMPLED_UNITS:
        chosen = [units[len(units) * index // SAMPLED_UNITS] for index in range(SAMPLED_UNITS)]
    left = sample_bytes
    for index, unit in enumerate(chosen):
        quota = left // (len(chosen) - index)  # what a short unit leaves is shared by those after it
        for found in read_unit(unit, reading):
            if quota <= 0:
                break
            if isinstance(found, Document):
                if val_fraction and is_validation(_digests(found.data), val_fraction)[0]:
                    continue
                quota -= len(found.data)
                left -= len(found.data)
                yield found.text
            elif stop and found.reason != EMPTY:
                raise found.error()


def _digests(data: bytes) -> np.ndarray:
    return np.frombuffer(digest(data), "<u8").reshape(1, 2)
