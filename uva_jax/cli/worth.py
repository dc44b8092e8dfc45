"""Measures what a graft is worth, against its teacher and against simpler ways to spend the data.

    python -m uva_jax worth --config configs/pusht_tiny.py --workdir runs/tiny

The rows of the table are the teacher as it is; the teacher fine-tuned with its own head; the graft
after Stage 1; the graft fine-tuned; and the same head from random operators, fine-tuned as long.
What is fine-tuned has a row for each share of the data and each recipe. All rows are ranked by the
error of their action samples on held-out windows; the best, the teacher and the graft after Stage 1
are rolled out as well. The command writes worth/table.json and worth/table.md in the workdir; an
interrupted one resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from uva_jax.eval.evaluate import rollout_seeds
from uva_jax.eval.statistics import paired_difference
from uva_jax.pipeline import stages, worth
from uva_jax.pipeline.engine import Stage, run_pipeline
from uva_jax.pipeline.worth import HEADS, RECIPES, Cell
from uva_jax.runtime import settings
from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.guards import locked
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.runtime.settings import section
from uva_jax.storage.atomic import write_bytes, write_json

FRACTIONS = (0.01, 0.1, 0.2, 1.0)
_START = {"teacher": ("convert", "teacher"), "stage1": ("assemble", "graft after Stage 1")}
_COLUMNS = ("policy", "recipe", "data", "step", "error", "error - teacher", "score", "success")
_COLUMNS += ("score - teacher", "score - Stage 1")


def run(config: ConfigDict, workdir: Path, cells: Sequence[Cell], finalists: int) -> list[dict]:
    """Makes, ranks and rolls out the policies; writes and prints the table.

    Args:
      config: of the run in `workdir`; `evaluate` selects windows, seeds and sampling.
      workdir: its stages up to the assembled graft are shared, and run if they have not.
      cells: the fine-tuned policies.
      finalists: how many of them are rolled out, by their error.

    Returns:
      the rows of table.json.

    Raises:
      UserError: the configuration, a cell or the workdir does not fit.
    """
    checked = settings.check(config)
    if not checked.head.replace:
        raise UserError("config.head.replace is False, so there is no graft: set it to True")
    own = {cell: settings.check(worth.cell_config(config, cell)) for cell in cells}
    table = stages.stages(checked)
    run_pipeline(table, checked, workdir, [s.name for s in table if s.name in worth.SHARED])
    base = worth.shared_stages(checked)

    def bring(table: Sequence[Stage], config) -> dict:
        """Runs the stages that are not those of the workdir's run; returns their results."""
        mine = [s.name for s in table if not s.folder.startswith("..")]
        return run_pipeline(table, config, workdir / worth.FOLDER, mine)

    with locked(workdir, print):
        rows, makers = [], {}
        for name, (source, title) in _START.items():
            makers[name] = (base, source, checked)
            rows.append({"name": name, "policy": title})
        for cell, config in own.items():
            makers[cell.name] = (worth.cell_stages(checked, config, cell), cell.name, config)
            rows.append({"name": cell.name, "policy": HEADS[cell.head]})
            rows[-1] |= {"recipe": RECIPES[cell.recipe], "fraction": cell.fraction}
        for row in rows:
            made, source, config = makers[row["name"]]
            stage = worth.judged(source, row["name"])
            found = bring([*made, stage], config)
            row.update(found.get(row["name"], {}) | found[stage.name])
        ranked = sorted(rows[len(_START) :], key=lambda row: np.mean(row["errors"]))
        if rollout_seeds(section(checked.evaluate, EvaluateOptions)):
            teacher = None
            for row in [*rows[: len(_START)], *ranked[:finalists]]:
                made, source, config = makers[row["name"]]
                stage = worth.rolled_out(source, row["name"], teacher)
                more = [] if teacher is None else [teacher]
                row.update(bring([*made, *more, stage], config)[stage.name])
                teacher = teacher or stage
        rows = [*rows[: len(_START)], *ranked]
        _compare(rows)
        write_json(workdir / worth.FOLDER / "table.json", rows)
        text = markdown(rows, checked)
        write_bytes(workdir / worth.FOLDER / "table.md", text.encode())
        print(text, flush=True)
    return rows


def _compare(rows: list[dict]) -> None:
    """Adds means and paired differences to the rows, of which the first two are `_START`."""
    teacher, stage1 = rows[:2]
    for row in rows:
        row["error"] = float(np.mean(row["errors"]))
        pairs = [("error_to_teacher", "errors", teacher)] if row is not teacher else []
        if "scores" in row and row is not teacher:
            pairs.append(("score_to_teacher", "scores", teacher))
        if "scores" in row and row not in (teacher, stage1):
            pairs.append(("score_to_stage1", "scores", stage1))
        for name, values, other in pairs:
            mean, *ci = paired_difference(np.array(row[values]), np.array(other[values]))
            row[name] = {"mean": mean, "ci95": ci}


def markdown(rows: Sequence[Mapping], config) -> str:
    """Formats the table: the two policies that are not fine-tuned, then the others by their error.

    Args:
      rows: of table.json.
      config: of the run.
    """
    cells = [_COLUMNS]
    for row in rows:
        interval = [
            "" if name not in row else "{:+.3f} ({:+.3f} to {:+.3f})".format(*_numbers(row[name]))
            for name in ("score_to_teacher", "score_to_stage1")
        ]
        error = ""
        if "error_to_teacher" in row:
            error = "{:+.4f} ({:+.4f} to {:+.4f})".format(*_numbers(row["error_to_teacher"]))
        cells.append(
            (
                row["policy"],
                row.get("recipe", ""),
                f"{row['fraction']:.0%}" if "fraction" in row else "",
                f"{row['kept_step']}" if "kept_step" in row else "",
                f"{row['error']:.4f}",
                error,
                f"{row['test_mean_score']:.3f}" if "scores" in row else "",
                f"{row['success_rate']:.0%}" if "scores" in row else "",
                *interval,
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    seeds = rollout_seeds(section(config.evaluate, EvaluateOptions))
    rolled = sum("scores" in row for row in rows)
    text = (
        f"Step: the one that was kept of {config.finetune.steps}. Error: energy score of action "
        f"samples on {len(rows[0]['errors'])} held-out windows, smaller is better."
    )
    if rolled:
        text += f" Scores of {rolled} policies on {len(seeds)} seeds from {seeds[0]}."
    text += " Differences are paired, with 95% confidence intervals."
    return "\n".join([*lines, "", text, ""])


def _numbers(interval: Mapping) -> tuple[float, float, float]:
    return interval["mean"], *interval["ci95"]


def _cells(heads: Sequence[str], recipes: Sequence[str], fractions: Sequence[str]) -> list[Cell]:
    """Returns every combination of the flags' values.

    Raises:
      UserError: a value is unknown or out of range.
    """
    for flag, given, known in (("heads", heads, HEADS), ("recipes", recipes, RECIPES)):
        if wrong := [x for x in given if x not in known]:
            raise UserError(f"--{flag} names {wrong[0]!r}; it can be {', '.join(known)}")
    shares = []
    for text in fractions:
        try:
            shares.append(float(text))
        except ValueError:
            shares.append(0.0)
        if not 0 < shares[-1] <= 1:
            raise UserError(
                f"--fractions holds {text!r}; shares of the data are above 0 and at most 1"
            )
    return [
        Cell(head, recipe, share)
        for recipe in dict.fromkeys(recipes)
        for share in dict.fromkeys(shares)
        for head in dict.fromkeys(heads)
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "Configuration file (see configs/).", flag_values=values
    )
    for name, default, text in (
        ("heads", list(HEADS), "Heads to fine-tune: " + "; ".join(map(": ".join, HEADS.items()))),
        ("recipes", ["configured"], "Recipes: " + "; ".join(map(": ".join, RECIPES.items()))),
        ("fractions", [f"{x:g}" for x in FRACTIONS], "Shares of the training episodes."),
    ):
        flags.DEFINE_list(name, default, text, flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    for name, default, text in (
        ("finalists", 3, "Fine-tuned policies to roll out, those with the smallest errors."),
        ("start_seed", 400_000, "The first seed of the rollouts."),
        ("num_seeds", 200, "Seeds of the rollouts (0: no rollouts)."),
    ):
        flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)

    def command() -> int:
        try:
            values(["worth", *(sys.argv[1:] if argv is None else argv)])
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{error} (python -m uva_jax settings lists every setting)") from error
        if config.value is None or values.workdir is None:
            raise UserError("say which run to measure: --config FILE --workdir DIR")
        given = config.value
        given.evaluate.update(start_seed=values.start_seed, videos=0)
        if values.num_seeds:
            given.evaluate.num_seeds = values.num_seeds
        else:
            given.evaluate.simulator = ""
        cells = _cells(values.heads, values.recipes, values.fractions)
        run(given, Path(values.workdir), cells, values.finalists)
        return 0

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
