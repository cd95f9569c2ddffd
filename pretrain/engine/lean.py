"""What torch and DeepSpeed would import at a start that needs none of it: the compiler, some seconds of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.optim import Adam, AdamW, Optimizer

TELLS_COMPILER = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def leave_compiler_out() -> None:
    """Have torch's optimizers work without importing torch's compiler, which takes a quarter of a small run's start.

    They import it to tell it what not to trace. Here it traces the model alone, and where it does, it is there anyway.
    What is taken off is torch's own wrapping (2.11 to 2.13); where another version has none, nothing is changed, and
    where it comes back, only time is lost.
    """
    for name in TELLS_COMPILER:
        plain = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)
    step = Adam.step
    if AdamW.step is step and hasattr(step, "__wrapped__"):  # nobody has made an AdamW yet: torch wraps it then
        AdamW.step = torch.no_grad()(step.__wrapped__)  # type: ignore[method-assign]


def import_deepspeed() -> ModuleType:
    """DeepSpeed, without what it compiles while it is imported.

    It looks at the type of every optimizer and imports its Muon for that (0.19.8), which has a function compiled as it
    is defined and so brings in the whole compiler. Here the function is compiled where it is first called.

    Raises:
        ImportError: it is not installed, or does not run with this torch.
    """
    import deepspeed
    from deepspeed.runtime import compiler

    compile_now = compiler.compile
    compiler.compile = functools.partial(_compile_when_called, compile_now)
    try:
        import deepspeed.runtime.zero.muon.original_muon
    except ImportError:  # a version without a Muon, or with it elsewhere
        pass
    finally:
        compiler.compile = compile_now
    found: ModuleType = deepspeed
    return found


def _compile_when_called(compile_now: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """A decorator like `compile_now(*args, **options)`, which it calls at the decorated function's first call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(*args, **options)(function))
            return compiled[0](*values, **named)

        return call

    return decorate
