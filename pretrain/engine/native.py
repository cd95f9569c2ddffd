"""The native engine: plain torch, one process or data parallel, with fp32 master weights in every precision.

Gradients are accumulated in fp32 over the micro-batches and averaged over the ranks once a step, bucket by bucket while
the last micro-batch's backward pass still runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pretrain.config import EngineConfig, OptimConfig
from pretrain.engine.base import (
    PRECISION_DTYPES,
    EngineState,
    Mark,
    ParameterState,
    StepResult,
    evaluate,
    in_order,
    no_mark,
    nothing,
    placed,
    split_targets,
    watched,
    zero_moments,
)
from pretrain.engine.reduction import Reducer
from pretrain.optim import LossScale, build_optimizer, moments, set_learning_rate


class NativeEngine:
    """A model under plain torch; see engine.base.Engine for the methods.

    Args:
        model: the model, in fp32, on any device; or a skeleton of it.
        precision: fp32, bf16 or fp16.
        world_size: ranks that share the step.
    """

    forward_is_collective = False
    states_stay = True

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        engine: EngineConfig,
        precision: str,
        device: torch.device,
        world_size: int,
    ) -> None:
        self.name: str = (
            "native" if engine.name == "deepspeed" else engine.name
        )  # it stands in where DeepSpeed can't run
        self.before_update: Callable[[], None] = nothing
        self.mark: Mark = no_mark
        self._device = device
        self._clip = optim.clip
        # Masters come first, so that they keep what the cast to half precision would round away.
        self._masters = {
            name: nn.Parameter(master_of(parameter, device)) for name, parameter in model.named_parameters()
        }
        self._master_list = list(self._masters.values())
        self._module = placed(model, device, PRECISION_DTYPES[precision])
        self._parameters: list[Tensor] = list(self._module.parameters())
        self._optimizer = build_optimizer(self._masters.items(), optim)
        zero_moments(self._optimizer, 0)
        initial_scale = engine.initial_loss_scale if precision == "fp16" else 1.0
        self._loss_scale = LossScale(initial_scale, engine.loss_scale_window)
        self._scales_loss = precision == "fp16"
        self._optimizer_steps = 0
        self._reducer = Reducer(self._parameters, self._collect_gradient, world_size) if world_size > 1 else None

    def train_step(self, micro_batches: Sequence[Tensor], lr: float) -> StepResult:
        set_learning_rate(self._optimizer, lr)
        losses = []
        for number, tokens in enumerate(micro_batches, 1):
            self.mark("forward")
            loss = watched(self._module(*split_targets(tokens, self._device)))
            losses.append(loss.detach())
            self.mark("backward")
            if self._reducer is not None and number == len(micro_batches):
                self._reducer.start()
            (loss * (self._loss_scale.scale / len(micro_batches))).backward()
            self._collect_gradients()
        if self._reducer is not None:
            self._reducer.finish()
        self.mark("optimizer")
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self._loss_scale.scale
        applied = self._update(norm)
        self.mark("other")
        return StepResult(torch.stack(losses).mean(), norm if applied else float("inf"), applied)

    def _collect_gradients(self) -> None:
        """Move what one micro-batch left of gradients from the compute parameters to the fp32 masters."""
        for number in range(len(self._parameters)):
            self._collect_gradient(number)

    @torch.no_grad()
    def _collect_gradient(self, number: int) -> Tensor | None:
        """Move one parameter's gradient to its master; returns what the master has accumulated."""
        parameter, master = self._parameters[number], self._master_list[number]
        if parameter.grad is not None:
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None
        return master.grad

    @torch.no_grad()
    def _update(self, norm: float) -> bool:
        """Unscale, clip and step where the norm is finite; returns whether it was."""
        finite = norm < float("inf")  # False for NaN too
        if finite:
            factor = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0
            factor /= self._loss_scale.scale
            if factor != 1.0:
                torch._foreach_mul_([m.grad for m in self._masters.values() if m.grad is not None], factor)
            self.before_update()
            self._optimizer.step()
            self._publish()
            self._optimizer_steps += 1
        if self._scales_loss:
            self._loss_scale.update(finite)
        self._optimizer.zero_grad(set_to_none=True)
        return finite

    def _publish(self) -> None:
        """Round the masters to the compute parameters."""
        torch._foreach_copy_(self._parameters, [master.data for master in self._master_list])

    def evaluate(self, tokens: Tensor) -> float:
        return evaluate(self._module, tokens, self._device)

    def parameter_states(self) -> Iterator[tuple[str, ParameterState]]:
        for name, master in self._masters.items():
            yield name, {"weight": master.detach(), **moments(self._optimizer.state[master])}

    @torch.no_grad()
    def initialise(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for master, weight in zip(self._master_list, in_order(weights, self._masters), strict=True):
            master.copy_(weight)
        self._publish()

    @torch.no_grad()
    def load(self, read: Callable[[str], ParameterState], state: EngineState) -> None:
        self.before_update()
        self._optimizer_steps = state.optimizer_steps
        zero_moments(self._optimizer, state.optimizer_steps)
        for name, master in self._masters.items():
            full = read(name)
            master.copy_(full["weight"])
            for moment, tensor in moments(self._optimizer.state[master]).items():
                tensor.copy_(full[moment])
        self._publish()
        if self._scales_loss:
            self._loss_scale.restore(state.loss_scale, state.finite_steps)

    def state(self) -> EngineState:
        if not self._scales_loss:
            return EngineState(self._optimizer_steps)
        return EngineState(self._optimizer_steps, self._loss_scale.scale, self._loss_scale.finite_steps)


def master_of(parameter: Tensor, device: torch.device) -> Tensor:
    """The fp32 copy of a parameter on the device; of a skeleton's only memory for it."""
    if parameter.device.type == "meta":
        return torch.empty(parameter.shape, dtype=torch.float32, device=device)
    return parameter.detach().to(device, torch.float32, copy=True)
