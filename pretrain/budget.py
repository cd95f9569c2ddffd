"""Memory on the device a run got: refused before the first step where it can't fit, then held against what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pretrain import host_memory, log, memory, plan
from pretrain.errors import ConfigError
from pretrain.gpus import match_gpu
from pretrain.host_memory import PROCESS_BYTES
from pretrain.memory import COMPONENTS, RESERVE, Moment, Setup
from pretrain.plan import GB, Budget, Gpu, Speed
from pretrain.ranks import Ranks

MEASURED_AFTER_STEPS = 3  # every kind of tensor has lived by then
TIGHT = "Feasible, where others make room: see ps aux --sort=-rss"

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


@dataclass(frozen=True)
class HostPrediction:
    """The same of a run on CPUs, whose memory is the host's.

    Args:
        local_ranks: that share the host.
        free, total: bytes of the host's memory, now and at most.
    """

    setup: Setup
    local_ranks: int
    free: int
    total: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of one rank at its most, by name: those of a step, of the process, and of a checkpoint."""
        step = self._peak.components()
        return {**step, "framework": PROCESS_BYTES["cpu"], "checkpoint": host_memory.checkpoint_bytes(self.setup)}

    @property
    def _peak(self) -> Moment:
        return memory.peak(self.setup)

    @property
    def required(self) -> int:
        """Bytes of all ranks of the host."""
        return host_memory.host_bytes(self.setup, self.local_ranks, "cpu")

    @property
    def feasible(self) -> bool:
        """Whether it fits, where nothing else is in memory: most of what is taken now can be put aside."""
        return self.required <= self.total

    def to_json(self) -> dict[str, Any]:
        """As it stands in metadata.json; GB of 10^9 bytes, the parts those of one rank."""
        sizes = {"required_gb": self.required, "free_gb": self.free, "total_gb": self.total}
        tree = {
            "ranks_of_the_host": self.local_ranks,
            "components_gb": {name: round(size / GB, 3) for name, size in self.parts.items()},
            "peak_at": self._peak.when,
            **{name: round(size / GB, 3) for name, size in sizes.items()},
            "feasible": self.feasible,
        }
        return {"memory": tree}

    def lines(self) -> list[str]:
        """The log's table."""
        names = {**COMPONENTS, "framework": "Python, torch (assumed)", "checkpoint": "a checkpoint being written"}
        parts = [(names[name], size) for name, size in self.parts.items() if size]
        ranks = f"{self.local_ranks} ranks, " if self.local_ranks > 1 else ""
        offered = f"{self.free / GB:.2f} GB free of {self.total / GB:.2f} GB"
        verdict = "Not feasible" if not self.feasible else "Feasible" if self.required <= self.free else TIGHT
        return [
            f"Memory Requirements of one rank, fullest at {self._peak.when}:",
            *_table([*parts, ("total", sum(self.parts.values()))]),
            f"Feasibility Check: {ranks}{self.required / GB:.2f} GB of this host's {offered}: {verdict}",
        ]

    def compare(self) -> None:
        """Log the predicted peak against what this process has had in memory, before there was a checkpoint.

        No share is told: the half of it that small models have is what Python and torch take, which is assumed.
        """
        tensors, process = self._peak.total / GB, PROCESS_BYTES["cpu"] / GB
        measured = host_memory.peak_resident_bytes() / GB
        logger.info(
            "peak memory: %.2f GB of tensors predicted, and %.2f GB assumed for Python and torch; "
            "%.2f GB were resident at most, both together",
            *(tensors, process, measured),
        )


def check_memory(setup: Setup, device: torch.device, ranks: Ranks, force: bool) -> Prediction | HostPrediction:
    """Predict the run's memory, say it in the log, and refuse what can't fit. A collective.

    Args:
        force: go on, with a warning, where it can't fit.

    Raises:
        ConfigError: it can't fit; names the largest micro batch that does.
    """
    if device.type == "cpu":
        free, total = host_memory.free_bytes(), host_memory.total_bytes()
        on_host = HostPrediction(setup, ranks.local_world_size, free, total)
        _settle(on_host.lines(), on_host.feasible, lambda: _infeasible_on_host(on_host), ranks, force)
        return on_host
    name = torch.cuda.get_device_name(device)
    gpu = Gpu(name, match_gpu(name), torch.cuda.get_device_properties(device).total_memory)
    budget = plan.budget(setup, gpu)
    known = bool(gpu.peak) and plan.peak_tflops(gpu, setup.precision) > 0
    _settle(budget_lines(budget), budget.feasible, lambda: _infeasible(budget), ranks, force)
    return Prediction(budget, plan.expected_speed(setup, gpu) if known else None, device)


def _settle(lines: list[str], feasible: bool, problem: Callable[[], ConfigError], ranks: Ranks, force: bool) -> None:
    """Say it, and stop all ranks where one can't go on, unless they are forced to."""
    for line in lines:
        logger.info(line)
    if not ranks.any(not feasible):
        return
    error = (
        problem()
        if not feasible
        else ConfigError("the run fits into the memory of this rank, but not of another", "See that rank's log.")
    )
    if not force:
        raise error
    logger.warning("%s: going on, as --force asks", error.what)


def _table(parts: list[tuple[str, int]]) -> list[str]:
    return [f"  {label:<26}{size / GB:8.2f} GB" for label, size in parts]


def budget_lines(budget: Budget) -> list[str]:
    """The log's table: memory by component, and whether it fits."""
    parts = [(COMPONENTS[name], size) for name, size in budget.peak.components().items() if size]
    parts += [("framework (assumed)", budget.setup.framework), ("total", budget.required)]
    verdict = "Feasible" if budget.feasible else "Not feasible"
    share = f"{budget.required / budget.available:.1%}"
    offered = f"{budget.available / GB:.2f} GB ({budget.gpu.memory_bytes / GB:.2f} GB less {RESERVE:.0%})"
    return [
        f"Memory Requirements of one GPU, fullest at {budget.peak.when}:",
        *_table(parts),
        f"Feasibility Check: {budget.required / GB:.2f} GB of {offered}, {share}: {verdict}",
    ]


def _infeasible(budget: Budget) -> ConfigError:
    """The error of a run that can't fit, with what would."""
    what = (
        f"the run needs {budget.required / GB:.1f} GB of a GPU's memory and {budget.gpu.name} offers "
        f"{budget.available / GB:.1f} GB; the largest micro batch that fits is {budget.largest_micro_size or 'none'}"
    )
    return ConfigError(what, plan.advice(budget.setup, budget.gpu, "--force to go on anyway"))


def _infeasible_on_host(prediction: HostPrediction) -> ConfigError:
    """The same of a host."""
    setup, ranks, total = prediction.setup, prediction.local_ranks, prediction.total
    sized = [(size, host_memory.host_bytes(setup.with_micro_size(size), ranks, "cpu")) for size in setup.micro_sizes]
    largest = max((size for size, needed in sized if needed <= total), default=0)
    what = (
        f"the run needs {prediction.required / GB:.1f} GB and this host has {total / GB:.1f} GB; "
        f"the largest micro batch that fits is {largest or 'none'}"
    )
    smaller = f"--batch.micro_size {largest}" if largest else "fewer ranks or a smaller model"
    return ConfigError(what, f"Give {smaller}, or --force to go on anyway.")
