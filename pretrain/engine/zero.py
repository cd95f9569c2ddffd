"""The DeepSpeed engine: ZeRO-2 partitions gradients and optimizer state over the ranks (arXiv 1910.02054).

On a CPU DeepSpeed wants a small communication op, compiled at first use; `cpu_op_problem` says why it can't be had.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import log
from pretrain.config import OptimConfig
from pretrain.engine.base import (
    ADAM_MOMENTS,
    EngineState,
    ParameterState,
    StepResult,
    evaluate,
    split_targets,
    watched,
    zero_moments,
)
from pretrain.optim import LossScale, build_adamw, parameter_groups

logger = log.get(__name__)


def prepare_import(device: torch.device) -> None:
    """Tell DeepSpeed its device, to be quiet, and where ninja is; it reads the environment at its first import."""
    # The ninja that pip installed lies beside this Python, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch has replaced; nothing that a user could mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def cpu_op_problem() -> str:
    """Why DeepSpeed's communication op for CPUs can't be built on this machine, in one line; '' where it can.

    The first call compiles it (about half a minute); later ones find it in torch's extension cache.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = ShareMemCommBuilder()
    try:
        cache = Path(_get_build_directory(builder.name, verbose=False))
        with (cache / ".turn").open("w") as turn, contextlib.redirect_stdout(io.StringIO()):
            # Torch guards a build with a file that a killed process leaves behind, and then waits for it for ever. Our
            # own lock dies with its process, so whoever holds it knows that such a file is a leftover.
            fcntl.flock(turn, fcntl.LOCK_EX)
            (cache / "lock").unlink(missing_ok=True)
            builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:  # compiler or ninja missing, headers missing, a bad build
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


class ZeroEngine:
    """A model under DeepSpeed ZeRO; see engine.base.Engine for the methods.

    Args:
        model: the model, in fp32, on any device.
        settings: DeepSpeed's configuration from ds_settings.
    """

    name = "deepspeed"

    def __init__(self, model: nn.Module, settings: dict[str, Any], optim: OptimConfig, device: torch.device) -> None:
        import deepspeed

        backend = "nccl" if device.type == "cuda" else "gloo"
        model.to(device)
        groups = parameter_groups(model.named_parameters(), optim.weight_decay)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its op and its settings on every rank
            deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_adamw(groups, optim),
                config=settings,
                dist_init_required=False,
            )
        self._device = device
        self._zero = self._engine.optimizer
        self._optimizer_steps = 0
        self._take_over_loss_scale()
        self._link_states()

    def _take_over_loss_scale(self) -> None:
        """Let DeepSpeed ask our loss scale, so that every engine has the same one.

        Its own doubles after `window` + 1 finite steps, counts in a way that a checkpoint can't tell, and raises a bare
        Exception where an overflow meets the smallest scale.
        """
        scaler = self._zero.loss_scaler
        self._loss_scale = LossScale(float(scaler.cur_scale), scaler.scale_window if scaler.dynamic else 1)
        if scaler.dynamic:
            scaler.update_scale = self._update_loss_scale

    def _update_loss_scale(self, overflow: bool) -> None:
        self._loss_scale.update(finite=not overflow)
        self._zero.loss_scaler.cur_scale = self._loss_scale.scale

    def _link_states(self) -> None:
        """Create the flat optimizer state and link it to the parameters.

        DeepSpeed links by itself after the first parameter group's first step, when later groups have no state yet and
        read as missing; done here, before any step, every group has it.
        """
        zero_moments(self._zero.optimizer, self._optimizer_steps)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def train_step(self, micro_batches: Sequence[Tensor], lr: float) -> StepResult:
        for group in self._zero.param_groups:
            group["lr"] = lr
        losses = []
        for tokens in micro_batches:
            loss = watched(self._engine(*split_targets(tokens, self._device)))
            losses.append(loss.detach())
            self._engine.backward(loss)
            self._engine.step()  # DeepSpeed updates at the last micro-batch, and only counts before it
        applied = self._engine.was_step_applied()
        self._optimizer_steps += applied
        norm = self._engine.get_global_grad_norm()
        return StepResult(torch.stack(losses).mean(), float("inf") if norm is None else float(norm), applied)

    def evaluate(self, tokens: Tensor) -> float:
        return evaluate(self._engine.module, tokens, self._device)

    def parameter_states(self) -> Iterator[tuple[str, ParameterState]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._engine.module.named_parameters():
            moments = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in ADAM_MOMENTS}
            yield name, {"weight": safe_get_full_fp32_param(parameter), **moments}

    @torch.no_grad()
    def load(self, read: Callable[[str], ParameterState], state: EngineState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._optimizer_steps = state.optimizer_steps
        self._link_states()
        for name, parameter in self._engine.module.named_parameters():
            full = {key: tensor.to(self._device) for key, tensor in read(name).items()}
            parameter.copy_(full["weight"])
            safe_set_full_fp32_param(parameter, full["weight"])
            for moment in ADAM_MOMENTS:
                safe_set_full_optimizer_state(parameter, full[moment], moment)
        if self._zero.loss_scaler.dynamic:
            self._loss_scale.restore(state.loss_scale, state.finite_steps)
            self._zero.loss_scaler.cur_scale = self._loss_scale.scale

    def state(self) -> EngineState:
        if not self._zero.loss_scaler.dynamic:
            return EngineState(self._optimizer_steps)
        return EngineState(self._optimizer_steps, self._loss_scale.scale, self._loss_scale.finite_steps)
