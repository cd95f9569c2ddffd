"""How much faster generation is with the key-value cache than without it.

    python benchmarks/bench_generate.py [--json] [--save]

Both sides continue the same prompt greedily by 512 tokens with the same untrained model of 4 layers and width 384, in
turn and several times; the figure is the median of the rounds' ratios. Without the cache every token reads all before
it again, and the logits of the last position alone are computed, as a careful implementation without one would. Both
must write the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from torch import Tensor

from model import GPT
from pretrain.checks import Check, publish
from pretrain.errors import ConfigError
from pretrain.generation import Sampling, generate
from pretrain.model_config import ModelConfig

GOAL = 5.0
PROMPT_TOKENS = 32
SEED = 0


class LastLogits(GPT):
    """The model, computing logits for the last position only: those of the others are of no use to either side."""

    def _logits(self, x: Tensor) -> Tensor:
        return super()._logits(x[:, -1:])


@torch.no_grad()
def without_cache(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    """Greedy text by reading everything again for each token."""
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    for _ in range(n_new):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), 1)
    written: list[int] = tokens[0, len(prompt) :].tolist()
    return written


def with_cache(model: GPT, prompt: list[int], n_new: int) -> list[int]:
    """Greedy text as scripts/generate.py writes it."""
    return generate(model, [prompt], Sampling(temperature=0, max_new_tokens=n_new))[0]


def timed(write: Callable[[GPT, list[int], int], list[int]], model: GPT, n_new: int) -> tuple[float, list[int]]:
    """(seconds, tokens written); what is read back makes a GPU finish."""
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(SEED))
    started = time.perf_counter()
    written = write(model, prompt.tolist(), n_new)
    return time.perf_counter() - started, written


def build(n_new: int, device: torch.device) -> GPT:
    """A model whose weights are spread further than at the start, so that its text is not one token again and again."""
    config = ModelConfig(
        family="llama", size="custom", n_layer=4, n_head=6, d_model=384, vocab_size=8192, seq_len=2 * n_new, dropout=0.0
    )
    torch.manual_seed(SEED)
    model = LastLogits(config.resolve())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new_tokens", type=int, default=512, help="tokens that are written (512)")
    parser.add_argument("--rounds", type=int, default=3, help="times that both sides run (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/generate.json")
    options = parser.parse_args(argv)
    if options.new_tokens < PROMPT_TOKENS or options.rounds < 1:
        problem = ConfigError(f"--new_tokens must be at least {PROMPT_TOKENS} and --rounds at least 1")
        print(problem.line(), file=sys.stderr)
        return problem.exit_code
    model = build(options.new_tokens, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for write in (with_cache, without_cache):
        timed(write, model, PROMPT_TOKENS)  # first calls choose kernels and allocate
    cached, uncached, same = [], [], 0
    for _ in track(range(options.rounds), "rounds", disable=options.json, transient=True):
        cached_s, written = timed(with_cache, model, options.new_tokens)
        uncached_s, expected = timed(without_cache, model, options.new_tokens)
        cached.append(cached_s)
        uncached.append(uncached_s)
        same += written == expected
    ratios = [slow / fast for slow, fast in zip(uncached, cached, strict=True)]
    checks = [Check("speed_up_by_cache", round(statistics.median(ratios), 2), "≥", GOAL, "x")]
    if next(model.parameters()).dtype == torch.float32:  # in bf16 the two orders of summing may part at a near tie
        checks.append(Check("rounds_with_equal_text", same, "=", options.rounds, "rounds"))
    details = {
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "parameters": model.config.n_parameters,
        "cached_tokens_per_second": round(options.new_tokens / statistics.median(cached), 1),
        "uncached_tokens_per_second": round(options.new_tokens / statistics.median(uncached), 1),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "distinct_tokens": len(set(written)),
    }
    return publish("generate", checks, as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
