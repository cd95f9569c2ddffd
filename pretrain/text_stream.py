"""Tokens that come one by one, shown as whole text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNDECODED = "\ufffd"  # what decoders write for bytes that are no UTF-8
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens that one is spread over


class TextStream:
    """Text from tokens as they come, never a part of a character nor of a stop text.

    Args:
        stops: texts that end the stream; they are not shown.

    Attributes:
        stopped: whether a stop text was met.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context = self._done = (
            0  # ids[_context:_done] are shown and decoded again: some decoders need a left side
        )
        self._text = ""  # decoded, not shown
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token; often none."""
        self._ids.append(token)
        self._text += self._settled()
        return self._released(final=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        text, self._context = self._take(len(self._ids))
        self._text, self._done = self._text + text, len(self._ids)
        return self._released(final=True)

    def _settled(self) -> str:
        """Text of the ids whose characters are whole. Bytes that can't become one are let through as they are."""
        oldest = len(self._ids) - LONGEST_CHARACTER + 1  # an unfinished character can't have begun before
        for end in range(len(self._ids), max(self._done, oldest - 1), -1):
            text, context = self._take(end)
            if end == oldest or not text.endswith(UNDECODED):
                self._context, self._done = context, end
                return text
        return ""

    def _take(self, end: int) -> tuple[str, int]:
        """Text of the ids that are not shown yet, up to `end`, and where the next window begins."""
        shown = self._tokenizer.decode(self._ids[self._context : self._done], skip_special_tokens=False)
        text = self._tokenizer.decode(self._ids[self._context : end], skip_special_tokens=False)
        return text[len(shown) :], self._done

    def _released(self, final: bool) -> str:
        """What can be shown of the decoded text."""
        if self.stopped:
            return ""
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        begun = (n for n in range(min(longest, len(self._text)), 0, -1) if self._begins_a_stop(self._text[-n:]))
        kept = 0 if final else next(begun, 0)
        text, self._text = self._text[: len(self._text) - kept], self._text[len(self._text) - kept :]
        return text

    def _begins_a_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class IdStream:
    """What stands in for text where there is no tokenizer: the ids themselves."""

    stopped = False

    def push(self, token: int) -> str:
        """The id after a comma: it continues the prompt's list."""
        return f",{token}"

    def finish(self) -> str:
        """Nothing is held back."""
        return ""
