"""The DeepSpeed engine: ZeRO divides optimizer state (1), gradients (2) and weights (3) over the ranks.

Source: Rajbhandari et al. 2019, arXiv 1910.02054. Stage 0 divides nothing.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import log
from pretrain.config import OptimConfig
from pretrain.engine.base import (
    PRECISION_DTYPES,
    EngineState,
    Mark,
    ParameterState,
    StepResult,
    evaluate,
    in_order,
    is_skeleton,
    no_mark,
    nothing,
    placed,
    split_targets,
    watched,
)
from pretrain.engine.zero_states import partition, states_of
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
        model: the model, in fp32, on any device; or a skeleton of it, of which ZeRO-3 takes memory for this rank's
            share alone.
        settings: DeepSpeed's configuration from ds_settings.
    """

    name = "deepspeed"

    def __init__(self, model: nn.Module, settings: dict[str, Any], optim: OptimConfig, device: torch.device) -> None:
        import deepspeed

        self.before_update: Callable[[], None] = nothing
        self.mark: Mark = no_mark
        linear = nn.functional.linear
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._stage: int = settings["zero_optimization"]["stage"]
        dtype = PRECISION_DTYPES[next((name for name in ("fp16", "bf16") if settings[name]["enabled"]), "fp32")]
        # ZeRO-0 in fp32: DeepSpeed steps torch's AdamW without a look at the gradients, so we look and clip
        self._is_plain = self._stage == 0 and not (settings["fp16"]["enabled"] or settings["bf16"]["enabled"])
        self._clip = optim.clip
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its op and its settings on every rank
            deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
            if self._stage == 3 and is_skeleton(model):
                partition(model.to(dtype), settings, device)
            else:
                placed(model, device, dtype)
            groups = parameter_groups(model.named_parameters(), optim.weight_decay)
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_adamw(groups, optim),
                config={**settings, "gradient_clipping": 0.0} if self._is_plain else settings,
                dist_init_required=False,
            )
        # ZeRO-3 replaces torch's linear for good, in every model of the process, by one whose gradients are wrong under
        # selective activation checkpointing (deepspeed 0.19.8: by a quarter, and nothing is said).
        nn.functional.linear = linear
        self._device = device
        self.forward_is_collective = self._stage == 3
        self.states_stay = self._stage < 3 and (self._stage == 0 or torch.distributed.get_world_size() == 1)
        self._zero = self._engine.optimizer
        self._optimizer_steps = 0
        self._take_over_loss_scale()
        self._states = states_of(self._engine, self._stage)
        self._states.begin(0)

    def _take_over_loss_scale(self) -> None:
        """Let DeepSpeed ask our loss scale, so that every engine has the same one.

        Its own doubles after `window` + 1 finite steps, counts in a way that a checkpoint can't tell, and raises a bare
        Exception where an overflow meets the smallest scale. It also updates the scale before it divides the gradients
        by it: so ours changes when the step is done.
        """
        fp16 = self._engine._config.float16_config if self._engine.fp16_enabled() else None
        self._scales_loss = fp16 is not None
        self._loss_scale = LossScale(
            2.0**fp16.initial_scale_power if fp16 else 1.0, fp16.loss_scale_window if fp16 else 1
        )
        if self._scales_loss:
            self._scaler.update_scale = self._zero._update_scale = lambda *_: None
            self._scaler.cur_scale = self._loss_scale.scale

    @property
    def _scaler(self) -> Any:
        """What of DeepSpeed's optimizer holds the scale."""
        return self._zero.loss_scale_config if self._stage == 0 else self._zero.loss_scaler

    def train_step(self, micro_batches: Sequence[Tensor], lr: float) -> StepResult:
        for group in self._zero.param_groups:
            group["lr"] = lr
        losses = []
        for number, tokens in enumerate(micro_batches, 1):
            self.mark("forward")
            loss = watched(self._engine(*split_targets(tokens, self._device)))
            losses.append(loss.detach())
            self.mark("backward")
            # ZeRO-0 divides by the loss scale, and does not multiply by it
            self._engine.backward(loss * self._loss_scale.scale if self._stage == 0 else loss)
            self.mark("optimizer")
            if number == len(micro_batches):
                self.before_update()
                if self._is_plain:
                    norm = self._clip_plain()
            self._engine.step()  # DeepSpeed updates at the last micro-batch, and only counts before it
        if not self._is_plain:
            norm = self._norm()
        applied = norm < float("inf")
        if self._scales_loss:
            self._loss_scale.update(finite=applied)
            self._scaler.cur_scale = self._loss_scale.scale
        self._optimizer_steps += applied
        self.mark("other")
        return StepResult(torch.stack(losses).mean(), norm if applied else float("inf"), applied)

    @torch.no_grad()
    def _clip_plain(self) -> float:
        """Clip the reduced gradients; where their norm is not finite they go, and AdamW passes over what has none."""
        parameters = [parameter for parameter in self._engine.module.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
        if not norm < float("inf"):
            for parameter in parameters:
                parameter.grad = None
        elif self._clip and norm > self._clip:
            torch._foreach_mul_([parameter.grad for parameter in parameters], self._clip / (norm + 1e-6))
        return norm

    def _norm(self) -> float:
        """The gradient norm as DeepSpeed found it, without the loss scale; inf where it left out the update."""
        norm = self._engine.get_global_grad_norm()
        if norm is None or not self._engine.was_step_applied():
            return float("inf")
        return float(norm) / (self._loss_scale.scale if self._stage == 0 else 1.0)

    def evaluate(self, tokens: Tensor) -> float:
        return evaluate(self._engine.module, tokens, self._device)

    @torch.no_grad()
    def parameter_states(self) -> Iterator[tuple[str, ParameterState]]:
        for name, parameter in self._engine.module.named_parameters():
            yield name, self._states.read(parameter)

    @torch.no_grad()
    def initialise(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self._engine.module.named_parameters())
        for parameter, weight in zip(parameters.values(), in_order(weights, parameters), strict=True):
            self._states.write(parameter, {"weight": weight.to(self._device)})
        self._states.publish()

    @torch.no_grad()
    def load(self, read: Callable[[str], ParameterState], state: EngineState) -> None:
        self.before_update()
        self._optimizer_steps = state.optimizer_steps
        self._states.begin(state.optimizer_steps)
        for name, parameter in self._engine.module.named_parameters():
            self._states.write(parameter, {key: tensor.to(self._device) for key, tensor in read(name).items()})
        self._states.publish()
        if self._scales_loss:
            self._loss_scale.restore(state.loss_scale, state.finite_steps)
            self._scaler.cur_scale = self._loss_scale.scale

    def state(self) -> EngineState:
        if not self._scales_loss:
            return EngineState(self._optimizer_steps)
        return EngineState(self._optimizer_steps, self._loss_scale.scale, self._loss_scale.finite_steps)
