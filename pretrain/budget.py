"""Memory on the GPU a run got: refused before the first step where it can't fit, then held against what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrain import log, plan
from pretrain.errors import ConfigError
from pretrain.gpus import match_gpu
from pretrain.memory import COMPONENTS, RESERVE, Setup
from pretrain.plan import GB, Budget, Gpu, Speed
from pretrain.ranks import Ranks

MEASURED_AFTER_STEPS = 3  # every kind of tensor has lived by then

logger = log.get(__name__)


@dataclass(frozen=True)
class Prediction:
    """What this process predicted before its first step.

    Args:
        speed: None where nothing is known of the GPU's rate.
    """

    budget: Budget
    speed: Speed | None
    device: torch.device

    def to_json(self) -> dict[str, Any]:
        """As it stands in metadata.json."""
        tree: dict[str, Any] = {"memory": self.budget.to_json()}
        if self.speed is not None:
            tokens_per_second = round(self.speed.tokens_per_second)
            tree |= {"tokens_per_second": tokens_per_second, "mfu": self.speed.mfu, "mfu_source": self.speed.source}
        return tree

    def compare(self) -> None:
        """Log the predicted peak against the one that torch's allocator measured."""
        predicted, measured = self.budget.peak.total, torch.cuda.max_memory_allocated(self.device)
        off = predicted / measured - 1
        logger.info(
            "peak memory: %.2f GB predicted, %.2f GB measured (%+.1f %%)", predicted / GB, measured / GB, off * 100
        )


def check_memory(setup: Setup, device: torch.device, ranks: Ranks, force: bool) -> Prediction | None:
    """Predict the run's memory, say it in the log, and refuse what can't fit. A collective on GPUs.

    Args:
        force: go on, with a warning, where it can't fit.

    Returns:
        The prediction; None on a CPU, where nothing is refused.

    Raises:
        ConfigError: it can't fit; names the largest micro batch that does.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    gpu = Gpu(name, match_gpu(name), torch.cuda.get_device_properties(device).total_memory)
    budget = plan.budget(setup, gpu)
    known = bool(gpu.peak) and plan.peak_tflops(gpu, setup.precision) > 0
    for line in budget_lines(budget):
        logger.info(line)
    if ranks.any(not budget.feasible):
        problem = _infeasible(budget)
        if not force:
            raise problem
        logger.warning("%s: going on, as --force asks", problem.what)
    return Prediction(budget, plan.expected_speed(setup, gpu) if known else None, device)


def budget_lines(budget: Budget) -> list[str]:
    """The log's table: memory by component, and whether it fits."""
    parts = [(COMPONENTS[name], size) for name, size in budget.peak.components().items() if size]
    parts += [("framework (assumed)", budget.setup.framework), ("total", budget.required)]
    verdict = "Feasible" if budget.feasible else "Not feasible"
    share = f"{budget.required / budget.available:.1%}"
    offered = f"{budget.available / GB:.2f} GB ({budget.gpu.memory_bytes / GB:.2f} GB less {RESERVE:.0%})"
    return [
        f"Memory Requirements of one GPU, fullest at {budget.peak.when}:",
        *(f"  {label:<26}{size / GB:8.2f} GB" for label, size in parts),
        f"Feasibility Check: {budget.required / GB:.2f} GB of {offered}, {share}: {verdict}",
    ]


def _infeasible(budget: Budget) -> ConfigError:
    """The error of a run that can't fit, with what would."""
    if budget.feasible:
        return ConfigError("the run fits into this GPU's memory, but not into another rank's", "See that rank's log.")
    what = (
        f"the run needs {budget.required / GB:.1f} GB of a GPU's memory and {budget.gpu.name} offers "
        f"{budget.available / GB:.1f} GB; the largest micro batch that fits is {budget.largest_micro_size or 'none'}"
    )
    return ConfigError(what, plan.advice(budget.setup, budget.gpu, "--force to go on anyway"))
