"""Curves as a picture: a PNG by matplotlib, or dots on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.curves import Curve
from pretrain.errors import ConfigError
from pretrain.files import disk_problem

MAX_DOTS = 50  # more of them hide the curve
_LOSS, _VALIDATION, _RATE, _MARK = "#1f77b4", "#d62728", "#2ca02c", "#888888"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille character, by row and column


def save_png(curve: Curve, path: Path, title: str, checkpoint_step: int) -> None:
    """Loss above, learning rate below, over the steps; the checkpoint and the restarts are marked.

    Raises:
        ConfigError: matplotlib is not installed, or it can't write a file of that name.
        StorageError: the file can't be written.
    """
    try:
        import matplotlib  # here, because it takes half a second and only pictures need it

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--save needs matplotlib, which is not installed", "Run bash setup_env.sh.") from error
    figure, panels = pyplot.subplots(2, 1, sharex=True, figsize=(10, 6.5), height_ratios=(3, 1), layout="constrained")
    _draw(curve, panels[0], panels[1], title, checkpoint_step)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ConfigError(f"--save {path}: {error}", "Name a .png, .pdf or .svg.") from error
    except OSError as error:
        if problem := disk_problem(error, path.parent):
            raise problem from error
        raise
    finally:
        pyplot.close(figure)


def _draw(curve: Curve, losses: Any, rates: Any, title: str, checkpoint_step: int) -> None:
    """The curve on two of matplotlib's axes."""
    marker = "o" if len(curve.steps) == 1 else ""
    smoothed = curve.smoothed()
    is_rough = smoothed != curve.losses
    alpha = 0.35 if is_rough else 1.0
    losses.plot(curve.steps, curve.losses, color=_LOSS, linewidth=1.0, alpha=alpha, marker=marker, label="training")
    if is_rough:
        losses.plot(curve.steps, smoothed, color=_LOSS, linewidth=1.8, label="training, smoothed")
    if curve.validation_steps:
        dots = "o" if len(curve.validation_steps) <= MAX_DOTS else ""
        validations = curve.validation_steps, curve.validation_losses
        losses.plot(*validations, color=_VALIDATION, marker=dots, markersize=4, label="validation")
    rates.plot(curve.steps, curve.learning_rates, color=_RATE, linewidth=1.5, marker=marker)
    for axes in (losses, rates):
        axes.axvline(checkpoint_step, color=_MARK, linewidth=1.2)
        for step in curve.restarts:
            axes.axvline(step, color=_MARK, linewidth=1.0, linestyle=":")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses.plot([], [], color=_MARK, linewidth=1.2, label=f"this checkpoint, step {checkpoint_step:,}")
    if curve.restarts:
        losses.plot([], [], color=_MARK, linestyle=":", label="resumed")
    losses.set(title=title, ylabel="loss (nats per token)")
    losses.legend(loc="upper right", framealpha=1.0, edgecolor="none")
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))


def draw_text(steps: Sequence[int], values: Sequence[float], title: str, width: int, height: int) -> str:
    """A curve as text: braille dots, the range of the values on the left and of the steps below.

    Args:
        steps, values: parallel and not empty; what is not finite is left out.
        width, height: of the whole in characters, the title and the axis included.
    """
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not points:
        return f"{title}: nothing to show"
    low, high = min(value for _, value in points), max(value for _, value in points)
    first, last = points[0][0], points[-1][0]
    labels = [_number(high), _number(low)]
    margin = max(map(len, labels))
    columns, rows = max(width - margin - 3, 10), max(height - 3, 3)
    lines = _braille(points, (first, last), (low, high), columns, rows)
    left = [labels[0], *[""] * (rows - 2), labels[1]]
    body = [f"{label:>{margin}} │{line}" for label, line in zip(left, lines, strict=True)]
    axis = f"{'':>{margin}} └{'─' * columns}"
    below = f"{'':>{margin}}  {first:<{columns - len(str(last))},}{last:,}"
    return "\n".join([title, *body, axis, below])


def _braille(
    points: Sequence[tuple[int, float]],
    x_range: tuple[int, int],
    y_range: tuple[float, float],
    columns: int,
    rows: int,
) -> list[str]:
    """The points, connected, in `rows` lines of `columns` characters, each of 2 × 4 dots."""
    width = max(x_range[1] - x_range[0], 1) / (2 * columns - 1)
    height = ((y_range[1] - y_range[0]) or 1.0) / (4 * rows - 1)
    dots = [(round((step - x_range[0]) / width), round((y_range[1] - value) / height)) for step, value in points]
    cells = [[0] * columns for _ in range(rows)]
    for (x, y), (to_x, to_y) in zip(dots, [*dots[1:], dots[-1]], strict=True):
        n_dots = max(abs(to_x - x), abs(to_y - y), 1)
        for dot in range(n_dots):
            column, row = round(x + (to_x - x) * dot / n_dots), round(y + (to_y - y) * dot / n_dots)
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row).rstrip() for row in cells]


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"
