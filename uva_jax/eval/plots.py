"""The report's plots, each drawn once for light pages and once for dark ones.

They use matplotlib's object interface with the Agg canvas, which needs no display or global state.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SERIES = {
    "light": ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#64748b"),
    "dark": ("#60a5fa", "#fbbf24", "#34d399", "#c084fc", "#f87171", "#22d3ee", "#94a3b8"),
}
_TEXT = {"light": "#334155", "dark": "#cbd5e1"}
_GRID = {"light": "#e2e8f0", "dark": "#334155"}
_SMOOTHED_FROM = 60  # from so many points on, a running mean is drawn over the faint curve


@dataclass(frozen=True)
class Plot:
    """One plot as PNG bytes for light and dark pages, with a transparent background."""

    light: bytes
    dark: bytes


def curves_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    ylabel: str = "loss",
    log: bool = True,
) -> Plot:
    """Draws values against steps.

    Args:
      series: (steps, values) by label; None values leave gaps.
      ylabel: label of the value axis.
      log: use a logarithmic axis if all values are positive.
    """
    arrays = {
        label: (np.asarray(steps, float), np.asarray(values, float))
        for label, (steps, values) in series.items()
    }
    log = log and all(np.nanmin(v, initial=np.inf) > 0 for _, v in arrays.values())

    def draw(figure: Figure, theme: str) -> None:
        axes = figure.add_subplot()
        for index, (label, (steps, values)) in enumerate(arrays.items()):
            color = _SERIES[theme][index % len(_SERIES[theme])]
            smoothed = _running_mean(values)
            marker = "o" if len(values) < 12 else None
            if len(values) >= _SMOOTHED_FROM:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(
                steps, smoothed, color=color, linewidth=1.8, marker=marker, ms=3.5, label=label
            )
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        if len(arrays) > 1:
            columns = 1 if len(arrays) <= 6 else 2
            axes.legend(frameon=False, loc="upper right", ncols=columns)

    return _render(draw, (5.4, 3.3))


def paired_plot(seeds: Sequence[int], teacher: Sequence[float], graft: Sequence[float]) -> Plot:
    """Draws both scores of every seed, joined by a line, in the order of the teacher's scores."""
    first, second = np.asarray(teacher, float), np.asarray(graft, float)
    order = np.lexsort((second, first))
    names = np.asarray(seeds)[order]
    first, second = first[order], second[order]
    position = np.arange(len(names))

    def draw(figure: Figure, theme: str) -> None:
        blue, orange, gray = (_SERIES[theme][i] for i in (0, 1, 6))
        axes, square = figure.subplots(1, 2, width_ratios=(2.6, 1))
        axes.vlines(position, first, second, color=gray, linewidth=1.2, alpha=0.7)
        axes.scatter(position, first, s=22, color=orange, marker="D", label="teacher", zorder=3)
        axes.scatter(position, second, s=24, color=blue, label="graft", zorder=3)
        axes.set_xticks(position if len(names) <= 60 else [])
        axes.set_xticklabels(names if len(names) <= 60 else [], rotation=90, fontsize=6.5)
        axes.set_xlabel("seed, ordered by the teacher's score")
        axes.set_ylabel("score")
        axes.set_xlim(-1, len(names))
        axes.legend(frameon=False, loc="lower right")
        low, high = min(first.min(), second.min()), max(1.0, first.max(), second.max())
        margin = 0.05 * (high - low)
        square.plot([low, high], [low, high], color=gray, linewidth=1, linestyle="--")
        square.scatter(first, second, s=20, color=blue, alpha=0.75)
        for limits in (square.set_xlim, square.set_ylim, axes.set_ylim):
            limits(low - margin, high + margin)
        square.set_aspect("equal")
        square.set_xlabel("teacher")
        square.set_ylabel("graft")

    return _render(draw, (10.6, 3.7))


def _running_mean(values: np.ndarray) -> np.ndarray:
    if len(values) < _SMOOTHED_FROM:
        return values
    window = np.ones(max(3, len(values) // 40))
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known, window, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def _render(draw: Callable[[Figure, str], Any], size: tuple[float, float]) -> Plot:
    pictures = {}
    for theme in ("light", "dark"):
        text, grid = _TEXT[theme], _GRID[theme]
        style = {
            "font.size": 9,
            "text.color": text,
            "axes.labelcolor": text,
            "axes.edgecolor": grid,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": grid,
            "grid.linewidth": 0.8,
            "xtick.color": text,
            "ytick.color": text,
            "xtick.minor.size": 0,
            "ytick.minor.size": 0,
        }
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=144, transparent=True)
        pictures[theme] = buffer.getvalue()
    return Plot(**pictures)
