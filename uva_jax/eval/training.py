"""Rollouts during a policy's training, and the report of that training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax

from uva_jax.eval.report import write_report
from uva_jax.eval.report_data import ReportData, curve_series
from uva_jax.eval.rollout import RolloutPool, spec_of
from uva_jax.eval.statistics import mean_interval
from uva_jax.models.policy import Policy
from uva_jax.models.policy_call import PolicyCall
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import read_metrics
from uva_jax.runtime.sections_training import ScoreOptions
from uva_jax.runtime.settings import leaves

# averaged policy -> scalars
Score = Callable[[Policy], Mapping[str, float]]

_SHOWN = (
    "data.path data.max_episodes data.mirror pretrain.vae_training.steps pretrain.modes "
    "pretrain.steps pretrain.batch pretrain.optimizer pretrain.lr pretrain.noise_draws "
    "pretrain.readout seed"
).split()
_VAE_LOSSES = ("l1", "l2", "edge", "readout")


@contextmanager
def scorer(options: ScoreOptions, say: Callable[[str], None]) -> Iterator[Score | None]:
    """Yields a function that scores policies in gym-pusht, always on the same seeds and noise.

    The score is `test_mean_score` on seeds that no test uses, because it may steer training.

    Yields:
      None if `options` ask for no scores; otherwise policy -> {"score": mean of the largest
      rewards in 0..1, its confidence interval, "success": share of successful episodes}.

    Raises:
      UserError: there are several processes, none of which holds the whole policy.
    """
    if not options.every:
        yield None
        return
    if jax.process_count() > 1:
        raise UserError(
            "rollouts during training need the whole policy in one process: set "
            "config.pretrain.score.every=0 and evaluate afterwards"
        )
    seeds = range(options.start_seed, options.start_seed + options.num_seeds)
    actor: PolicyCall | None = None
    with RolloutPool() as pool:

        def score(policy: Policy) -> dict[str, float]:
            nonlocal actor
            if actor is None:
                actor = PolicyCall(policy, options.sampling_steps, options.noise_seed)
            else:
                actor.load(policy)
            result = pool.run(actor, seeds, spec=spec_of(policy.config, options.max_steps))
            mean, low, high = mean_interval(result.scores, seed=0)
            success = float(result.success.mean())
            say(
                f"score {mean:.3f} (95% CI {low:.3f} to {high:.3f}), success {success:.0%}, on "
                f"{len(seeds)} seeds in {result.times.total:.0f} s"
            )
            return {"score": mean, "score_low": low, "score_high": high, "success": success}

        yield score


def write_training_report(workdir: Path, config, task: str) -> Path:
    """Writes `<workdir>/pretrain/report.html` from what the stages logged; returns its path.

    Args:
      workdir: of the run.
      config: the run's configuration.
      task: name of the policy's task, for the title.
    """
    lines = read_metrics(workdir, "pretrain")
    names = sorted({k for line in lines for k in line})
    vae = curve_series(
        workdir, "vae", [f"{part}/{k}" for part in ("vae", "decoder") for k in _VAE_LOSSES]
    )
    groups = (
        ("Video loss", _with("video_loss", names), {}),
        ("Action loss", _with("act_loss", names), {}),
        ("Readout head, mean squared error", ["policy/readout"], {}),
        (
            "Score in rollouts",
            [k for k in names if k.startswith("policy/score")],
            {"ylabel": "score", "log": False},
        ),
    )
    scored = [line for line in lines if "policy/score" in line]
    shown = leaves(config)
    data = ReportData(
        title=f"Training of {task}: {workdir.name}",
        config={k: shown[k] for k in _SHOWN},
        curves=[
            {"title": "VAE", "series": vae},
            *(
                {"title": title, "series": curve_series(workdir, "pretrain", keys), **more}
                for title, keys, more in groups
            ),
        ],
        scores=[
            {
                "policy": f"after step {line['step']}",
                "score": line["policy/score"],
                "ci": (line["policy/score_low"], line["policy/score_high"]),
                "success": line["policy/success"],
                "episodes": config.pretrain.score.num_seeds,
            }
            for line in scored[-1:]
        ],
        notes=["Scores are those of the averaged parameters, on seeds that no test uses."]
        if scored
        else [],
    )
    return write_report(workdir / "pretrain" / "report.html", data)


def _with(loss: str, names: list[str]) -> list[str]:
    return [k for k in names if k.startswith("policy/") and k.endswith(f"/{loss}")]
