"""The protocol between the training loop and an engine, and what engines share.

An engine yields and takes *named full fp32 tensors*. That is why a checkpoint knows neither ranks nor engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.failpoints import failpoint
from pretrain.optim import moments_of_group
from pretrain.optim_config import ADAM_MOMENTS

# Of the compute weights and of what fp8 does not multiply.
PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

# Told each phase of a step as it begins: "forward", "backward", "optimizer", and "other" when the step is over. A phase
# ends where the next one begins; with several micro-batches they come several times.
Mark = Callable[[str], None]

# Of one parameter: {"weight": …, "exp_avg": …, "exp_avg_sq": …}, or of Muon's {"weight": …, "momentum_buffer": …}, each
# fp32 and of the parameter's full shape.
ParameterState = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Args:
        loss: mean cross entropy of this rank's sequences, nats per token; a detached scalar on the device.
        grad_norm: global gradient norm before clipping; inf where the gradients were not finite.
        applied: whether the weights were updated; False where the gradients were not finite.
    """

    loss: Tensor
    grad_norm: float
    applied: bool


@dataclass(frozen=True)
class EngineState:
    """What an engine remembers between steps beside its tensors.

    Args:
        optimizer_steps: updates applied since the run began.
        loss_scale: of fp16; 0 in other precisions, which have none.
        finite_steps: finite fp16 steps since the loss scale last changed.
    """

    optimizer_steps: int = 0
    loss_scale: float = 0.0
    finite_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """As it stands in trainer_state.json."""
        return asdict(self)


def no_mark(phase: str) -> None:
    """A Mark where nobody listens."""


class Engine(Protocol):
    """What the training loop and the checkpoints ask of an engine."""

    name: str
    mark: Mark
    forward_is_collective: bool
    """Whether a forward pass gathers weights from the other ranks, which must then take part in each one."""

    states_stay: bool
    """Whether `parameter_states` yields tensors of the engine's own, which only an update or `load` changes, and not
    some that were gathered for the call."""
    before_update: Callable[[], None]
    """What the engine calls before it changes them; a keeper that is still copying puts its waiting here."""

    def train_step(self, micro_batches: Sequence[Tensor], lr: float) -> StepResult:
        """One optimizer step on this rank's micro-batches of tokens, each int64 (micro_size, seq_len + 1)."""

    def evaluate(self, tokens: Tensor) -> float:
        """Mean loss without dropout of tokens (B, seq_len + 1) of this rank alone; of all: validation_loss."""

    def parameter_states(self) -> Iterator[tuple[str, ParameterState]]:
        """Every parameter by its canonical name. A collective: every rank must go through to the end."""

    def initialise(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Begin with these: fp32 on any device, of its full shape, each parameter once in the order of the module; one
        is held at a time. A model on the meta device needs this or `load` before its first step."""

    def load(self, read: Callable[[str], ParameterState], state: EngineState) -> None:
        """Take over every parameter as `read(name)` gives it, and the state that goes with it."""

    def state(self) -> EngineState:
        """See EngineState."""


def is_skeleton(model: nn.Module) -> bool:
    """Whether a model is on the meta device: shapes without memory, and its weights are still to come."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in its compute precision on the device; a skeleton gets memory there, and never takes any elsewhere."""
    if not is_skeleton(model):
        model.to(dtype)
        return model.to(device)

    def real(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    # What to_empty does, which knows no dtype. A cast, or an empty_like, of what is on the meta device would import a
    # second's worth of modules.
    model._apply(real)
    return model


def in_order(weights: Iterable[tuple[str, Tensor]], names: Iterable[str]) -> Iterator[Tensor]:
    """The tensors of `weights`, which must be those of the names, one by one."""
    for (found, weight), name in zip(weights, names, strict=True):
        assert found == name, f"the weights of {name} were expected, those of {found} came"
        yield weight


def nothing() -> None:
    """What waits for nobody: an engine's `before_update` to begin with."""


def split_targets(tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(inputs, targets), each int64 (B, T) on the device, of windows of tokens (B, T + 1)."""
    if device.type == "cuda" and not tokens.is_cuda:
        tokens = tokens.pin_memory()  # from anywhere else the host would wait for what the GPU does before the copy
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def watched(loss: Tensor) -> Tensor:
    """The loss of one micro-batch to go backward from; every engine passes each through here.

    A loss that is not finite can have finite gradients (cross entropy's are a difference of probabilities). Here it
    makes each of them NaN: then the check of the reduced gradients leaves the update out on every rank, also where one
    rank alone had it, without a message of its own. A finite loss is multiplied by 1.
    """
    if failpoint("loss.poison"):
        loss = loss * torch.nan
    return loss * torch.where(loss.detach().isfinite(), torch.ones_like(loss), torch.nan)


@torch.no_grad()
def evaluate(module: nn.Module, tokens: Tensor, device: torch.device) -> float:
    """See Engine.evaluate."""
    was_training = module.training
    module.eval()
    inputs, targets = split_targets(tokens, device)
    loss = float(module(inputs, targets))
    module.train(was_training)
    return loss


def zero_moments(optimizer: torch.optim.Optimizer, optimizer_steps: int) -> None:
    """Give every parameter the state that the first step of torch's AdamW or Muon would create, the step count set.

    State that exists from the start can be read and written by name before any step was taken.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for moment in moments_of_group(group):
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if moments_of_group(group) == ADAM_MOMENTS:
                state["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=parameter.device)
