"""The report of `python -m uva_jax evaluate`: the page of a comparison of any policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from uva_jax.eval.report import write_report
from uva_jax.eval.report_data import ReportData
from uva_jax.runtime.respacing import TRAIN_STEPS, space_timesteps


def write_comparison_report(path: Path, results: Mapping) -> Path:
    """Writes the page from the content of results.json; returns its path.

    Args:
      path: of the page.
      results: "seeds", "draws", and what `Comparison.figures` ("policies") and
        `Comparison.verdicts` ("comparisons") return.
    """
    results = _with_short_names(results)
    figures, compared = results["policies"], results["comparisons"]
    both, labels = figures[:2], [row["label"] for row in figures]
    names = " and ".join(labels) if len(labels) <= 2 else f"{len(labels)} policies"
    data = ReportData(
        title=f"Comparison of {names}",
        verdict=compared[0]["verdict"] if compared else {},
        scores=[
            {
                "policy": row["label"],
                "score": row["mean"],
                "ci": row["ci95"],
                "success": row["success_rate"],
                "success_ci": row["success_ci95"],
                "episodes": len(row["scores"]) * results["draws"],
            }
            for row in figures
        ],
        reference="first policy",
        comparisons=[
            {
                "policy": row["label"],
                "difference": row["paired_difference"],
                "ci": row["ci95"],
                "mcnemar": row["mcnemar"],
                # The first one's stands at the top of the page.
                "verdict": row["verdict"]["sentence"] if index else None,
            }
            for index, row in enumerate(compared)
        ],
        sampling=_sampling(figures),
        per_seed={
            "names": ("first policy", "second policy"),
            "scores": tuple(row["scores"] for row in both),
        }
        if len(both) == 2
        else {},
        config=_settings(results),
    )
    return write_report(path, data)


def short_names(policies: Sequence[str]) -> dict[str, str]:
    """Returns each policy's name, for paths without the folders that begin or end all paths."""
    parts = {p: p.split("/") for p in policies if "/" in p and "://" not in p}
    while len(parts) > 1 and all(len(words) > 1 for words in parts.values()):
        if len({words[0] for words in parts.values()}) == 1:
            parts = {policy: words[1:] for policy, words in parts.items()}
        elif len({words[-1] for words in parts.values()}) == 1:
            parts = {policy: words[:-1] for policy, words in parts.items()}
        else:
            break
    return {policy: "/".join(parts.get(policy, [policy])) for policy in policies}


def _with_short_names(results: Mapping) -> dict:
    """Returns the results with short names in labels and sentences."""
    short = short_names([row["policy"] for row in results["policies"]])
    # The full names are kept in the table of settings.
    longest_first = sorted(short, key=len, reverse=True)

    def shortened(text: str) -> str:
        for policy in longest_first:
            text = text.replace(policy, short[policy])
        return text

    policies = [
        row | {"label": shortened(row["label"]), "short": short[row["policy"]]}
        for row in results["policies"]
    ]
    comparisons = [
        row
        | {
            "label": shortened(row["label"]),
            "verdict": row["verdict"] | {"sentence": shortened(row["verdict"]["sentence"])},
        }
        for row in results["comparisons"]
    ]
    return {**results, "policies": policies, "comparisons": comparisons}


def _sampling(figures) -> list[dict]:
    """Returns the rows of the policies that sampled in several numbers of steps."""
    rows = [
        {
            "policy": f"{row['short']}, {row['sampler']}",
            "steps": len(space_timesteps(TRAIN_STEPS, row["sampling_steps"])),
            "score": row["mean"],
            "ci": row["ci95"],
        }
        for row in figures
        if row.get("sampling_steps")
    ]
    steps: dict[str, set[int]] = {}
    for row in rows:
        steps.setdefault(row["policy"], set()).add(row["steps"])
    return [row for row in rows if len(steps[row["policy"]]) > 1]


def _settings(results: Mapping) -> dict:
    """Returns what all policies have in common, and the rest by policy."""
    seeds, figures = results["seeds"], results["policies"]
    found = {"seeds": f"{len(seeds)}, {min(seeds)} to {max(seeds)}", "draws": results["draws"]}
    common = ("simulator", "max_steps", "noise_seed")
    found |= {key: figures[0][key] for key in common if key in figures[0]}
    own = ("sampling_steps", "sampler", "precision", "policy_hash")
    for number, row in enumerate(figures, 1):
        found |= {f"policy {number}": row["policy"]}
        found |= {f"policy {number}, {key}": row[key] for key in own if row.get(key)}
    return found
