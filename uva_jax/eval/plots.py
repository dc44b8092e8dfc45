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
_SIZE = (4.8, 3.1)  # inches: its text is legible on a phone
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
      log: use a logarithmic axis if all values are positive and span a decade.
    """
    arrays = {
        label: (np.asarray(steps, float), np.asarray(values, float))
        for label, (steps, values) in series.items()
    }
    least = min(np.nanmin(v, initial=np.inf) for _, v in arrays.values())
    most = max(np.nanmax(v, initial=-np.inf) for _, v in arrays.values())
    log = log and 0 < 10 * least < most

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
            axes.legend(frameon=False, ncols=columns)

    return _render(draw)


def paired_plots(
    names: tuple[str, str], scores: tuple[Sequence[float], Sequence[float]]
) -> tuple[Plot, Plot]:
    """Draws two policies' scores on the same seeds, in the same order.

    Returns:
      both scores of every seed, joined by a line, in the order of the first policy's scores; and
      the second's scores against the first's.
    """
    first, second = (np.asarray(row, float) for row in scores)
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    position = np.arange(len(first))
    low, high = min(first.min(), second.min()), max(1.0, first.max(), second.max())
    limits = low - 0.05 * (high - low), high + 0.05 * (high - low)
    size = 22 if len(first) <= 100 else 8

    def ordered(figure: Figure, theme: str) -> None:
        blue, orange, gray = (_SERIES[theme][i] for i in (0, 1, 6))
        axes = figure.add_subplot()
        axes.vlines(position, first, second, color=gray, linewidth=1.2, alpha=0.7)
        axes.scatter(position, first, s=size, color=orange, marker="D", label=names[0], zorder=3)
        axes.scatter(position, second, s=size, color=blue, label=names[1], zorder=3)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(first)} seeds, ordered by the first score")
        axes.set_ylabel("score")
        axes.set_ylim(limits)
        axes.legend(frameon=False, loc="lower right")

    def square(figure: Figure, theme: str) -> None:
        axes = figure.add_subplot()
        axes.plot([low, high], [low, high], color=_SERIES[theme][6], linewidth=1, linestyle="--")
        axes.scatter(first, second, s=size, color=_SERIES[theme][0], alpha=0.6)
        axes.set_xlim(limits)
        axes.set_ylim(limits)
        axes.set_aspect("equal")
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])

    return _render(ordered), _render(square)


def interval_plot(
    series: Mapping[str, Sequence[tuple[float, float, tuple[float, float] | None]]],
    xlabel: str,
    ylabel: str,
) -> Plot:
    """Draws points (x, y, interval of y) of each label, joined, on a logarithmic x axis."""

    def draw(figure: Figure, theme: str) -> None:
        axes = figure.add_subplot()
        for index, (label, points) in enumerate(series.items()):
            x, y, bounds = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            low, high = np.transpose(
                [(v, v) if b is None else b for v, b in zip(y, bounds, strict=True)]
            )
            spread = np.maximum([np.subtract(y, low), np.subtract(high, y)], 0)
            color = _SERIES[theme][index % len(_SERIES[theme])]
            # Labels are moved apart a little, so that their intervals do not hide each other.
            axes.errorbar(
                np.array(x) * 1.03**index,
                y,
                yerr=spread,
                color=color,
                marker="o",
                ms=4,
                capsize=3,
                label=label,
            )
        ticks = sorted({x for points in series.values() for x, _, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            axes.legend(frameon=False)

    return _render(draw)


def bars_plot(values: Mapping[str, float], xlabel: str, ylabel: str) -> Plot:
    """Draws a bar for each label."""

    def draw(figure: Figure, theme: str) -> None:
        axes = figure.add_subplot()
        bars = axes.bar(list(values), list(values.values()), color=_SERIES[theme][0], width=0.6)
        axes.bar_label(bars, fmt="{:.3g}", padding=2, color=_TEXT[theme])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return _render(draw)


def _running_mean(values: np.ndarray) -> np.ndarray:
    if len(values) < _SMOOTHED_FROM:
        return values
    window = np.ones(max(3, len(values) // 40))
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known, window, mode="same")
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def _render(draw: Callable[[Figure, str], Any]) -> Plot:
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
            figure = Figure(figsize=_SIZE, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160, transparent=True)
        pictures[theme] = buffer.getvalue()
    return Plot(**pictures)
