"""Evaluation of teacher and grafts on the same seeds, windows and noise."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uva_jax.data import source
from uva_jax.data.windows import Strips
from uva_jax.eval import actions, recall
from uva_jax.eval.acting import Language, LocalPolicy
from uva_jax.eval.recall import Recalled
from uva_jax.eval.rollout import RolloutPool, Times
from uva_jax.eval.scores import Score, ScoreFile, noise_number
from uva_jax.eval.statistics import (
    PRACTICABLE,
    mcnemar,
    mean_interval,
    paired_difference,
    verdict,
    wilson,
)
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.storage.atomic import read_json, write_json
from uva_jax.storage.identity import hash_json

FOLDER = "eval"  # of the stage, in a run's folder
MARGIN = 0.02  # loss of score that the verdict of a run accepts
# Options of `python -m uva_jax evaluate` with the names of settings.
_OPTIONS = "simulator_files max_steps sampling_steps sampler noise_seed slots".split()


def evaluate(
    policies: Mapping[str, Policy],
    windows: tuple[source.WindowReader, Strips] | None,
    options: EvaluateOptions,
    folder: Path,
    metrics: MetricsWriter,
    language: Language | None = None,
    videos: Mapping[str, Mapping] | None = None,
) -> dict:
    """Evaluates every policy; writes metrics.json and videos/. A killed run resumes by seed.

    Args:
      policies: "teacher", "graft_stage1", "graft" and, if there is one, "graft_shortened".
      windows: held-out windows on which actions are compared, or None.
      options: of rollouts and action samples.
      folder: of the stage.
      metrics: writer of progress and messages.
      language: gives the latents of the simulator's tasks, for policies that read them.
      videos: what `fvd.judge` has found for each policy; it becomes "video", and upstream's figure
        "video_fvd".

    Returns:
      the content of metrics.json: the results of each policy and, with rollouts,
      "paired_difference" and "verdict" (graft - teacher), and likewise with "_stage1" and
      "_shortened".

    Raises:
      UserError: the simulator lacks what a policy reads.
    """
    found: dict = {name: {} for name in policies}
    hashes = {name: surgery.policy_hash(policy) for name, policy in policies.items()}
    first = {content: name for name, content in reversed(hashes.items())}
    # Such as a graft that kept Stage 1's state.
    equal = {name: first[content] for name, content in hashes.items() if first[content] != name}
    distinct = {name: policy for name, policy in policies.items() if name not in equal}
    for name, other in equal.items():
        metrics.say(f"{name} is the same policy as {other}, and so are its results")
    for name, judged in (videos or {}).items():
        main = judged["cameras"]["main"]["predicted"]
        found[name] |= {"video_fvd": main["video_fvd"], "video": judged}
        metrics.say(
            f"{name}: video_fvd {main['video_fvd']:.1f}; of {judged['windows']} windows, for "
            f"unlimited data, {main['fvd_unlimited']:.1f} (95% CI {main['ci95'][0]:.1f} to "
            f"{main['ci95'][1]:.1f}); PSNR {main['psnr']:.2f} dB"
        )
    if windows is not None:
        for name, policy in distinct.items():
            found[name]["actions"] = _act(name, policy, *windows, options, folder, metrics)
        for name, other in equal.items():
            found[name]["actions"] = found[other]["actions"]
    if seeds := rollout_seeds(options):
        _roll_out_all(distinct, equal, hashes, found, seeds, options, folder, metrics, language)
    write_json(folder / "metrics.json", found)
    return found


def finished_episodes(
    folder: Path, identity: str, seeds: Sequence[int]
) -> tuple[dict[tuple[int, int], Score], Times]:
    """Returns the episodes of a policy that `evaluate` has finished in a folder, and their times.

    Args:
      folder: of the stage; it need not exist.
      identity: see `compare.Entrant`.
      seeds: of which episodes are wanted.

    Returns:
      the scores by (seed, number of the noise), and the time of an equal share for each; nothing
      and zero if the folder holds no scores of this identity.
    """
    wanted = set(seeds)
    for path in sorted(folder.glob("*.json")):
        found = read_json(path) or {}
        if found.get("identity") == identity:
            columns = ("seeds", "noise_numbers", "scores", "success", "steps")
            rows = zip(*(found[name] for name in columns), strict=True)
            scores = {row[:2]: Score(*row[2:]) for row in rows if row[0] in wanted}
            share = len(scores) / len(found["seeds"])
            times = (share * found[f"{part}seconds"] for part in ("", "policy_", "simulator_"))
            return scores, Times(*times)
    return {}, Times()


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


def say_verdict(
    found: Mapping,
    policies: Sequence[Path],
    out: Path,
    options: EvaluateOptions,
    metrics: MetricsWriter,
    more: Mapping[str, str],
) -> None:
    """Prints a verdict and, if the seeds did not decide, the command that goes on.

    Args:
      found: the verdict, from metrics.json.
      policies: folder of the reference and of the policy.
      out: folder of the command's results.
      options: of the rollouts.
      metrics: writer of messages.
      more: further options of the command by name; "": its default.
    """
    metrics.say(found["sentence"])
    if found["kind"] == "undecided":
        seen, needed = found["seeds"], found["seeds_needed"]
        # Room for twice the estimated number, which is rough; the command stops when it is decided.
        count = min(2 * (seen + needed) if needed else math.inf, seen + PRACTICABLE)
        first, usual = options.start_seed, EvaluateOptions()
        words = [word for path in policies for word in ("--policy", str(path))]
        words += ["--seeds", f"{first}:{first + math.ceil(count / 100) * 100}", "--until-decided"]
        words += ["--margin", f"{found['margin']:g}", "--simulator", options.simulator]
        given = {k: getattr(options, k) for k in _OPTIONS}
        given = {k: v for k, v in given.items() if v != getattr(usual, k)}
        for name, value in (given | {k: v for k, v in more.items() if v}).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        words += ["--out", str(out)]
        aim = "until it is decided" if needed else "all the same, for a narrower interval"
        metrics.say(f"to roll out seeds {aim}: python -m uva_jax evaluate {shlex.join(words)}")


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


def _roll_out_all(
    policies, equal, hashes, results: dict, seeds, options, folder, metrics, language
) -> None:
    """Adds the scores of every policy and the paired differences to `results`."""
    filmed = {name: equal.get(name, name) for name in ("teacher", "graft") if name in results}
    actors = {}  # of the policies that are filmed
    with RolloutPool(
        options.workers or None, simulator=options.simulator, files=options.simulator_files
    ) as pool:
        for name, policy in policies.items():
            actor = LocalPolicy(
                name,
                policy,
                pool.simulator,
                sampling_steps=options.sampling_steps,
                sampler=options.sampler,
                noise_seed=options.noise_seed,
                max_steps=options.max_steps,
                language=language,
            )
            identity = hash_json({"policy_hash": hashes[name]} | actor.settings | pool.settings)
            if name in filmed.values():
                actor = actors[name] = Recalled(actor)
            found = read_json(folder / f"{name}.json")
            if found is None:
                found = _rollout(pool, name, actor, seeds, identity, options, folder, metrics)
            (folder / f"{name}.jsonl").unlink(missing_ok=True)  # the result holds its content
            results[name] |= found
            metrics.say(
                f"{name}: test_mean_score {found['test_mean_score']:.3f} "
                f"(95% CI {found['ci95'][0]:.3f} to {found['ci95'][1]:.3f}), "
                f"success {found['success_rate']:.0%}, in {found['seconds']:.0f} s"
            )
        for name, other in equal.items():
            results[name] |= results[other]
        if options.videos and len(filmed) == 2:
            scores = [results[name]["scores"] for name in filmed]
            recall.film(
                pool,
                {name: actors[other] for name, other in filmed.items()},
                seeds,
                recall.most_different(*scores, options.videos),
                slots=options.slots,
                folder=folder / "videos",
            )
    for name, suffix, words in (
        ("graft_stage1", "_stage1", "the graft after Stage 1"),
        ("graft", "", "the graft"),
        ("graft_shortened", "_shortened", "the graft after Stage 3"),
    ):
        if name in results:
            _compare(results, name, suffix, words, metrics)


def _compare(results: dict, name: str, suffix: str, words: str, metrics) -> None:
    """Adds a policy's paired difference to the teacher, and its verdict."""
    mine, teacher = results[name], results["teacher"]
    gain = np.subtract(mine["scores"], teacher["scores"])
    interval = paired_difference(mine["scores"], teacher["scores"])
    results["paired_difference" + suffix] = {
        "mean": interval.mean,
        "ci95": [interval.low, interval.high],
        "mcnemar": mcnemar(mine["success"], teacher["success"]),
    }
    said = verdict(gain, MARGIN, policy=words, planned=len(gain))
    results["verdict" + suffix] = said.as_json()
    metrics.say(
        f"{name} - teacher: {interval.mean:+.3f} (95% CI {interval.low:+.3f} to "
        f"{interval.high:+.3f}) on the same seeds and noise"
    )


def _rollout(
    pool, name, actor: LocalPolicy | Recalled, seeds, identity: str, options, folder, metrics
) -> dict:
    """Returns the scores of one policy; stored, so that a resumed run reuses them."""
    file = ScoreFile(folder / f"{name}.jsonl")
    episodes = [(seed, noise_number(seed)) for seed in seeds]
    file.roll_out_shown(metrics, name, pool, actor, episodes, slots=options.slots)
    scores = [file.scores[episode] for episode in episodes]
    values = np.array([s.score for s in scores])
    success = [bool(s.success) for s in scores]
    interval, rate = mean_interval(values, seed=0), wilson(sum(success), len(success))
    found = {
        "test_mean_score": float(values.mean()),
        "ci95": [interval.low, interval.high],
        "success_rate": rate.mean,
        "success_ci95": [rate.low, rate.high],
        "identity": identity,
        "seeds": seeds,
        "noise_numbers": [number for _, number in episodes],
        "scores": values.tolist(),
        "success": success,
        "steps": [s.steps for s in scores],
        "seconds": file.times.total,
        "policy_seconds": file.times.policy,
        "simulator_seconds": file.times.simulator,
    }
    write_json(folder / f"{name}.json", found)
    return found
