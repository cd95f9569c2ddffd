"""What one rank measures while it trains: phases, memory, power, and a profiler's trace where one is asked for.

    with open_telemetry(config.log, run_name, device, rank, local_rank, local_world_size) as telemetry:
        engine.mark = telemetry.mark
        telemetry.begin_step(12)
        with telemetry.phase("data_wait"):
            batch = next(stream)
        engine.train_step(...)
        telemetry.figures()         # {"data_wait_ms": 1.2, "forward_ms": 40.1, …}

The devices are read by the first rank of each node alone. `log.telemetry` false leaves all of this out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil
import torch

from pretrain import log
from pretrain.config import LogConfig, profile_steps
from pretrain.phases import A_STEP, BETWEEN_STEPS, PhaseClock, cuda_event
from pretrain.power import PowerFile, Sampler
from pretrain.profiling import NvtxRanges, StepProfiler
from pretrain.sensors import GB, CpuSensors, GpuSensors

POWER_FILE = "power.csv"
CPU = "cpu"

_log = log.get(__name__)


class Telemetry:
    """Phases and figures of one rank; a context manager, whose end closes files and ends the thread.

    Args:
        device: this rank's.
        steps_to_profile: traced by torch.profiler, counted from 1.
        folder: the run's log folder.
        sampler: of this node's devices; None on all ranks but one.
    """

    def __init__(
        self, device: torch.device, clock: PhaseClock, steps_to_profile: range, folder: Path, sampler: Sampler | None
    ) -> None:
        self._device = device
        self._clock = clock
        self._sampler = sampler
        self._profiler = StepProfiler(steps_to_profile, folder)
        self._process = psutil.Process()
        self.mark: Callable[[str], None] = clock.mark
        """Told the name of each phase as it begins; see engine.base.Mark."""
        if sampler:
            sampler.start()

    @property
    def energy_j(self) -> float | None:
        """Joules that this node's GPUs, or without any its CPU packages, have used since this began; None: unknown."""
        return self._sampler.energy_j if self._sampler else None

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The phase that a block is; see phases.PHASES."""
        return self._clock.during(name)

    def begin_step(self, step: int) -> None:
        """What comes now belongs to this step, counted from 1."""
        self._clock.begin_step(step)
        self._profiler.before_step(step)
        ranges = self._clock.ranges
        if self._profiler.is_active != (self._profiler.ranges in ranges):
            (ranges.append if self._profiler.is_active else ranges.remove)(self._profiler.ranges)

    def figures(self) -> dict[str, float]:
        """Of the steps since the last call; what is unknown on this machine is left out.

        Returns:
            data_wait_ms, forward_ms, backward_ms, optimizer_ms, each the mean of a step; checkpoint_ms, eval_ms, where
            there were any, all together; power_w, gpu_utilization or cpu_utilization, gpu_memory_gb, see
            Sampler.figures; gpu_memory_peak_gb (most that torch held on this rank's GPU at once), host_memory_gb
            (resident in this process).
        """
        steps, seconds = self._clock.take()
        figures = {f"{name}_ms": seconds[name] / max(steps, 1) * 1e3 for name in A_STEP}
        figures |= {f"{name}_ms": seconds[name] * 1e3 for name in BETWEEN_STEPS if seconds[name]}
        kind = "gpu" if self._device.type == "cuda" else CPU
        for name, value in (self._sampler.figures() if self._sampler else {}).items():
            figures[name if name == "power_w" else f"{kind}_{name}"] = value
        if self._device.type == "cuda":
            figures["gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated(self._device) / GB
        return {**figures, "host_memory_gb": self._process.memory_info().rss / GB}

    def close(self) -> None:
        """Write out what is buffered; a second call does nothing."""
        self._profiler.finish()
        sampler, self._sampler = self._sampler, None
        if sampler:
            sampler.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class NoTelemetry(Telemetry):
    """Measures nothing, and costs nothing."""

    def __init__(self) -> None:
        self.mark = lambda phase: None

    @property
    def energy_j(self) -> float | None:
        """Unknown."""
        return None

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Nothing happens around the block."""
        return contextlib.nullcontext()

    def begin_step(self, step: int) -> None:
        """Nobody counts."""

    def figures(self) -> dict[str, float]:
        """None at all."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


def open_telemetry(
    config: LogConfig, run_name: str, device: torch.device, rank: int, local_rank: int, local_world_size: int
) -> Telemetry:
    """The telemetry of a rank, as the log section wants it.

    Args:
        run_name: the folder inside `config.dir`.
        rank: of all; the trace is rank 0's.
        local_rank, local_world_size: of this node; its GPUs are those of its ranks.
    """
    if not config.telemetry:
        return NoTelemetry()
    folder, is_gpu = Path(config.dir) / run_name, device.type == "cuda"
    clock = PhaseClock(cuda_event if is_gpu else None)
    if is_gpu:
        clock.ranges.append(NvtxRanges())
    steps = profile_steps(config.profile) if rank == 0 else range(0)
    sampler = None
    if local_rank == 0:
        n_gpus = min(local_world_size, torch.cuda.device_count())  # a launcher may not say how many ranks are here
        gpus = GpuSensors([torch.device("cuda", number) for number in range(n_gpus)] if is_gpu else [])
        if gpus.problem:
            _log.warning("no utilization, power and clocks of the GPUs: %s", gpus.problem)
        # node 0's has the plain name; the others' may lie on the same disk
        name = POWER_FILE if rank == 0 else f"power-rank{rank}.csv"
        sampler = Sampler(
            [gpus.read, CpuSensors().read],
            (lambda name: name != CPU) if is_gpu else (lambda name: name == CPU),
            clock,
            PowerFile(folder / name),
        )
    return Telemetry(device, clock, steps, folder, sampler)
