"""The page of a comparison of any policies."""

import numpy as np

from uva_jax.eval.compare_report import short_names, write_comparison_report
from uva_jax.eval.statistics import verdict


def results(*labels):
    rng = np.random.default_rng(0)
    figures = []
    for policy, steps in labels:
        scores = rng.beta(8, 1, 30)
        figures.append(
            {
                "label": f"{policy}, {steps} steps",
                "policy": policy,
                "sampling_steps": steps,
                "sampler": "ancestral",
                "policy_hash": "ab" * 32,
                "simulator": "pusht",
                "mean": scores.mean(),
                "ci95": [0.8, 0.9],
                "success_rate": 0.5,
                "success_ci95": [0.3, 0.7],
                "scores": scores.tolist(),
            }
        )
    first, *others = figures
    compared = [
        {
            "label": other["label"],
            "paired_difference": 0.01,
            "ci95": [-0.1, 0.1],
            "mcnemar": None,
            "verdict": verdict(
                np.subtract(other["scores"], first["scores"]), 0.02, policy=other["label"]
            ).as_json(),
        }
        for other in others
    ]
    return {
        "seeds": list(range(30)),
        "draws": 2,
        "policies": figures,
        "comparisons": compared,
    }


def test_scores_against_sampling_steps_are_shown_for_policies_with_several(tmp_path):
    found = results(("embedded", "100"), ("embedded", "ddim10"), ("other.ckpt", "2,3"))
    html = write_comparison_report(tmp_path / "report.html", found).read_text()
    assert html.index(found["comparisons"][0]["verdict"]["sentence"]) < html.index("Scores")
    assert found["comparisons"][1]["verdict"]["sentence"] in html
    section = html[html.index("Score against sampling steps") : html.index("Configuration")]
    assert section.count("embedded, ancestral") == 2 and "other.ckpt" not in section
    assert ">100</td>" in section and ">10</td>" in section
    assert "60</td>" in html  # episodes: two draws of 30 seeds
    assert "30, 0 to 29" in html and "ab" * 32 in html


def test_a_single_policy_has_scores_and_no_comparison(tmp_path):
    html = write_comparison_report(
        tmp_path / "report.html", results(("ws://localhost:1", ""))
    ).read_text()
    assert "Scores" in html and 'class="verdict' not in html
    assert "Seed by seed" not in html and "sampling steps</h2>" not in html


def test_paths_lose_the_folders_that_all_share(tmp_path):
    paths = ["/data/runs/tiny/teacher/policy", "/data/runs/tiny/finetune/policy"]
    assert list(short_names(paths).values()) == ["teacher", "finetune"]
    assert short_names(["embedded", "runs/a/policy"]) == {
        "embedded": "embedded",
        "runs/a/policy": "runs/a/policy",
    }
    assert short_names(["a/policy", "a/policy"]) == {"a/policy": "a/policy"}
    assert list(short_names(["x/a", "x/a/b", "embedded"]).values()) == ["a", "a/b", "embedded"]
    assert list(short_names(["ws://h:1", "ws://h:2"]).values()) == ["ws://h:1", "ws://h:2"]
    found = results((paths[0], "100"), (paths[1], "100"))
    html = write_comparison_report(tmp_path / "report.html", found).read_text()
    assert "<h1>Comparison of teacher, 100 steps and finetune, 100 steps</h1>" in html
    assert "whether finetune, 100 steps is worse" in html
    assert html.count(paths[0]) == 1  # among the settings
