"""Evaluation: teacher and grafts on the same seeds, windows and noise; metrics and report.html."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.data import source
from uva_jax.eval import actions, report, video
from uva_jax.eval.rollout import RolloutPool, RolloutResult, bootstrap_ci, paired_difference
from uva_jax.models import diffusion, surgery
from uva_jax.models.encoding import encode_in_parts
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import read_metrics
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.runtime.settings import leaves, section
from uva_jax.storage.identity import read_json, write_json

ENCODE_FRAMES = 16  # frames the VAE takes at a time: what fits a CPU's cache


class Actor:
    """A policy as `RolloutPool` calls it.

    Neighbouring observations share frames, so the VAE's moments of those are kept from call to
    call; the VAE's sampling noise is drawn anew for every call, as in `Policy.predict_action`.
    Noise depends on (seed, call) alone, so two actors with one `noise_seed` see the same.
    """

    def __init__(self, policy: Policy, sampling_steps: str = "", noise_seed: int = 0):
        """`sampling_steps` are those of the action head; "": the policy's own."""
        self.load(policy)
        graph, head = nnx.graphdef(policy), policy.config.action_head
        steps = sampling_steps or head.sampling_steps
        draws = len(diffusion.make_schedule(steps, 1000)) + 1

        @jax.jit
        def encode(variables, frames):
            n, f = frames.shape[:2]
            flat = frames.reshape(n * f, *frames.shape[2:])
            moments = encode_in_parts(nnx.merge(graph, variables), flat, ENCODE_FRAMES)
            return tuple(x.reshape(n, f, *x.shape[1:]) for x in moments)

        @jax.jit
        def act(variables, mean, logvar, seed_index, call_index):
            policy = nnx.merge(graph, variables)
            base = jax.random.fold_in(jax.random.key(noise_seed), call_index)
            keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(base, i)))(seed_index)
            eps = jax.vmap(lambda k: jax.random.normal(k, policy.latent_shape(1)[1:]))(keys[:, 0])
            shape = (draws, head.n_actions, head.channels)
            noise = jax.vmap(lambda k: jax.random.normal(k, shape), out_axes=1)(keys[:, 1])
            z = policy.video_tokens(policy.vae.sample(mean, logvar, eps))
            nactions = policy.action_head.sample(
                z, noise=noise, temperature=policy.config.temperature, sampling_steps=steps
            )
            actions = policy.unnormalize("action", nactions)
            return actions[:, : policy.config.n_action_steps]

        self._encode, self._act = encode, act

    def load(self, policy: Policy) -> None:
        """Takes the parameters of another policy of the same architecture."""
        self.variables = nnx.state(policy)
        self._frames = self._moments = None

    def __call__(
        self, obs: Mapping[str, np.ndarray], seed_index: np.ndarray, call_index: int
    ) -> np.ndarray:
        frames = obs["image"]
        kept = frames.shape[1] // 2
        if self._frames is not None and np.array_equal(self._frames[:, -kept:], frames[:, :kept]):
            new = self._encode(self.variables, frames[:, kept:])
            self._moments = tuple(
                jnp.concatenate([old[:, -kept:], x], axis=1)
                for old, x in zip(self._moments, new, strict=True)
            )
        else:
            self._moments = self._encode(self.variables, frames)
        self._frames = frames
        actions = self._act(self.variables, *self._moments, seed_index, call_index)
        return np.asarray(actions)


def run(
    context,
    policies: Mapping[str, Policy],
    windows: tuple[source.WindowReader, source.Strips] | None,
) -> dict:
    """Judges every policy, writes metrics.json, videos and report.html; resumes by policy.

    Args:
      context: of the stage.
      policies: "teacher", "graft_stage1" and "graft".
      windows: held-out windows on which actions are compared, or None.

    Raises:
      UserError: the simulator cannot give what the policy observes.
    """
    options = section(context.config.evaluate, EvaluateOptions)
    metrics: dict = {name: {} for name in policies}
    if windows is not None:
        for name, policy in policies.items():
            metrics[name]["actions"] = _act(context, name, policy, *windows, options)
    seeds = list(range(options.start_seed, options.start_seed + options.num_seeds))
    seeds = seeds if options.simulator else []
    recorded = seeds[: options.videos]
    if seeds:
        if source.WindowSpec.of(policies["teacher"].config).more_than_images:
            raise UserError(
                f"config.evaluate.simulator={options.simulator!r} shows a policy images alone, but "
                "this one takes more: set it to ''"
            )
        _roll_out_all(context, policies, metrics, seeds, recorded, options)
    write_json(context.folder / "metrics.json", metrics)
    path = report.write_report(
        context.folder / "report.html", report_data(context, policies, metrics, seeds, recorded)
    )
    context.metrics.say(f"report: {path}")
    result = {k: v for k, v in metrics.items() if k.startswith("paired")}
    for name in policies:
        found = metrics[name]
        result[name] = found["test_mean_score"] if seeds else found.get("actions", {}).get("mse")
    return result


def _act(context, name, policy, reader, strips, options: EvaluateOptions) -> dict:
    """Action figures of one policy; kept for a run that goes on."""
    path = context.folder / f"actions_{name}.json"
    found = read_json(path)
    if found is None:
        samples, truth = actions.sample_actions(
            policy,
            reader,
            strips,
            draws=options.draws,
            sampling_steps=options.sampling_steps,
            seed=options.noise_seed,
        )
        found = {"windows": len(strips)} | actions.action_figures(samples, truth)
        write_json(path, found)
    context.metrics.say(
        f"{name}: on {found['windows']} held-out windows, action MSE {found['mse']:.5f}, "
        f"mAP {found['map']:.3f}"
    )
    return found


def _roll_out_all(context, policies, metrics: dict, seeds, recorded, options) -> None:
    """Adds the scores of every policy, and the paired differences, to `metrics`."""
    fix_goal = options.simulator != "pusht_multitask"
    with RolloutPool(options.workers or None, fix_goal=fix_goal) as pool:
        for name, policy in policies.items():
            found = read_json(context.folder / f"{name}.json")
            if found is None:
                found = _rollout(context, pool, name, policy, seeds, recorded, options)
                write_json(context.folder / f"{name}.json", found)
            metrics[name] |= found
            context.metrics.say(
                f"{name}: test_mean_score {found['test_mean_score']:.3f} "
                f"(95% CI {found['ci95'][0]:.3f} to {found['ci95'][1]:.3f}), "
                f"success {found['success_rate']:.0%}, in {found['seconds']:.0f} s"
            )
    for name, label in (
        ("graft", "paired_difference"),
        ("graft_stage1", "paired_difference_stage1"),
    ):
        interval = paired_difference(
            np.array(metrics[name]["scores"]), np.array(metrics["teacher"]["scores"])
        )
        metrics[label] = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
        context.metrics.say(
            f"{name} - teacher: {interval.mean:+.3f} (95% CI {interval.low:+.3f} to "
            f"{interval.high:+.3f}) on the same seeds and noise"
        )
    _side_by_side(context.folder, recorded)


def _rollout(context, pool, name, policy, seeds, recorded, options: EvaluateOptions) -> dict:
    config = policy.config
    with context.metrics.progress(options.max_steps, unit="steps", desc=name) as bar:
        done = 0

        def progress(step: int, total: int) -> None:
            nonlocal done
            del total
            bar.update(step - done)
            done = step

        result: RolloutResult = pool.run(
            Actor(policy, options.sampling_steps, options.noise_seed),
            seeds,
            max_steps=options.max_steps,
            n_obs_steps=config.n_obs_steps,
            n_action_steps=config.n_action_steps,
            frame_indices=frame_indices(config.n_obs_steps, config.mar.n_frames),
            record_seeds=recorded,
            progress=progress,
        )
    folder = context.folder / "videos"
    for seed, frames in result.videos.items():
        video.write_mp4(folder / f"{name}_{seed}.mp4", frames)
        np.save(folder / f"{name}_{seed}.npy", frames)
    interval = bootstrap_ci(result.scores, seed=0)
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
    """Teacher and graft in one video a seed."""
    for seed in recorded:
        clips = [folder / "videos" / f"{name}_{seed}.npy" for name in ("teacher", "graft")]
        if all(clip.exists() for clip in clips):
            tiled = video.tile([np.load(c) for c in clips], labels=["teacher", "graft"], scale=2)
            video.write_mp4(folder / "videos" / f"seed_{seed}.mp4", tiled)
    for clip in (folder / "videos").glob("*.npy"):
        clip.unlink()


def _count(module) -> int:
    return sum(x.size for x in surgery.flatten(module).values())


def report_data(context, policies, metrics: Mapping, seeds, recorded) -> report.ReportData:
    """Gathers what the report shows from the workdir's records."""
    workdir = context.workdir
    teacher, graft = policies["teacher"], policies["graft"]
    names = {
        "convert": "teacher",
        "capture": "activations",
        "distill": "operators",
        "finetune": "finetune",
    }
    folders = {k: workdir / v for k, v in names.items() if (workdir / v).exists()}
    distilled = (read_json(workdir / "operators" / "done.json") or {}).get("metrics", {})
    curves = []
    for stage, title in (
        ("distill", "Stage 1: distillation"),
        ("finetune", "Stage 2: fine-tuning"),
    ):
        keys = sorted(
            {k for line in read_metrics(workdir, stage) for k in line} - {"time", "stage", "step"}
        )
        wanted = [k for k in keys if stage == "distill" or k in ("loss", "mse", "vb")]
        if wanted:
            curves.append({"title": title, "series": report.curve_series(workdir, stage, wanted)})
    shown = leaves(context.config)
    picked = (
        "teacher.checkpoint data.path capture.num_samples distill.epochs distill.lr head.memory "
        "head.start finetune.steps finetune.lr finetune.data_fraction evaluate.sampling_steps seed"
    ).split()
    paired = metrics.get("paired_difference")
    return report.ReportData(
        title=f"Graft of {teacher.config.task}: {context.workdir.name}",
        config={k: shown[k] for k in picked},
        stages=report.stage_rows(folders),
        architecture=[
            {
                "part": part,
                "teacher": _count(getattr(teacher, part)),
                "graft": _count(getattr(graft, part)),
            }
            for part in ("vae", "mar", "action_head")
        ],
        operators=distilled.get("operators", ()),
        curves=curves,
        scores=[
            {
                "policy": name,
                "score": metrics[name]["test_mean_score"],
                "ci": tuple(metrics[name]["ci95"]),
                "success": metrics[name]["success_rate"],
                "episodes": len(seeds),
            }
            for name in policies
            if seeds
        ],
        paired={"difference": paired["mean"], "ci": tuple(paired["ci95"])} if paired else {},
        actions=[
            {"policy": name} | metrics[name]["actions"]
            for name in policies
            if "actions" in metrics[name]
        ],
        per_seed={
            "seeds": seeds,
            "teacher": metrics["teacher"]["scores"],
            "graft": metrics["graft"]["scores"],
        }
        if seeds
        else {},
        videos=[
            {"path": path, "caption": f"seed {seed}: teacher, graft"}
            for seed in recorded
            if (path := context.folder / "videos" / f"seed_{seed}.mp4").exists()
        ],
    )
