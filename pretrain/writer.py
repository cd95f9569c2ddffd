"""Samples of a trained model as they grow: their text, and why each of them ended."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from tokenizers import Tokenizer

from pretrain.generation import Sampling, generate
from pretrain.pretrained import Pretrained
from pretrain.text_stream import IdStream, TextStream


@dataclass
class Sample:
    """One continuation as it grows.

    Args:
        prompt: as text, or as ids with commas.
        ended_by: "end of text", "stop text", "max_new_tokens", "context", "interrupt"; empty while it grows.
    """

    prompt: str
    ids: list[int]
    stream: TextStream | IdStream
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended_by: str = ""

    def take(self, token: int, ends: bool, stop_ids: Sequence[int], context: int) -> str:
        """Take a token in; the text to show."""
        if token in stop_ids:
            self.ended_by, piece = "end of text", self.stream.finish()
        else:
            self.tokens.append(token)
            piece = self.stream.push(token)
            if ends and not self.stream.stopped:
                piece += self.stream.finish()
                self.ended_by = "context" if len(self.ids) + len(self.tokens) == context else "max_new_tokens"
            if self.stream.stopped:
                self.ended_by = "stop text"
        self.text += piece
        return piece

    def interrupt(self) -> str:
        """End it where it is; the text that was held back."""
        self.ended_by, piece = "interrupt", self.stream.finish()
        self.text += piece
        return piece


@dataclass
class Writer:
    """A loaded model and how it writes.

    Attributes:
        n_tokens, seconds: written so far, for the rate at the end.
    """

    pretrained: Pretrained
    tokenizer: Tokenizer | None
    sampling: Sampling
    stops: Sequence[str]
    n_tokens: int = 0
    seconds: float = 0.0

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation."""
        return self.pretrained.config.seq_len

    def sample(self, ids: list[int], prompt: str | None = None) -> Sample:
        """The beginning of a continuation."""
        if self.tokenizer is None:
            return Sample(",".join(map(str, ids)), ids, IdStream())
        text = self.tokenizer.decode(ids, skip_special_tokens=False) if prompt is None else prompt
        return Sample(text, ids, TextStream(self.tokenizer, self.stops))

    def write(self, samples: Sequence[Sample], sampling: Sampling, show: Callable[[int, str], None]) -> bool:
        """Continue all samples at once; False where Ctrl+C ended it.

        Args:
            show: called with the sample's number and its next piece of text.

        Raises:
            ConfigError, DivergenceError: as `generate`.
        """

        def on_token(row: int, token: int, ends: bool) -> bool:
            if pressed:
                raise KeyboardInterrupt
            self.n_tokens += 1
            show(row, samples[row].take(token, ends, sampling.stop_ids, self.context))
            return bool(samples[row].ended_by)

        started = time.monotonic()
        try:
            with _noting_ctrl_c() as pressed:
                generate(self.pretrained.model, [sample.ids for sample in samples], sampling, on_token)
            if pressed:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            for row, sample in enumerate(samples):
                if not sample.ended_by:
                    show(row, sample.interrupt())
            return False
        finally:
            self.seconds += time.monotonic() - started
        return True

    @property
    def tokens_per_second(self) -> float:
        """Over all samples, the reading of the prompts included."""
        return self.n_tokens / max(self.seconds, 1e-9)

    def rate(self) -> str:
        """Tokens per second, in words."""
        return f"{self.n_tokens:,} tokens in {self.seconds:.2f} s: {self.tokens_per_second:,.1f} tokens/s"


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """Note Ctrl+C instead of raising it from wherever it finds the interpreter: a library may swallow it there.

    The second one is raised at once, for who won't wait for the next token.
    """
    pressed: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
