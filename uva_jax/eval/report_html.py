"""Pieces of a report's HTML: tables, figures, embedded videos, and how numbers are written."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from uva_jax.eval.plots import Plot

MAX_VIDEO_BYTES = 20 * 2**20  # of all videos of one page


@dataclass(frozen=True)
class Column:
    """A column: heading, key of the row, and how a value becomes HTML (default: escaped)."""

    heading: str
    key: str
    show: Callable[[Any], str] | None = None
    number: bool = True  # right-aligned, if `show` is given

    def cell(self, row: Mapping[str, Any]) -> str:
        """Returns the HTML of a row's value; a dash if there is none."""
        value = row.get(self.key)
        if value is None:
            return "–" if self.heading else ""
        return self.show(value) if self.show else escape(str(value))

    @property
    def css(self) -> str:
        """The class of the column's cells."""
        names = ["n"] if self.show and self.number else []
        names += ["wide"] if not self.heading else []
        return f' class="{" ".join(names)}"' if names else ""


def table(
    columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], last_is_total: bool = False
) -> str:
    """Returns a table without the columns of which no row has a value; "" without rows."""
    if not rows:
        return ""
    columns = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    head = "".join(f'<th scope="col"{c.css}>{escape(c.heading)}</th>' for c in columns)
    body = []
    for index, row in enumerate(rows):
        total = ' class="total"' if last_is_total and index == len(rows) - 1 else ""
        cells = "".join(
            f'<td{c.css} data-label="{escape(c.heading)}">{c.cell(row)}</td>' for c in columns
        )
        body.append(f"<tr{total}>{cells}</tr>")
    # On a phone, a row of many columns becomes a small block; see the style sheet.
    kind = ' class="stack"' if len(columns) > 4 else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def section(title: str, html: str) -> str:
    """Returns a section with a heading; "" if it has no content."""
    return f"<section><h2>{escape(title)}</h2>{html}</section>" if html else ""


def note(text: str) -> str:
    """Returns a paragraph that explains what is above it."""
    return f'<p class="note">{escape(text)}</p>'


def figures(plots: Sequence[tuple[Plot, str]]) -> str:
    """Returns plots with captions, side by side where there is room; "" without any."""
    return _grid([figure(plot, caption) for plot, caption in plots])


def figure(plot: Plot, caption: str) -> str:
    """Returns a plot that follows the page's colours."""
    light, dark = (base64.b64encode(png).decode() for png in (plot.light, plot.dark))
    return (
        '<figure><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{light}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def videos(clips: Sequence[Mapping[str, Any]]) -> str:
    """Returns embedded videos; those that are missing or too much for one page are named.

    Args:
      clips: rows of `path` (an mp4) and `caption`; a png of the same name is what is printed.
    """
    shown, left_out, spent = [], [], 0
    for clip in clips:
        path, caption = Path(clip["path"]), escape(str(clip.get("caption", "")))
        size = path.stat().st_size if path.exists() else None
        if size is None or spent + size > MAX_VIDEO_BYTES:
            why = "missing" if size is None else f"{size / 2**20:.1f} MB, not embedded"
            left_out.append(f"<li>{caption}: <code>{escape(str(path))}</code> ({why})</li>")
            continue
        spent += size
        source = base64.b64encode(path.read_bytes()).decode()
        shown.append(
            "<figure><video controls autoplay loop muted playsinline "
            f'src="data:video/mp4;base64,{source}"></video>{_still(path)}'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    html = _grid(shown)
    if left_out:
        limit = f"{MAX_VIDEO_BYTES / 2**20:.0f} MB"
        html += f"<p>Not embedded, because a page holds at most {limit} of videos:</p>"
        html += f"<ul>{''.join(left_out)}</ul>"
    return html


def _still(clip: Path) -> str:
    """Returns the picture that stands for a clip on paper, if there is one."""
    path = clip.with_suffix(".png")
    if not path.exists():
        return ""
    source = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="paper" alt="" src="data:image/png;base64,{source}">'


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


# ---- numbers ----


def score(value: float) -> str:
    """Returns a number with three digits after the point."""
    return f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    """The same, with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Returns the bounds of an interval."""
    return "" if bounds is None else f"{score(bounds[0])} to {score(bounds[1])}"


def percent_interval(bounds: Sequence[float]) -> str:
    """Returns the bounds of an interval of a share."""
    return f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %"


def track(bounds: Sequence[float]) -> str:
    """Draws an interval of a score on a line from 0 to 1."""
    low, high = (100 * min(max(bound, 0.0), 1.0) for bound in bounds)
    return f'<span class="track"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i></span>'


def percent(share: float) -> str:
    """Returns a share in percent."""
    return f"{100 * share:.1f} %"


def integer(value: Any) -> str:
    """Returns an integer with separators, or other text as it is."""
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def loss(value: float) -> str:
    """Returns a number of any size with four or three digits."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.2e}"


def seconds(value: float) -> str:
    """Returns a duration."""
    minutes, rest = divmod(value, 60)
    return f"{minutes:.0f} min {rest:02.0f} s" if minutes else f"{rest:.1f} s"


def milliseconds(value: float) -> str:
    """Returns a duration given in seconds."""
    return f"{1000 * value:.1f}&nbsp;ms"


def memory(value: float) -> str:
    """Returns a number of bytes."""
    return f"{value / 2**30:.2f} GiB"


def plain_text(value: Any) -> str:
    """Returns a setting's value."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
