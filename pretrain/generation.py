"""Text from a model: tokens drawn one by one through the key-value cache, and shown as they come.

    written = generate(model, [[5, 8, 13], [21]], Sampling(temperature=0.8, top_p=0.95, seed=1))

Every row draws from a generator of its own, seeded by (seed, row) on the CPU: torch's global random state is never
touched, a row's draws don't depend on the rows beside it, and they are the same on every device. A row ends with a stop
id, after `max_new_tokens`, or where the model's context is full; it never slides on by forgetting its start.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import GPT
from pretrain.errors import ConfigError, DivergenceError
from pretrain.kv_cache import KVCache
from pretrain.model_config import ModelConfig
from pretrain.tokenizers import END_OF_TEXT_NAMES

PREFILL_TOKENS = 512  # of a prompt in one forward pass: the logits of a whole long one would be the largest tensor
LOWEST_TEMPERATURE = 1e-3  # below it logits overflow; nothing but the best token is left long before
SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 50  # of the samples during training: readable, and still of the model's mind

# (row, token, whether it ends the row) to whether the row shall end with it in any case
OnToken = Callable[[int, int, bool], bool]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a row ends.

    Args:
        temperature: divides the logits; 0: the likeliest token, always.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020), in (0, 1].
        seed: of the rows' generators.
        max_new_tokens: most tokens a row is continued by; 0: until the context is full.
        stop_ids: tokens that end a row.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()

    def problems(self) -> list[str]:
        """What can't be, each with its bounds."""
        rules = [
            (
                self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf,
                f"temperature {self.temperature} must be 0 (the likeliest token) or at least {LOWEST_TEMPERATURE}",
            ),
            (self.top_k < 0, f"top_k {self.top_k} must be at least 1, or 0 for all"),
            (not 0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]"),
            (
                self.max_new_tokens < 0,
                f"max_new_tokens {self.max_new_tokens} must be at least 1, or 0 to fill the context",
            ),
        ]
        return [problem for broken, problem in rules if broken]


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken | None = None
) -> list[list[int]]:
    """Continue each prompt; the batch is read together and shrinks as its rows end.

    Args:
        model: the bare model on any device, in any dtype; its training mode is restored. Under FSDP every rank must
            call this with the same arguments.
        prompts: token ids of each row, at least one.
        on_token: called for each new token as it is drawn.

    Returns:
        The new tokens of each row, the stop id included where one ended it.

    Raises:
        ConfigError: a prompt that doesn't fit, with what there is room for, or settings that can't be; before anything
            runs.
        DivergenceError: the logits are not finite.
    """
    check_prompts(model.config, prompts, sampling)
    room = [model.config.seq_len - len(prompt) for prompt in prompts]
    limits = [min(sampling.max_new_tokens or each, each) for each in room]
    written: list[list[int]] = [[] for _ in prompts]
    generators = [_generator(sampling.seed, row) for row in range(len(prompts))]
    active = list(range(len(prompts)))
    if not active:
        return written
    with _evaluating(model):
        cache, logits = _read(model, prompts, max(limits))
        while True:
            tokens = draw(logits, sampling, [generators[row] for row in active])
            going = []  # places in the batch
            for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
                written[row].append(token)
                ends = token in sampling.stop_ids or len(written[row]) == limits[row]
                ends |= bool(on_token and on_token(row, token, ends))
                if not ends:
                    going.append(place)
            if not going:
                return written
            if len(going) < len(active):  # what has ended costs no more, and a row that is full doesn't end the others
                cache.keep(torch.tensor(going, device=logits.device))
                active, tokens = [active[place] for place in going], [tokens[place] for place in going]
            logits = model(torch.tensor(tokens, device=logits.device)[:, None], cache=cache)[:, -1]  # (B, vocab_size)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Refuse what can't be continued. Raises ConfigError with every problem and its mend."""
    problems = sampling.problems()
    for number, prompt in enumerate(prompts, 1):
        title = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if problem := _prompt_problem(config, prompt, sampling.max_new_tokens):
            problems.append(f"{title} {problem}")
    if problems:
        raise ConfigError(problems)


def _prompt_problem(config: ModelConfig, prompt: Sequence[int], new: int) -> str:
    """What makes a prompt impossible, or ''."""
    length, context = len(prompt), config.seq_len
    if not prompt:
        return "is empty: give at least one token"
    if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
        return f"has token id {wrong[0]}, outside the model's vocabulary of {config.vocab_size}: another tokenizer's?"
    if length > context:
        return f"has {length} tokens, {length - context} more than the model's context of {context}: shorten it"
    if length == context:
        return f"has {length} tokens and fills the model's context: shorten it by as many as you want new ones"
    if length + new > context:
        return (
            f"has {length} tokens, and {new} new ones are {length + new - context} more than the model's context of "
            f"{context}: ask for at most {context - length}, or shorten it"
        )
    return ""


def _generator(seed: int, row: int) -> torch.Generator:
    """A row's own; hashed, so that row 1 of seed 0 is not row 0 of seed 1."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Without dropout, gradients and compilation, which would be repeated for every length."""
    was_training = model.training
    # Nothing can be compiled before torch._dynamo is imported, and that takes a second.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    model.eval()
    try:
        with torch.no_grad(), eager:  # inference_mode would leave FSDP buffers that training can't write to
            yield
    finally:
        model.train(was_training)


def _read(model: GPT, prompts: Sequence[Sequence[int]], new: int) -> tuple[KVCache, Tensor]:
    """A cache of the prompts with room for `new` more, and the logits (B, vocab_size) after them."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    cache = KVCache(model.config, torch.tensor(padding, device=device), longest + new)
    logits = torch.empty(0)
    for part in tokens.to(device).split(PREFILL_TOKENS, 1):
        logits = model(part, cache=cache)[:, -1]
    return cache, logits


# ---- drawing ----


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """One token for each row.

    Args:
        logits: (B, vocab_size), any dtype and device.
        generators: B, on the CPU.

    Raises:
        DivergenceError: the logits are not finite.
    """
    logits = logits.float()
    if not bool(logits.isfinite().all()):
        raise DivergenceError("the model's logits are not finite", "Take an earlier checkpoint, or fp32 or bf16.")
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen
    probabilities = probabilities_of(logits, sampling).cpu()
    rows = zip(probabilities, generators, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


def probabilities_of(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn from, fp32 (B, vocab_size): temperature, then top-k, then top-p, as transformers does it.

    Of equals at the edge of top-k all stay; top-p keeps the token that crosses the bound.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort()
        beyond = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        beyond[:, -1] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return logits.softmax(-1)


# ---- text ----


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document; None where the tokenizer has none that is known here."""
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES)
    return next((token for token in ids if token is not None), None)


def plainly(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to encode the whole text and nothing else, as documents are encoded for training.

    A tokenizer.json may say that texts are cut or padded to some length, as a fine-tuning once wanted them.
    """
    tokenizer.encode_special_tokens = True  # text that spells a special token is that text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt, as documents are encoded for training; an empty one begins a new text, after the end of another.

    Raises:
        ConfigError: an empty prompt and no end of text in the tokenizer.
    """
    if ids := list(plainly(tokenizer).encode(text, add_special_tokens=False).ids):
        return ids
    eot_id = end_of_text(tokenizer)
    if eot_id is None:
        raise ConfigError("the prompt is empty and the tokenizer has no end of text to begin after", "Give a prompt.")
    return [eot_id]


# ---- samples during training ----


def check_sample(prompt: str, tokenizer_json: str | None, config: ModelConfig, max_tokens: int) -> None:
    """Refuse a sample that `sample_text` could not draw, before the training begins.

    Args:
        prompt: of `log.sample_prompt`; an empty one asks for no samples, and all is well.
        tokenizer_json: content of the tokenizer.json beside the shards; None: there is none.

    Raises:
        ConfigError: no tokenizer, a broken one, or a prompt that doesn't fit.
    """
    if not prompt:
        return
    if tokenizer_json is None:
        raise ConfigError(
            "log.sample_prompt needs a tokenizer and no tokenizer.json lies beside the shards",
            "Put it there, or leave log.sample_prompt empty.",
        )
    ids = prompt_ids(_parsed(tokenizer_json), prompt)
    if problem := _prompt_problem(config, ids, max_tokens):
        raise ConfigError(f"log.sample_prompt {problem} (log.sample_tokens is {max_tokens})")


def sample_text(module: GPT, tokenizer_json: str, prompt: str, max_tokens: int, seed: int) -> str:
    """How the model continues a prompt; the prompt itself is not in it.

    It changes nothing that training depends on. Every rank that calls it with the same weights gets the same text, and
    runs the same number of forward passes whatever is drawn, so it may be called under FSDP by all ranks.

    Args:
        module: the bare model, in any mode, on any device, in any dtype.
        tokenizer_json: content of tokenizer.json.

    Raises:
        ConfigError: what `check_sample` refuses.
    """
    tokenizer = _parsed(tokenizer_json)
    sampling = Sampling(SAMPLE_TEMPERATURE, SAMPLE_TOP_K, seed=seed, max_new_tokens=max_tokens)
    try:
        (written,) = generate(module, [prompt_ids(tokenizer, prompt)], sampling)
    except DivergenceError as error:  # a sample is no reason to stop: the trainer has its own way with this
        return f"(no sample: {error.what})"
    eot_id = end_of_text(tokenizer)
    shown = written[: written.index(eot_id)] if eot_id in written else written
    return str(tokenizer.decode(shown, skip_special_tokens=False))


def _parsed(tokenizer_json: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exception on JSON that is no tokenizer
        raise ConfigError(
            f"the tokenizer.json beside the shards is no tokenizer: {error}", "Mend or remove it."
        ) from error
