"""The report of a run: one self-contained HTML page, which loads nothing from the network.

The caller passes plain dictionaries; a section without data is left out. `report_style.py` has the
style sheet and `plots.py` the plots.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from uva_jax.eval.plots import Plot, curves_plot, paired_plot
from uva_jax.eval.report_style import STYLE
from uva_jax.runtime.metrics import read_metrics
from uva_jax.storage.atomic import read_json, write_bytes

MAX_VIDEO_BYTES = 20 * 2**20  # of all videos of one page


@dataclass(frozen=True)
class ReportData:
    """The content of a report. Rows are dictionaries; a missing key or None is shown as a dash.

    Attributes:
      title: heading of the page.
      config: the run's main settings by name, about a dozen.
      stages: rows of `name`, `seconds`, `done` (bool), optionally `note`.
      architecture: rows of `part`, `teacher`, `graft` (numbers of parameters).
      operators: rows of `operator`, `block`, `raw`, `scaled`, `shuffled` (the scaled loss when the
        operator gets other samples' inputs), `fvu` (fraction of variance unexplained).
      curves: rows of `title`, `series` (label to (steps, values)), optionally `ylabel`, `log`.
      scores: rows of `policy`, `score`, `ci` (low, high), `success` (share), `episodes`.
      paired: `difference` (graft - teacher), `ci` (low, high).
      actions: rows of `policy`, `mse`, `map`, `accuracy` (tolerance to share); see `actions.py`.
      per_seed: `seeds`, `teacher`, `graft`, lists of equal length.
      videos: rows of `path` (an mp4, teacher and graft side by side), `caption`.
      notes: sentences shown below the heading.
    """

    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    architecture: Sequence[Mapping[str, Any]] = ()
    operators: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[Mapping[str, Any]] = ()
    paired: Mapping[str, Any] = field(default_factory=dict)
    actions: Sequence[Mapping[str, Any]] = ()
    per_seed: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def stage_rows(folders: Mapping[str, str | os.PathLike]) -> list[dict[str, Any]]:
    """Returns the rows of the stage table from the done.json of each stage's folder."""
    rows = []
    for name, folder in folders.items():
        done = read_json(Path(folder) / "done.json") or {}
        note = "resumed; time of the last run" if done.get("resumed") else ""
        row = {"name": name, "done": bool(done), "seconds": done.get("seconds"), "note": note}
        rows.append(row)
    return rows


def curve_series(
    workdir: str | os.PathLike, stage: str, names: Sequence[str]
) -> dict[str, tuple[list[int], list[float | None]]]:
    """Returns (steps, values) by name of scalars that a stage has logged.

    Args:
      workdir: holds metrics.jsonl.
      stage: name of the stage.
      names: of the scalars; those that were never logged are absent from the result.
    """
    records = read_metrics(workdir, stage)
    series = {}
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            series[name] = ([step for step, _ in points], [value for _, value in points])
    return series


def write_report(path: str | os.PathLike, data: ReportData) -> Path:
    """Writes the page atomically and returns its path.

    The page names videos that are missing or exceed MAX_VIDEO_BYTES instead of embedding them.
    """
    sections = [
        _headline(data),
        _section("Scores", _scores(data)),
        _section("Actions on held-out windows", _actions(data.actions)),
        _section("Rollouts", _videos(data.videos)),
        _section("Stage 1: operators", _operators(data.operators)),
        _section("Training", _curves(data.curves)),
        _section("Architecture", _architecture(data.architecture)),
        _section("Stages", _stages(data.stages)),
        _section("Configuration", _config(data.config)),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(data.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_bytes(path, page.encode())
    return Path(path)


def _headline(data: ReportData) -> str:
    cards = [
        (row["policy"], _score(row["score"]), _interval(row.get("ci")), "")
        for row in data.scores
        if row.get("score") is not None
    ]
    if data.paired:
        interval, verdict = _interval(data.paired.get("ci")), _verdict(data.paired)
        cards.append(("graft − teacher", _signed(data.paired["difference"]), interval, verdict))
    html = "".join(
        f'<div class="card {tone}"><span>{escape(str(name))}</span><strong>{value}</strong>'
        f"<small>{interval}</small></div>"
        for name, value, interval, tone in cards
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in data.notes)
    cards_html = f'<div class="cards">{html}</div>' if html else ""
    return f"<header><h1>{escape(data.title)}</h1>{notes}{cards_html}</header>"


def _scores(data: ReportData) -> str:
    columns = [
        _Column("Policy", "policy"),
        _Column("Test mean score", "score", _score),
        _Column("95 % interval", "ci", _interval),
        _Column("", "ci", _track),
        _Column("Success", "success", _percent),
        _Column("Episodes", "episodes", _integer),
    ]
    html = _table(columns, data.scores)
    if html and data.paired:
        html += (
            "<p>Paired on the same seeds and noise, graft − teacher: "
            f"<strong>{_signed(data.paired['difference'])}</strong>, 95 % interval "
            f"{_interval(data.paired.get('ci'))}.</p>"
        )
    if data.per_seed:
        plot = paired_plot(**{key: data.per_seed[key] for key in ("seeds", "teacher", "graft")})
        html += (
            f'<div class="wide">{_figure(plot, "Score of teacher and graft on every seed")}</div>'
        )
    return html


def _actions(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = [
        _Column("Policy", "policy"),
        _Column("Mean squared error", "mse", _loss),
        _Column("mAP", "map", _score),
        *(_Column(f"Within {t}", t, _percent) for t in rows[0]["accuracy"]),
    ]
    return _table(columns, [dict(row) | dict(row["accuracy"]) for row in rows]) + (
        '<p class="note">In normalised units, against the demonstrated actions. Within d: share of '
        "steps whose distance to the demonstrated one is at most d. mAP: average precision, "
        "ranked by the spread of a policy’s samples (less is surer), averaged over d.</p>"
    )


def _operators(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        _Column("Operator", "operator"),
        _Column("Block", "block", _integer),
        _Column("Raw loss", "raw", _loss),
        _Column("Scaled loss", "scaled", _loss),
        _Column("Shuffled input", "shuffled", _loss),
        _Column("Unexplained variance", "fvu", _percent),
    ]
    if not rows:
        return ""
    return _table(columns, rows) + (
        '<p class="note">On held-out samples. The scaled loss is the loss divided by the target’s '
        "scale. Shuffled input is the scaled loss when the operator gets the input of another "
        "sample: it is far larger for an operator that uses its input.</p>"
    )


def _curves(curves: Sequence[Mapping[str, Any]]) -> str:
    figures = [
        _figure(
            curves_plot(c["series"], c.get("ylabel", "loss"), c.get("log", True)), str(c["title"])
        )
        for c in curves
        if c["series"]
    ]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _architecture(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        _Column("Part", "part"),
        _Column("Teacher parameters", "teacher", _integer),
        _Column("Graft parameters", "graft", _integer),
    ]
    if not rows:
        return ""
    total = {key: sum(row.get(key) or 0 for row in rows) for key in ("teacher", "graft")}
    return _table(columns, [*rows, {"part": "Total", **total}], last_is_total=True)


def _stages(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        _Column("Stage", "name"),
        _Column("State", "done", lambda done: "done" if done else "not finished", number=False),
        _Column("Time", "seconds", _seconds),
    ]
    if any(row.get("note") for row in rows):
        columns.append(_Column("", "note"))
    if not rows:
        return ""
    total = {"name": "Total", "done": None, "seconds": sum(r.get("seconds") or 0 for r in rows)}
    return _table(columns, [*rows, total], last_is_total=True)


def _config(config: Mapping[str, Any]) -> str:
    rows = [{"name": name, "value": _plain_text(value)} for name, value in config.items()]
    return _table([_Column("Name", "name"), _Column("Value", "value")], rows)


def _videos(videos: Sequence[Mapping[str, Any]]) -> str:
    figures, left_out, spent = [], [], 0
    for video in videos:
        path, caption = Path(video["path"]), escape(str(video.get("caption", "")))
        size = path.stat().st_size if path.exists() else None
        if size is None or spent + size > MAX_VIDEO_BYTES:
            why = "missing" if size is None else f"{size / 2**20:.1f} MB, not embedded"
            left_out.append(f"<li>{caption}: <code>{escape(str(path))}</code> ({why})</li>")
            continue
        spent += size
        source = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            '<figure><video controls loop muted playsinline preload="auto" '
            f'src="data:video/mp4;base64,{source}"></video><figcaption>{caption}</figcaption>'
            "</figure>"
        )
    html = f'<div class="grid">{"".join(figures)}</div>' if figures else ""
    if left_out:
        limit = f"{MAX_VIDEO_BYTES / 2**20:.0f} MB"
        html += f"<p>Not embedded, because a page holds at most {limit} of videos:</p>"
        html += f"<ul>{''.join(left_out)}</ul>"
    return html


@dataclass(frozen=True)
class _Column:
    """A column: heading, key of the row, and how a value becomes HTML (default: escaped)."""

    heading: str
    key: str
    show: Callable[[Any], str] | None = None
    number: bool = True  # right-aligned, if `show` is given

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return "–" if self.heading else ""
        return self.show(value) if self.show else escape(str(value))

    @property
    def css(self) -> str:
        return ' class="n"' if self.show and self.number else ""


def _table(
    columns: Sequence[_Column], rows: Sequence[Mapping[str, Any]], last_is_total: bool = False
) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col"{c.css}>{escape(c.heading)}</th>' for c in columns)
    body = []
    for index, row in enumerate(rows):
        total = ' class="total"' if last_is_total and index == len(rows) - 1 else ""
        cells = "".join(f"<td{c.css}>{c.cell(row)}</td>" for c in columns)
        body.append(f"<tr{total}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _section(title: str, html: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{html}</section>" if html else ""


def _figure(plot: Plot, caption: str) -> str:
    light, dark = (base64.b64encode(png).decode() for png in (plot.light, plot.dark))
    return (
        '<figure><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{light}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _score(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}".replace("-", "−")


def _verdict(paired: Mapping[str, Any]) -> str:
    low, high = paired.get("ci") or (-1.0, 1.0)
    return "better" if low > 0 else "worse" if high < 0 else "even"


def _track(bounds: Sequence[float]) -> str:
    """Draws an interval of a score on a line from 0 to 1."""
    low, high = (100 * min(max(bound, 0.0), 1.0) for bound in bounds)
    return f'<span class="track"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i></span>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _integer(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _loss(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.2e}"


def _seconds(value: float) -> str:
    minutes, seconds = divmod(value, 60)
    return f"{minutes:.0f} min {seconds:02.0f} s" if minutes else f"{seconds:.1f} s"


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
