"""Benchmark tasks by lm-eval-harness (Gao et al. 2021), an extra that is imported only when tasks are asked for."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, StorageError
from pretrain.hf_config import DTYPES

INSTALL = "pip install -r requirements.txt -r requirements-eval.txt"


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task.

    Args:
        filter: which of the answer's readings it is of; "none" for most tasks.
        stderr: standard error; None where the task has none.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None


def check_harness() -> None:
    """Raises ConfigError where lm-eval-harness is not installed; it takes a second less than importing it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval-harness, which is not installed", f"Install it: {INSTALL}")


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    task_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    device: str,
    dtype: str,
) -> list[TaskFigure]:
    """Benchmark tasks by lm-eval-harness, whose data sets are downloaded where they are not on this machine.

    Args:
        folder: a model in the layout of Hugging Face, with its tokenizer.
        tasks: names that the harness knows.
        task_path: a folder with the YAML of more tasks.
        limit: the first so many documents of each task; None: all.
        num_fewshot: examples before each question; None: as the task says.
        device: cpu or cuda.
        dtype: fp32, bf16 or fp16.

    Raises:
        ConfigError: the harness is not installed, or there is no such task.
        StorageError: a data set can't be had.
    """
    check_harness()
    lm_eval: Any = importlib.import_module("lm_eval")
    task_manager: Any = importlib.import_module("lm_eval.tasks").TaskManager
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the results
        manager = task_manager(include_path=str(task_path) if task_path else None)
        check_tasks(tasks, manager.all_tasks)
        try:
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": DTYPES[dtype]},
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                device=device,
                limit=limit,
                log_samples=False,
                task_manager=manager,
            )
        except OSError as error:  # the hub's and the network's errors are OSErrors, too
            what = f"a data set of {', '.join(tasks)} can't be had: {error}"
            raise StorageError(what, "Check the network, or give tasks with local files: --task_path") from error
    return task_figures(found["results"])


def check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError naming every task that the harness doesn't know, and its nearest."""
    problems = []
    for task in tasks:
        if task not in known:
            near = ", ".join(difflib.get_close_matches(task, known, 3))
            problems.append(f"lm-eval-harness knows no task {task!r}" + (f"; near are {near}" if near else ""))
    if problems:
        raise ConfigError(problems, "Tasks of your own: --task_path")


def task_figures(results: dict[str, dict[str, Any]]) -> list[TaskFigure]:
    """The figures among the harness's results, whose keys are `metric,filter` and `metric_stderr,filter`."""
    figures = []
    for task, tree in results.items():
        for key, value in tree.items():
            metric, comma, reading = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = tree.get(f"{metric}_stderr,{reading}")
            error = float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None
            figures.append(TaskFigure(task, metric, reading, float(value), error))
    return figures
