"""What a profiler sees: phases as NVTX ranges (Nsight Systems), and a torch.profiler trace of chosen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain import log

_log = log.get(__name__)


class NvtxRanges:
    """Phases as NVTX ranges of this process; without a profiler that listens they cost next to nothing."""

    def __init__(self) -> None:
        self._open = False

    def enter(self, name: str) -> None:
        self.leave()
        torch.cuda.nvtx.range_push(name)
        self._open = True

    def leave(self) -> None:
        if self._open:
            torch.cuda.nvtx.range_pop()
        self._open = False


class TraceRanges:
    """Phases as ranges of a torch.profiler trace."""

    def __init__(self) -> None:
        self._range: Any = None

    def enter(self, name: str) -> None:
        self.leave()
        self._range = torch.profiler.record_function(name)
        self._range.__enter__()

    def leave(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None


class StepProfiler:
    """Writes a trace of some steps of this process, for https://ui.perfetto.dev or chrome://tracing.

    Args:
        steps: to trace, counted from 1; an empty range: none.
        folder: of the trace.

    Attributes:
        ranges: enter the phases here while `is_active`.
    """

    def __init__(self, steps: range, folder: Path) -> None:
        self.ranges = TraceRanges()
        self._steps = steps
        self._path = folder / f"trace-steps{steps.start}-{steps.stop - 1}.json"
        self._profiler: Any = None

    @property
    def is_active(self) -> bool:
        """Whether steps are being traced now."""
        return self._profiler is not None

    def before_step(self, step: int) -> None:
        """Begin or end the trace, where this step is the first of it or the first behind it."""
        if self.is_active and step not in self._steps:
            self.finish()
        elif not self.is_active and step in self._steps:
            if step > self._steps.start:
                _log.warning("the trace begins with step %d: the steps before it are done already", step)
            self._start()
        elif step >= self._steps.stop and self._steps:
            _log.warning("no trace: step %d is done already (log.profile)", self._steps.stop - 1)
            self._steps = range(0)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def finish(self) -> None:
        """End the trace, if one is being taken, and write it; a disk that is full costs the trace alone."""
        if self._profiler is None:
            return
        self.ranges.leave()
        profiler, self._profiler, self._steps = self._profiler, None, range(0)
        profiler.stop()
        unfinished = self._path.with_name(f".{self._path.name}")
        try:
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(self._path)  # a kill leaves no trace that is torn
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            _log.warning("no trace, %s can't be written: %s", self._path, error)
            return
        _log.info("trace of torch.profiler: %s (open it at https://ui.perfetto.dev)", self._path)
