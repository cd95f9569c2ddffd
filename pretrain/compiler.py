"""torch.compile, where the machine has what it needs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from pretrain import log
from pretrain.ranks import Ranks
from pretrain.startup import START

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

logger = log.get(__name__)


def compile_model(model: nn.Module, device: torch.device, ranks: Ranks, mode: str = "default") -> None:
    """Have the model compiled at its first call, or say why it can't be and leave it as it is; all ranks alike.

    The compiler is tried on a small function first: without a C++ compiler (CPU) or Triton (GPU) it would fail in the
    middle of the first step.

    Args:
        mode: of torch.compile; see `train.compile_mode`.
    """
    START.ended("model")
    keep_compiled()
    problem = compiler_problem(device)
    START.ended("compiler")
    if not ranks.any(bool(problem)):
        if device.type == "cpu":
            from pretrain.decompositions import cpu_backend  # it imports the compiler, which takes a second

            if mode != "default" and ranks.is_first:
                logger.warning("train.compile_mode %s is for GPUs: compiled as a CPU always is", mode)
            model.compile(backend=cpu_backend)
        else:
            model.compile(mode=mode)
        where = os.environ.get(CACHE_VARIABLE, "torch's own place")
        logger.info(
            "the model is compiled at its first step, which takes longer; what is compiled is kept in %s", where
        )
    elif ranks.is_first:
        reason = problem or "another rank can't"
        logger.warning("train.compile: torch.compile can't work here (%s): going on without it", reason)


def keep_compiled() -> None:
    """Have torch keep what it compiles where a restart of the machine leaves it: its own choice is /tmp. A choice of
    the user's stays, and so does torch's where there is no home that can be written."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_inductor"
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where this user's home is
        return
    os.environ.setdefault(CACHE_VARIABLE, str(home))


def compiler_problem(device: torch.device) -> str:
    """Why the compiler doesn't work on the device, or ''; a small function and its gradient are held against eager."""

    def probe(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).sin().sum()

    x = torch.linspace(-1, 1, 8, device=device, requires_grad=True)
    try:
        y = torch.compile(probe, fullgraph=True)(x)
        (gradient,) = torch.autograd.grad(y, x)
    except (RuntimeError, ImportError, OSError) as error:  # the compiler's own errors are RuntimeErrors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    right = torch.allclose(y, probe(x), atol=1e-4) and torch.allclose(gradient, 2 * (2 * x).cos(), atol=1e-4)
    return "" if right else "it runs, but its results are wrong"
