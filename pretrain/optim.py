"""Parameter groups, AdamW, Muon, the learning rate's course, and the dynamic loss scale of fp16."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig
from pretrain.errors import ConfigError
from pretrain.optim_config import ADAM_MOMENTS, MUON_MOMENTS

MIN_LOSS_SCALE = 1.0
MAX_LOSS_SCALE = 2.0**24


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices, which decay, and vectors (biases, norms), which don't.

    Source: GPT-3 (arXiv 2005.14165) decays by 0.1; that vectors are spared is the practice of nanoGPT and others.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a parameter empty, and notes its shape
        (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the groups, in torch's fused form, which CPU and CUDA both have."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` asks for, over parameters by their canonical names.

    Raises:
        ConfigError: this torch has no Muon.
    """
    if config.name == "adamw":
        return build_adamw(parameter_groups(named, config.weight_decay), config)
    if not hasattr(torch.optim, "Muon"):
        what = f"optim.name is muon, which torch {torch.__version__} does not have"
        raise ConfigError(what, "Run bash setup_env.sh, or train with --optim.name adamw.")
    matrices: list[nn.Parameter] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named:
        if config.moments(name, parameter.ndim) == MUON_MOMENTS:
            matrices.append(parameter)
        else:
            others.append((name, parameter))
    return MuonAndAdamW(matrices, others, config)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for some matrices, AdamW for all else, as one.

    Muon's update is scaled to the size that AdamW's usually has (Liu et al. 2025, arXiv 2502.16982), so that both can
    take the same learning rate and the same weight decay.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[tuple[str, nn.Parameter]], config: OptimConfig
    ) -> None:
        self._muon = torch.optim.Muon(
            [{"params": matrices, "lr_ratio": config.muon_lr / config.lr or 1.0}],
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = build_adamw(parameter_groups(others, config.weight_decay), config)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})  # the same groups, not copies
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no engine has a closure
        """One step of both."""
        self._muon.step()
        self._adamw.step()


def moments_of_group(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of what the optimizer remembers of each parameter of one of its groups."""
    return MUON_MOMENTS if "ns_steps" in group else ADAM_MOMENTS


def moments(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an optimizer's state of one parameter what has the parameter's shape."""
    return {key: tensor for key, tensor in state.items() if key != "step"}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group the learning rate of a step; Muon's group in its own proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def learning_rate(optimizer_step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of the update after `optimizer_step` earlier ones.

    Linear warm-up over `warmup_steps`, then by `schedule` down to `min_lr_ratio` of the peak at `total_steps`, then
    constant. wsd stays at its peak (Hu et al. 2024, arXiv 2404.06395) until the last `cooldown_fraction` of all steps
    (1 - sqrt: Hägele et al. 2024, arXiv 2405.18392). Skipped updates are not counted, so they don't move the schedule.
    """
    if optimizer_step < config.warmup_steps:
        return config.lr * (optimizer_step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, total_steps - round(config.cooldown_fraction * total_steps))
    progress = min(1.0, max(0, optimizer_step - begin) / max(1, total_steps - begin))
    if config.schedule == "cosine":
        course = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "wsd" and config.cooldown == "sqrt":
        course = 1 - math.sqrt(progress)
    else:
        course = 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * course)


@dataclass
class LossScale:
    """Dynamic loss scale (arXiv 1710.03740, section 3.2): halve on overflow, double after `window` finite steps."""

    scale: float
    window: int
    finite_steps: int = 0

    def update(self, finite: bool) -> None:
        """Learn from one step whether its unscaled gradients were finite."""
        if not finite:
            self.scale = max(MIN_LOSS_SCALE, self.scale / 2)
            self.finite_steps = 0
            return
        self.finite_steps += 1
        if self.finite_steps == self.window:
            self.scale = min(MAX_LOSS_SCALE, self.scale * 2)
            self.finite_steps = 0

    def restore(self, scale: float, finite_steps: int) -> None:
        """Go on from a checkpoint; one of another precision has no scale, it says 0, and the first one stays."""
        if scale:
            self.scale, self.finite_steps = scale, finite_steps
