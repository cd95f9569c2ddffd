"""Let a trained model write: continue prompts, or chat with it.

    python scripts/generate.py checkpoints/test --prompt "def "
    python scripts/generate.py gs://bucket/Checkpoints/run --prompt "Once" --prompt "Twice" --n_samples 2 --top_p 0.95
    python scripts/generate.py checkpoints/test/checkpoint-epoch0-step50-files5 --tokens 1,2,3 --temperature 0
    python scripts/generate.py checkpoints/test --chat

CHECKPOINT is a checkpoint's folder, a run's folder (its newest checkpoint that verifies), the gs:// url of either, or a
folder in the layout of Hugging Face. Each text goes to stdout, its prompt first; all else goes to stderr. The same seed
gives the same text. A text ends with the model's end of text, with a --stop text, after --max_new_tokens, or where the
context is full. In a chat, Ctrl+C stops the answer, /reset forgets what was said, and /quit or Ctrl+D ends it.
Exit codes: 0 done, 2 wrong settings, 3 a broken tokenizer, 4 storage, 5 no such checkpoint, 130 stopped by Ctrl+C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py has it, and before torch is loaded

from pretrain.engine.base import PRECISION_DTYPES
from pretrain.errors import EXIT_DONE, ConfigError, TrainerError
from pretrain.generation import Sampling, end_of_text, prompt_ids
from pretrain.hardware import choose_device
from pretrain.pretrained import load_pretrained
from pretrain.tokenizers import load_tokenizer
from pretrain.writer import Sample, Writer

EXIT_INTERRUPTED = 130  # as a shell counts a program that ended by SIGINT
DEFAULT_NEW_TOKENS = 256
USER, ASSISTANT = "User:", "Assistant:"
HELP = "/reset forgets what was said, /quit or Ctrl+D ends the chat"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(argv)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a model writes what no terminal can show
    try:
        check(options)
        writer = open_writer(options)
        code = Chat(writer, options).run() if options.chat else write_all(writer, options)
        sys.stdout.flush()
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:  # before the first text: while a text is written, it ends there and is shown
        say("stopped by Ctrl+C")
        return EXIT_INTERRUPTED
    return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    what = parser.add_argument_group("what to continue (an empty text, where nothing is given)")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    what.add_argument(
        "--prompt_file", action="append", default=[], metavar="FILE", help="a file's whole text; - is stdin"
    )
    what.add_argument("--tokens", action="append", default=[], metavar="1,2,3", help="token ids; needs no tokenizer")
    what.add_argument("--n_samples", type=int, default=1, metavar="N", help="continuations of each prompt (1)")
    what.add_argument("--chat", action="store_true", help="talk in turns of User: and Assistant:")
    how = parser.add_argument_group("how to draw")
    how.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    how.add_argument("--top_k", type=int, default=50, metavar="K", help="only the K likeliest tokens; 0: all (50)")
    how.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="only the likeliest, up to probability P (1)"
    )
    how.add_argument("--seed", type=int, default=0, help="of the random draws (0)")
    how.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="most new tokens (256, or what the context has room for)"
    )
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; several times")
    how.add_argument("--eot_id", type=int, metavar="ID", help="token that ends a text (the tokenizer's end of text)")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, where none lies beside the weights")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--dtype", choices=("auto", *PRECISION_DTYPES), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="show text as it is drawn")
    add("--json", action="store_true", help="print one JSON object to stdout instead of the texts")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError with everything in the options that can't be, before the weights are read."""
    new = options.max_new_tokens
    problems = Sampling(options.temperature, options.top_k, options.top_p).problems()
    if new is not None and new < 1:
        problems.append(f"--max_new_tokens {new} must be at least 1")
    if options.n_samples < 1:
        problems.append(f"--n_samples {options.n_samples} must be at least 1")
    if options.chat and (
        options.prompt or options.prompt_file or options.tokens or options.json or options.n_samples > 1
    ):
        problems.append(
            "--chat asks for its own prompts: leave out --prompt, --prompt_file, --tokens, --n_samples, --json"
        )
    if problems:
        raise ConfigError(problems)


# ---- writing ----


def open_writer(options: argparse.Namespace) -> Writer:
    """Load the model and what goes with it.

    Raises:
        TrainerError: as `load_pretrained`; ConfigError where the tokenizer is missing or another model's.
    """
    device, dtype = choose_device(options.device, options.dtype)
    pretrained = load_pretrained(options.checkpoint, device=device, dtype=PRECISION_DTYPES[dtype])
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else pretrained.tokenizer
    if tokenizer is None and (
        options.stop or options.chat or not options.tokens or options.prompt or options.prompt_file
    ):
        mend = "Give one with --tokenizer PATH, or token ids with --tokens 1,2,3."
        raise ConfigError(f"{pretrained.name} has no tokenizer.json, and text needs one", mend)
    vocab_size = pretrained.config.vocab_size
    if tokenizer is not None and tokenizer.get_vocab_size() > vocab_size:
        found = f"the tokenizer has {tokenizer.get_vocab_size()} ids and the model {vocab_size}"
        raise ConfigError(found, "Give the tokenizer that the model was trained with: --tokenizer PATH.")
    eot_id = options.eot_id if options.eot_id is not None or tokenizer is None else end_of_text(tokenizer)
    if eot_id is not None and not 0 <= eot_id < vocab_size:
        raise ConfigError(
            f"token id {eot_id} can't end a text: it is outside the model's vocabulary of {vocab_size}",
            "Give another --eot_id, or leave it out.",
        )
    stop_ids = () if eot_id is None else (eot_id,)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed, stop_ids=stop_ids)
    parameters = pretrained.config.n_parameters
    say(f"{pretrained.name}: {parameters:,} parameters, {dtype} on {device}")
    return Writer(pretrained, tokenizer, sampling, options.stop)


def write_all(writer: Writer, options: argparse.Namespace) -> int:
    """Continue every prompt --n_samples times; the exit code."""
    samples = [
        writer.sample(ids, text)
        for ids, text in read_prompts(writer.tokenizer, options)
        for _ in range(options.n_samples)
    ]
    room = writer.context - max(len(sample.ids) for sample in samples)
    new = options.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
    printer = Printer(samples, live=options.stream)
    show = (lambda row, piece: None) if options.json else printer.show
    finished = writer.write(samples, dataclasses.replace(writer.sampling, max_new_tokens=new), show)
    if options.json:
        print(json.dumps(report(writer, samples), indent=1))
    if full := sum(sample.ended_by == "context" for sample in samples):
        say(f"{full} of {len(samples)} ended because the context of {writer.context} tokens is full")
    say(writer.rate())
    return EXIT_DONE if finished else EXIT_INTERRUPTED


def read_prompts(tokenizer: Tokenizer | None, options: argparse.Namespace) -> list[tuple[list[int], str | None]]:
    """(ids, text) of every prompt of the command line; no text where ids were given."""
    texts = [*options.prompt, *map(read_text, options.prompt_file)]
    if not texts and not options.tokens:
        texts = [""]
    prompts: list[tuple[list[int], str | None]] = []
    if tokenizer is not None:
        prompts += [(prompt_ids(tokenizer, text), text) for text in texts]
    for listed in options.tokens:
        try:
            prompts.append(([int(word) for word in listed.split(",")], None))
        except ValueError as error:
            raise ConfigError(f"--tokens {listed!r} are no token ids", "Give whole numbers: --tokens 1,2,3") from error
    return prompts


def read_text(path: str) -> str:
    """A file's text, or stdin's. Raises ConfigError where there is none."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file {path} can't be read: {error}", "Give a file of UTF-8 text.") from error


def report(writer: Writer, samples: Sequence[Sample]) -> dict[str, object]:
    """The object of --json."""
    shown = [
        {"prompt": each.prompt, "text": each.text, "tokens": each.tokens, "ended_by": each.ended_by} for each in samples
    ]
    parameter = next(writer.pretrained.model.parameters())
    return {
        "name": "generate",
        "checkpoint": writer.pretrained.name,
        "step": writer.pretrained.step,
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "samples": shown,
        "tokens": writer.n_tokens,
        "seconds": round(writer.seconds, 3),
        "tokens_per_second": round(writer.tokens_per_second, 1),
    }


class Printer:
    """Samples that grow side by side, shown one after the other: the first that has not ended is shown live."""

    def __init__(self, samples: Sequence[Sample], live: bool) -> None:
        self._samples = samples
        self._live = live
        self._waiting = [f"{heading(number, len(samples))}{sample.prompt}" for number, sample in enumerate(samples, 1)]
        self._first = 0

    def show(self, row: int, piece: str) -> None:
        """Take the next piece of a sample's text."""
        self._waiting[row] += piece
        while self._first < len(self._samples):
            ended = bool(self._samples[self._first].ended_by)
            if ended or self._live:
                put(self._waiting[self._first])
                self._waiting[self._first] = ""
            if not ended:
                return
            put("\n")
            self._first += 1


def heading(number: int, total: int) -> str:
    """What stands above a sample where there are several."""
    return f"--- {number} of {total} ---\n" if total > 1 else ""


def put(text: str) -> None:
    """Text to stdout at once. A terminal gets no control characters from a model but line ends and tabs."""
    if sys.stdout.isatty():
        text = "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for the user, beside the texts."""
    print(text, file=sys.stderr, flush=True)


# ---- chat ----


class Chat:
    """Turns of a user and the model, as one text that the model continues."""

    def __init__(self, writer: Writer, options: argparse.Namespace) -> None:
        self._writer = dataclasses.replace(writer, stops=[f"\n{USER}", *writer.stops])
        self._live = options.stream
        self._new = options.max_new_tokens or min(DEFAULT_NEW_TOKENS, max(1, writer.context // 2))
        self._turns: list[tuple[str, str]] = []
        self._n_answers = 0

    def run(self) -> int:
        """Ask and answer until the user ends it; the exit code."""
        say(HELP)
        while True:
            try:
                line = input(f"{USER} ").strip()
            except KeyboardInterrupt:
                say(f"\n{HELP}")
                continue
            except EOFError:
                line = "/quit"
                print()
            if line == "/quit":
                say(self._writer.rate())
                return EXIT_DONE
            if line == "/reset":
                self._turns.clear()
                say("(all forgotten)")
            elif line.startswith("/"):
                say(HELP)
            elif line:
                try:
                    self._answer(line)
                except KeyboardInterrupt:  # before its first word or behind its last one
                    say("\n(stopped)")

    def _answer(self, line: str) -> None:
        ids = self._trimmed(line)
        sample = self._writer.sample(ids)
        self._n_answers += 1  # the same question again gets another answer
        seed = self._writer.sampling.seed + self._n_answers
        sampling = dataclasses.replace(self._writer.sampling, max_new_tokens=self._new, seed=seed)
        put(ASSISTANT)
        try:
            finished = self._writer.write([sample], sampling, lambda row, piece: put(piece if self._live else ""))
        except ConfigError as error:  # too long a line is no reason to leave
            put("\n")
            say(error.line())
            return
        put("\n" if self._live else f"{sample.text}\n")
        if not finished:
            say("(stopped)")
        self._turns.append((line, sample.text.strip()))

    def _trimmed(self, line: str) -> list[int]:
        """Ids of the conversation with the user's next line; its oldest turns go where the context has no room."""
        assert self._writer.tokenizer is not None  # --chat was refused without
        forgotten = 0
        while True:
            said = "".join(f"{USER} {asked}\n{ASSISTANT} {answer}\n" for asked, answer in self._turns)
            ids = prompt_ids(self._writer.tokenizer, f"{said}{USER} {line}\n{ASSISTANT}")
            if not self._turns or len(ids) + self._new <= self._writer.context:
                break
            self._turns.pop(0)
            forgotten += 1
        if forgotten:
            say(f"({forgotten} oldest turns forgotten: the context holds {self._writer.context} tokens)")
        return ids


if __name__ == "__main__":
    sys.exit(main())
