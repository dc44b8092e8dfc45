"""Evaluation of teacher and grafts on the same seeds, windows and noise."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uva_jax.data import source
from uva_jax.data.windows import Strips, WindowSpec
from uva_jax.eval import actions, video
from uva_jax.eval.rollout import RolloutPool, RolloutResult
from uva_jax.eval.statistics import mean_interval, paired_difference, verdict
from uva_jax.models.actor import PolicyCall
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.storage.atomic import read_json, write_bytes, write_json

MARGIN = 0.02  # loss of score that the verdict of a run accepts


def evaluate(
    policies: Mapping[str, Policy],
    windows: tuple[source.WindowReader, Strips] | None,
    options: EvaluateOptions,
    folder: Path,
    metrics: MetricsWriter,
) -> dict:
    """Evaluates every policy; writes metrics.json and videos/. A killed run resumes by policy.

    Args:
      policies: "teacher", "graft_stage1", "graft" and, if there is one, "graft_shortened".
      windows: held-out windows on which actions are compared, or None.
      options: of rollouts and action samples.
      folder: of the stage.
      metrics: writer of progress and messages.

    Returns:
      the content of metrics.json: the results of each policy and, with rollouts,
      "paired_difference" and "verdict" (graft - teacher), and likewise with "_stage1" and
      "_shortened".

    Raises:
      UserError: the simulator does not provide the policy's observations.
    """
    found: dict = {name: {} for name in policies}
    if windows is not None:
        for name, policy in policies.items():
            found[name]["actions"] = _act(name, policy, *windows, options, folder, metrics)
    if seeds := rollout_seeds(options):
        if WindowSpec.of(policies["teacher"].config).more_than_images:
            raise UserError(
                f"config.evaluate.simulator={options.simulator!r} provides only images, but this "
                "policy observes more: set it to ''"
            )
        _roll_out_all(policies, found, seeds, options, folder, metrics)
    write_json(folder / "metrics.json", found)
    return found


def rollout_seeds(options: EvaluateOptions) -> list[int]:
    """Returns the seeds of the rollouts; none without a simulator."""
    count = options.num_seeds if options.simulator else 0
    return list(range(options.start_seed, options.start_seed + count))


def summary(found: Mapping) -> dict:
    """Returns the main result of each policy and the differences, from `evaluate`'s results."""
    result = {k: v for k, v in found.items() if k.startswith("paired")}
    result |= {k: v["sentence"] for k, v in found.items() if k.startswith("verdict")}
    for name, figures in found.items():
        if name not in result:
            result[name] = figures.get("test_mean_score", figures.get("actions", {}).get("mse"))
    return result


def say_verdict(found: Mapping, policies: Sequence[Path], metrics, start_seed: int) -> None:
    """Prints a verdict and, if the seeds did not decide, the command that goes on.

    Args:
      found: the verdict, from metrics.json.
      policies: folder of the policy and of its reference.
      metrics: writer of messages.
      start_seed: the first seed of the rollouts.
    """
    metrics.say(found["sentence"])
    if found["kind"] == "undecided":
        # Room for twice the estimated number, which is rough; the command stops when it is decided.
        count = 2 * (found["seeds"] + (found["seeds_needed"] or 500))
        chosen = " ".join(f"--policy {shlex.quote(str(path))}" for path in policies)
        metrics.say(
            f"to roll out seeds until it is decided: python -m uva_jax evaluate {chosen} "
            f"--seeds {start_seed}:{start_seed + math.ceil(count / 100) * 100} --until-decided "
            f"--margin {found['margin']:g}"
        )


def _act(name, policy, reader, strips, options: EvaluateOptions, folder, metrics) -> dict:
    """Returns action metrics of one policy; stored, so that a resumed run reuses them."""
    path = folder / f"actions_{name}.json"
    found = read_json(path)
    if found is None:
        samples, truth = actions.sample_actions(
            policy,
            reader,
            strips,
            draws=options.draws,
            sampling_steps=options.sampling_steps,
            seed=options.noise_seed,
            sampler=options.sampler,
        )
        found = {"windows": len(strips)} | actions.action_figures(samples, truth)
        write_json(path, found)
    metrics.say(
        f"{name}: on {found['windows']} held-out windows, action MSE {found['mse']:.5f}, "
        f"mAP {found['map']:.3f}"
    )
    return found


def _roll_out_all(policies, results: dict, seeds, options, folder, metrics) -> None:
    """Adds the scores of every policy and the paired differences to `results`."""
    recorded = seeds[: options.videos]
    fix_goal = options.simulator != "pusht_multitask"
    with RolloutPool(options.workers or None, fix_goal=fix_goal) as pool:
        for name, policy in policies.items():
            found = read_json(folder / f"{name}.json")
            if found is None:
                found = _rollout(pool, name, policy, seeds, recorded, options, folder, metrics)
                write_json(folder / f"{name}.json", found)
            results[name] |= found
            metrics.say(
                f"{name}: test_mean_score {found['test_mean_score']:.3f} "
                f"(95% CI {found['ci95'][0]:.3f} to {found['ci95'][1]:.3f}), "
                f"success {found['success_rate']:.0%}, in {found['seconds']:.0f} s"
            )
    teacher = np.array(results["teacher"]["scores"])
    for name, suffix, words in (
        ("graft_stage1", "_stage1", "the graft after Stage 1"),
        ("graft", "", "the graft"),
        ("graft_shortened", "_shortened", "the graft after Stage 3"),
    ):
        if name not in policies:
            continue
        scores = np.array(results[name]["scores"])
        interval = paired_difference(scores, teacher)
        results["paired_difference" + suffix] = {
            "mean": interval.mean,
            "ci95": [interval.low, interval.high],
        }
        said = verdict(scores - teacher, MARGIN, policy=words, planned=len(seeds))
        results["verdict" + suffix] = said.as_json()
        metrics.say(
            f"{name} - teacher: {interval.mean:+.3f} (95% CI {interval.low:+.3f} to "
            f"{interval.high:+.3f}) on the same seeds and noise"
        )
    _side_by_side(folder, recorded)


def _rollout(
    pool, name, policy, seeds, recorded, options: EvaluateOptions, folder, metrics
) -> dict:
    config = policy.config
    with metrics.progress(options.max_steps, unit="steps", desc=name) as bar:
        done = 0

        def progress(step: int, total: int) -> None:
            nonlocal done
            del total
            bar.update(step - done)
            done = step

        result: RolloutResult = pool.run(
            PolicyCall(policy, options.sampling_steps, options.noise_seed, options.sampler),
            seeds,
            max_steps=options.max_steps,
            n_obs_steps=config.n_obs_steps,
            n_action_steps=config.n_action_steps,
            frame_indices=frame_indices(config.n_obs_steps, config.mar.n_frames),
            record_seeds=recorded,
            progress=progress,
        )
    videos = folder / "videos"
    for seed, frames in result.videos.items():
        video.write_mp4(videos / f"{name}_{seed}.mp4", frames)
        content = io.BytesIO()  # on a full disk, np.save to a file raises an error without errno
        np.save(content, frames)
        write_bytes(videos / f"{name}_{seed}.npy", content.getvalue())
    interval = mean_interval(result.scores, seed=0)
    return {
        "test_mean_score": result.mean,
        "ci95": [interval.low, interval.high],
        "success_rate": float(result.success.mean()),
        "seeds": [int(s) for s in result.seeds],
        "scores": [float(s) for s in result.scores],
        "steps": [int(s) for s in result.steps],
        "seconds": result.seconds,
        "policy_seconds": result.policy_seconds,
    }


def _side_by_side(folder, recorded: list[int]) -> None:
    """Writes one video per seed with teacher and graft side by side."""
    for seed in recorded:
        clips = [folder / "videos" / f"{name}_{seed}.npy" for name in ("teacher", "graft")]
        if all(clip.exists() for clip in clips):
            tiled = video.tile([np.load(c) for c in clips], labels=["teacher", "graft"], scale=2)
            video.write_mp4(folder / "videos" / f"seed_{seed}.mp4", tiled)
    for clip in (folder / "videos").glob("*.npy"):
        clip.unlink()
