"""Samples frames and actions for one window and compares them with the real ones.

A window is a mapping of arrays without a batch axis: an observation as `Policy.predict_action`
takes it and, if known, its future: "future_image" and "future_wrist_image" (shaped like "image")
and "action", the executed actions. The noise depends only on the seed and the window's number, so a
window's prediction does not depend on the other windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.eval.cameras import IMAGES, Camera, cameras_of, real_frames, to_uint8
from uva_jax.eval.video import psnr, ssim
from uva_jax.models.losses import ACTION_MODES, VIDEO_MODES
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import TASK_MODES, PolicyConfig
from uva_jax.models.token_sampler import masked_counts, sample_tokens
from uva_jax.runtime.errors import UserError

SCHEDULES = ("linear", "constant")
_WIDE = 3.0  # a spread of latents above that of any working video head
_NUMBERS = ("fiu", "float")  # kinds of dtypes, and their name in messages


@dataclass(frozen=True)
class Sampling:
    """Options of sampling; see `token_sampler.sample_tokens`.

    Attributes:
      mode: one of TASK_MODES.
      num_iter, guidance, schedule, temperature: of the token sampler.
      sampling_steps: steps of every diffusion loop, 1..1000; 0: each head's own number.
      sampler: of every diffusion loop; see `diffusion.sample_loop`.
      seed: of all noise.
    """

    mode: str
    num_iter: int = 1
    guidance: float = 1.0
    schedule: str = "linear"
    temperature: float = 1.0
    sampling_steps: int = 0
    sampler: str = "ancestral"
    seed: int = 0

    def check(self, policy: Policy) -> None:
        """Checks the options against a policy.

        Raises:
          UserError: an option is out of range, or the policy lacks what the mode needs.
        """
        if self.mode not in TASK_MODES:
            raise UserError(f"mode {self.mode!r} is unknown: use one of {', '.join(TASK_MODES)}")
        if self.mode in VIDEO_MODES and policy.video_head is None:
            raise UserError(
                f"{self.mode} predicts video, but this policy has no video head: "
                "choose another mode"
            )
        if policy.action_head is None and self.mode not in VIDEO_MODES:
            raise UserError(
                f"{self.mode} predicts actions, but this policy was trained for video alone and "
                f"has no action head: choose one of {', '.join(VIDEO_MODES)}"
            )
        masked_counts(policy.config.mar.tokens_per_frame, self.num_iter)
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"the guidance schedule is {self.schedule!r}; it can be {' or '.join(SCHEDULES)}"
            )
        for name in ("guidance", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}; it should be a number of at least 0")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it can be 0 to {2**32 - 1}")
        if not 0 <= self.sampling_steps <= 1000:
            raise UserError(
                f"sampling_steps is {self.sampling_steps}; it can be 1 to 1000, or 0 for the "
                "policy's own number"
            )


@dataclass(frozen=True)
class Prediction:
    """The sampled future of a window.

    Attributes:
      cameras: by name ("main", "wrist"); empty in modes without video.
      action: (n_actions, action_dim) in raw units, or None in modes without actions.
      action_mse: mean squared error in normalised units; None without actions or truth.
      latent_spread: standard deviation of the sampled latents over that of the history's latents,
        about 1 for a working video head; None in modes without video.
    """

    cameras: Mapping[str, Camera]
    action: np.ndarray | None
    action_mse: float | None
    latent_spread: float | None


def checked_window(
    config: PolicyConfig, mode: str, window: Mapping[str, np.ndarray], origin: str
) -> dict[str, np.ndarray]:
    """Returns the arrays of a window that a policy reads in a mode: images uint8, others float32.

    Args:
      config: of the policy.
      mode: one of TASK_MODES.
      window: the arrays.
      origin: where they are from, for error messages.

    Raises:
      UserError: an array is missing, has another shape or dtype, or is not finite.
    """
    c, past = config.mar, (config.n_obs_steps, config.mar.n_frames)
    widths = dict(config.normalizer_fields)
    states = config.proprio_keys if c.proprio_dim else ()
    needed = ["image"]
    needed += ["wrist_image"] if c.proprio_image else []
    needed += ["text_latents"] if c.text_dim else []
    needed += states
    needed += ["action"] if mode == "dynamic_model" else []
    if mode == "inverse_model":
        needed += ["future_image"] + (["future_wrist_image"] if c.wrist else [])
    if missing := [name for name in needed if name not in window]:
        raise UserError(
            f"{origin} lacks {', '.join(missing)}, which this policy reads in {mode}; it holds "
            f"{', '.join(window) or 'nothing'}"
        )
    actions = (c.n_actions, c.action_dim)
    shapes: dict[str, tuple] = {"action": actions}
    shapes |= {"past_action": actions} if c.history_action else {}
    shapes |= {"text_latents": (c.text_dim,)} if c.text_dim else {}
    shapes |= {name: (past, None, None, 3) for name in IMAGES}
    steps = (config.n_obs_steps, c.proprio_steps)
    shapes |= {name: (steps, widths.get(name)) for name in states}
    found = {}
    for name, shape in shapes.items():
        if name not in window:
            continue
        array, (kinds, wanted) = window[name], ("u", "uint8") if name in IMAGES else _NUMBERS
        fits = array.ndim == len(shape) and all(
            got and (n is None or got == n or (isinstance(n, tuple) and got in n))
            for got, n in zip(array.shape, shape, strict=True)
        )
        if not fits or array.dtype.kind not in kinds or (kinds == "u" and array.itemsize > 1):
            said = " x ".join("any" if n is None else _either(n) for n in shape)
            raise UserError(
                f"{name} of {origin} is {array.dtype} {array.shape}, but this policy takes "
                f"{wanted} {said}"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{name} of {origin} has values that are not finite: correct them")
        found[name] = array if name in IMAGES else np.asarray(array, np.float32)
    width = sum(window[name].shape[-1] for name in states)
    if width != c.proprio_dim:
        raise UserError(
            f"the states of {origin} ({', '.join(states)}) are {width} numbers wide, "
            f"but this policy takes {c.proprio_dim}"
        )
    return found


def _either(n) -> str:
    return " or ".join(map(str, dict.fromkeys(n))) if isinstance(n, tuple) else str(n)


def make_predictor(
    policy: Policy, sampling: Sampling, *, reconstruct: bool = True
) -> Callable[[Mapping, int], Prediction]:
    """Returns f(window, number) -> Prediction, compiled at its first call.

    Windows come from `checked_window`; `number` selects the noise. Without `reconstruct` the
    cameras have no reconstruction.

    Raises:
      UserError: see `Sampling.check`.
    """
    sampling.check(policy)
    graph, variables = nnx.split(policy)
    with_video = sampling.mode in VIDEO_MODES
    with_actions = sampling.mode in ACTION_MODES and policy.action_head is not None
    cameras = cameras_of(policy)

    @jax.jit
    def run(variables, window, number):
        policy = nnx.merge(graph, variables)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(sampling.seed), number), 4)
        obs = {name: values[None] for name, values in window.items()}
        cond, streams = policy.condition(obs, key=keys[0])
        targets = {}
        if sampling.mode == "inverse_model":
            for prefix, key in zip(cameras.values(), keys[1:3], strict=False):
                targets[prefix] = policy.encode_observation(obs[f"future_{prefix}image"], key=key)
        nactions = policy.normalize("action", obs["action"]) if "action" in obs else None
        sampled = sample_tokens(
            policy,
            cond,
            task_mode=sampling.mode,
            num_iter=sampling.num_iter,
            cfg=sampling.guidance,
            cfg_schedule=sampling.schedule,
            temperature=sampling.temperature,
            sampling_steps=str(sampling.sampling_steps) if sampling.sampling_steps else None,
            sampler=sampling.sampler,
            key=keys[3],
            target=targets.get(""),
            wrist_target=targets.get("wrist_"),
            nactions=nactions,
            streams=streams,
        )
        found: dict = {"cameras": {}}
        if with_actions:
            found["action"] = policy.unnormalize("action", sampled["actions"])[0]
            if nactions is not None:
                found["action_mse"] = jnp.mean((sampled["actions"] - nactions) ** 2)
        if with_video:
            found["latent_spread"] = jnp.std(sampled["latents"]) / jnp.std(cond)
            for name, prefix in cameras.items():
                real = real_frames(policy, obs, prefix, reconstruct)
                made = policy.decode_frames(sampled[f"{prefix}latents"])
                found["cameras"][name] = real | {"predicted": to_uint8(made[0])}
        return found

    def predict(window: Mapping[str, np.ndarray], number: int) -> Prediction:
        # The first diffusion step magnifies errors by 1e4 and more: no reduced precision here.
        with jax.default_matmul_precision("highest"):
            found = jax.tree.map(np.asarray, run(variables, window, number))
        numbers = {k: float(found[k]) for k in ("action_mse", "latent_spread") if k in found}
        return Prediction(
            cameras={name: Camera(**frames) for name, frames in found["cameras"].items()},
            action=found.get("action"),
            action_mse=numbers.get("action_mse"),
            latent_spread=numbers.get("latent_spread"),
        )

    return predict


def figures(predictions: Sequence[Prediction]) -> dict:
    """Computes the errors of predictions, where the truth is known.

    PSNR (dB) is that of the mean squared error over all pixels and frames, so that it is finite
    unless everything is equal; SSIM is the mean over frames.

    Returns:
      {"cameras": {camera: {"predicted" | "last_frame" | "reconstruction": {"psnr", "ssim"}}},
      "action_mse": in normalised units, "latent_spread": the largest}. "last_frame" repeats the
      last frame of the history.
    """
    found: dict = {"cameras": {}}
    for name in predictions[0].cameras:
        shown = [p.cameras[name] for p in predictions]
        if any(camera.future is None for camera in shown):
            continue
        future = np.concatenate([camera.future for camera in shown])
        clips = {
            "predicted": [camera.predicted for camera in shown],
            "last_frame": [np.broadcast_to(c.history[-1:], c.future.shape) for c in shown]
            if all(camera.history is not None for camera in shown)
            else None,
            "reconstruction": [camera.reconstruction for camera in shown],
        }
        found["cameras"][name] = {
            kind: _distance(np.concatenate(clip), future) for kind, clip in clips.items() if clip
        }
    for name, over in (("action_mse", np.mean), ("latent_spread", np.max)):
        values = [getattr(p, name) for p in predictions]
        if None not in values:
            found[name] = float(over(values))
    return found


def _distance(frames: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    # Frames become one tall image, for the PSNR of all frames together.
    tall = [x.reshape(1, -1, *x.shape[2:]) for x in (frames, truth)]
    return {"psnr": float(psnr(*tall)[0]), "ssim": float(np.mean(ssim(frames, truth)))}


def divergence(latent_spread: float | None) -> str | None:
    """Returns a sentence if the spread of sampled latents shows that sampling has diverged."""
    if latent_spread is None or latent_spread <= _WIDE:
        return None
    return (
        f"the spread of sampled latents is {latent_spread:.3g} times that of real ones: sampling "
        "diverged and the frames are useless; 1000 sampling steps take every diffusion step"
    )
