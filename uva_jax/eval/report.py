"""The report of a run: one self-contained HTML page, which loads nothing from the network.

A section without data is left out. `report_data.py` says what a page may hold; `report_html.py` has
its pieces, `report_style.py` the style sheet and `plots.py` the plots.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from uva_jax.eval import plots
from uva_jax.eval import report_html as html
from uva_jax.eval.report_data import ReportData
from uva_jax.eval.report_html import Column
from uva_jax.eval.report_style import STYLE
from uva_jax.storage.atomic import write_bytes


def write_report(path: str | os.PathLike, data: ReportData) -> Path:
    """Writes the page atomically and returns its path."""
    sections = [
        _headline(data),
        html.section("Scores", _scores(data)),
        html.section("Seed by seed", _per_seed(data.per_seed)),
        html.section("Episodes that differ most", html.videos(data.videos)),
        html.section("Score against sampling steps", _sampling(data.sampling)),
        html.section("Actions on held-out windows", _actions(data.actions)),
        html.section("Predicted video", _frames(data.frames)),
        html.section("Stage 1: operators", _operators(data)),
        html.section("Training", _curves(data.curves)),
        html.section("Cost of a call", _costs(data.costs)),
        html.section("Parameters", _architecture(data.architecture)),
        html.section("Time and memory", _stages(data.stages)),
        html.section("Configuration and hashes", _config(data)),
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
    said = ""
    if data.verdict:
        tone = data.verdict["kind"].replace(" ", "-")
        said = f'<p class="verdict {tone}">{escape(data.verdict["sentence"])}</p>'
    cards = "".join(
        f'<div class="card"><span>{escape(str(row["policy"]))}</span>'
        f"<strong>{html.score(row['score'])}</strong>"
        f"<small>{html.interval(row.get('ci'))}</small></div>"
        for row in data.scores
        if row.get("score") is not None
    )
    notes = "".join(map(html.note, data.notes))
    cards = f'<div class="cards">{cards}</div>' if cards else ""
    return f"<header><h1>{escape(data.title)}</h1>{said}{notes}{cards}</header>"


def _scores(data: ReportData) -> str:
    columns = [
        Column("Policy", "policy"),
        Column("Mean score", "score", html.score),
        Column("95 % interval", "ci", html.interval),
        Column("", "ci", html.track),
        Column("Success", "success", html.percent),
        Column("95 % interval", "success_ci", html.percent_interval),
        Column("Episodes", "episodes", html.integer),
    ]
    found = html.table(columns, data.scores)
    if data.comparisons:
        columns = [
            Column(f"Against the {data.reference}", "policy"),
            Column("Difference", "difference", html.signed),
            Column("95 % interval", "ci", html.interval),
            Column("p of success", "mcnemar", html.score),
        ]
        found += html.table(columns, data.comparisons)
        found += "".join(
            f"<p>{escape(row['verdict'])}</p>" for row in data.comparisons if row.get("verdict")
        )
    if found:
        found += html.note(
            "Score: the largest reward of an episode, 0 to 1. Differences are paired by seed and "
            "noise. Intervals in the tables: bootstrap for scores, Wilson for success, each for "
            "one look at the seeds; p: exact McNemar test. The sentences rest on a confidence "
            "sequence, which is wider because it holds however often one looks and if rare "
            "failures were not seen yet."
        )
    return found


def _per_seed(per_seed: Mapping[str, Any]) -> str:
    if not per_seed:
        return ""
    first, second = per_seed["names"]
    ordered, square = plots.paired_plots((first, second), per_seed["scores"])
    return html.figures(
        [
            (ordered, f"Both scores of every seed, in the order of the {first}’s"),
            (square, f"Above the diagonal the {second} is better"),
        ]
    )


def _sampling(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    series: dict[str, list] = {}
    for row in rows:
        point = row["steps"], row["score"], row.get("ci")
        series.setdefault(str(row["policy"]), []).append(point)
    columns = [
        Column("Policy", "policy"),
        Column("Sampling steps", "steps", html.integer),
        Column("Mean score", "score", html.score),
        Column("95 % interval", "ci", html.interval),
    ]
    plot = plots.interval_plot(series, "sampling steps", "mean score")
    return html.figures([(plot, "Mean score and interval")]) + html.table(columns, rows)


def _actions(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = [
        Column("Policy", "policy"),
        Column("Mean squared error", "mse", html.loss),
        Column("mAP", "map", html.score),
        *(Column(f"Within {t}", t, html.percent) for t in rows[0]["accuracy"]),
    ]
    return html.table(columns, [dict(row) | dict(row["accuracy"]) for row in rows]) + html.note(
        "In normalised units, against the demonstrated actions. Within d: share of steps whose "
        "distance to the demonstrated one is at most d. mAP: average precision, ranked by the "
        "spread of a policy’s samples (less is surer), averaged over d."
    )


def _frames(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = [
        Column("Policy", "policy"),
        Column("Videos", "videos", html.integer),
        Column("FVD", "fvd", lambda value: f"{value:.1f}"),
        Column("95 % interval", "ci", lambda bounds: f"{bounds[0]:.1f} to {bounds[1]:.1f}"),
        Column("video_fvd", "video_fvd", lambda value: f"{value:.1f}"),
        Column("PSNR, dB", "psnr", lambda value: f"{value:.1f}"),
        Column("SSIM", "ssim", html.score),
    ]
    return html.table(columns, rows) + html.note(
        "FVD: Fréchet video distance to the recorded future, extrapolated to unlimited data. "
        "video_fvd: upstream’s figure of 16 videos, which has a covariance of rank 15 and is only "
        "comparable with itself."
    )


def _operators(data: ReportData) -> str:
    columns = [
        Column("Operator", "operator"),
        Column("Block", "block", html.integer),
        Column("Raw loss", "raw", html.loss),
        Column("Scaled loss", "scaled", html.loss),
        Column("Shuffled input", "shuffled", html.loss),
        Column("Unexplained", "fvu", html.percent),
    ]
    found = html.table(columns, data.operators)
    if found:
        found += html.note(
            "On held-out samples. The scaled loss is the loss divided by the target’s scale. "
            "Shuffled input is the scaled loss when the operator gets the input of another "
            "sample: it is far larger for an operator that uses its input. Unexplained: share of "
            "the target’s variance."
        )
    if data.timesteps:
        plot = plots.bars_plot(data.timesteps, "timestep t", "relative error of eps")
        caption = "Distance of the graft’s predicted noise to the teacher’s after Stage 1"
        found += html.figures([(plot, caption)])
    return found


def _curves(curves: Sequence[Mapping[str, Any]]) -> str:
    return html.figures(
        [
            (
                plots.curves_plot(c["series"], c.get("ylabel", "loss"), c.get("log", True)),
                str(c["title"]),
            )
            for c in curves
            if c["series"]
        ]
    )


def _costs(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        Column("Policy", "policy"),
        Column("Time", "seconds", html.milliseconds),
        Column("Evaluations of the head", "steps", html.integer),
        Column("Head’s parameters", "parameters", html.integer),
    ]
    found = html.table(columns, rows)
    return found and found + html.note(
        "Mean time of a call for one episode, measured in the rollouts, where calls of several "
        "episodes form a batch."
    )


def _architecture(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        Column("Part", "part"),
        Column("Teacher", "teacher", html.integer),
        Column("Graft", "graft", html.integer),
    ]
    if not rows:
        return ""
    total = {key: sum(row.get(key) or 0 for row in rows) for key in ("teacher", "graft")}
    return html.table(columns, [*rows, {"part": "Total", **total}], last_is_total=True)


def _stages(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [
        Column("Stage", "name"),
        Column("State", "done", lambda done: "done" if done else "not finished", number=False),
        Column("Time", "seconds", html.seconds),
        Column("Peak memory", "memory", html.memory),
        Column("", "note"),
    ]
    if not rows:
        return ""
    total = {"name": "Total", "seconds": sum(r.get("seconds") or 0 for r in rows)}
    found = html.table(columns, [*rows, total], last_is_total=True)
    if any(row.get("memory") for row in rows):
        found += html.note("Memory of the run’s own process, or of its fullest accelerator.")
    return found


def _config(data: ReportData) -> str:
    def code(value: str) -> str:
        return f"<code>{escape(value[:12])}</code>"

    columns = [Column("Setting", "name"), Column("Value", "value")]
    rows = [{"name": name, "value": html.plain_text(value)} for name, value in data.config.items()]
    found = html.table(columns, rows)
    columns = [
        Column("Result", "name"),
        Column("Settings", "config", code, number=False),
        Column("Inputs", "inputs", code, number=False),
    ]
    if data.hashes:
        found += html.table(columns, data.hashes)
        found += html.note(
            "The first digits of SHA-256 hashes of the settings and of the inputs that each result "
            "depends on. All settings are in config.json in the run’s folder."
        )
    if data.versions:
        found += html.note(", ".join(f"{name} {of}" for name, of in data.versions.items()))
    return found
