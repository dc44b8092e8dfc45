"""Acting with a policy: the compiled call that rollouts make, and an actor for one step at a time.

`PolicyCall` acts on windows of observations that somebody else keeps, as the rollouts' processes
do. `Actor` keeps them itself: it is given every step's observation and returns every step's action.
This module does not import the policy's, which has an actor.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.models import diffusion
from uva_jax.models.encoding import encode_in_parts
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy_config import PolicyConfig, steps_of
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.respacing import SAMPLERS

ENCODE_FRAMES = 16  # frames that the VAE encodes at a time: they fit a CPU's cache


def cameras(config: PolicyConfig) -> tuple[str, ...]:
    """Returns the names of the images that a policy reads."""
    return ("image", "wrist_image") if config.mar.proprio_image else ("image",)


def new_frames(config: PolicyConfig) -> int:
    """Returns how many of a window's frames are not yet in the window one chunk of actions ago."""
    picks = frame_indices(config.n_obs_steps, config.mar.n_frames)
    return sum(pick + config.n_action_steps not in picks for pick in picks)


class PolicyCall:
    """A policy as the `predict` function of `RolloutPool`.

    Successive observations share frames, so the VAE's moments of these are reused; the latents are
    sampled again in every call, as in `Policy.predict_action`. Noise depends only on
    (noise_seed, seed, call), so two policies with one `noise_seed` get the same noise.
    """

    def __init__(
        self,
        policy: nnx.Module,
        sampling_steps: str = "",
        noise_seed: int = 0,
        sampler: str = "ancestral",
    ):
        """Compiles nothing yet.

        Args:
          policy: a Policy.
          sampling_steps: diffusion steps of the action head; "": the policy's own.
          noise_seed: of all noise.
          sampler: see `diffusion.sample_loop`.
        """
        self.load(policy)
        graph, self._config = nnx.graphdef(policy), policy.config
        head = self._config.action_head
        steps = steps_of(head, sampling_steps)
        draws = len(diffusion.make_schedule(steps, 1000)) + 1

        def encode(policy, frames):
            n, f = frames.shape[:2]
            flat = frames.reshape(n * f, *frames.shape[2:])
            moments = encode_in_parts(policy, flat, ENCODE_FRAMES)
            return (x.reshape(n, f, *x.shape[1:]).astype(jnp.float32) for x in moments)

        def normal(keys, shape, axis=0):
            return jax.vmap(lambda key: jax.random.normal(key, shape), out_axes=axis)(keys)

        @jax.jit
        def call(variables, moments, frames, index, inputs, seed_index, call_index):
            policy = nnx.merge(graph, variables)
            keys = jax.vmap(functools.partial(_keys, noise_seed))(seed_index, call_index)
            latents, eps_keys = {}, {"image": keys[:, 0], "wrist_image": _other(keys[:, 0])}
            for camera, new in frames.items():
                encoded = zip(moments[camera], encode(policy, new), strict=True)
                mean, logvar = (_rows(jnp.concatenate(both, axis=1), index) for both in encoded)
                moments[camera] = mean, logvar
                eps = normal(eps_keys[camera], mean.shape[1:])
                latents[camera] = policy.vae.sample(mean, logvar, eps)
            streams = policy.streams(inputs, latents.get("wrist_image"))
            nactions = policy.action_head.sample(
                policy.video_tokens(latents["image"], streams),
                noise=normal(keys[:, 1], (draws, head.n_actions, head.channels), axis=1),
                temperature=policy.config.temperature,
                sampling_steps=steps,
                sampler=sampler,
            )
            actions = policy.unnormalize("action", nactions)
            return actions[:, : policy.config.n_action_steps], moments

        self._call = call

    def load(self, policy: nnx.Module) -> None:
        """Uses the parameters of another policy of the same architecture."""
        self.variables = nnx.state(policy)
        self._latents = policy.latent_shape
        self._kept: dict[int, tuple[dict, dict]] = {}  # batch -> its last frames and moments

    def lower(
        self, obs: Mapping[str, jax.ShapeDtypeStruct], sharding: jax.sharding.Sharding
    ) -> jax.stages.Lowered:
        """Lowers the call on the shapes of an observation of which no frame is encoded yet.

        It needs only shapes: the policy may be one without arrays (`surgery.abstract_policy`).
        """
        n, total = obs["image"].shape[:2]
        numbers = (jax.ShapeDtypeStruct((n,), jnp.int32),) * 2
        arguments = (
            self.variables,
            jax.eval_shape(lambda: self._nothing(n)),
            {name: obs[name] for name in cameras(self._config)},
            jax.ShapeDtypeStruct((n, total), jnp.int32),
            self._inputs(obs),
            *numbers,
        )
        return self._call.lower(*parallel.shapes_on_mesh(arguments, sharding))

    def __call__(
        self,
        obs: Mapping[str, np.ndarray],
        seed_index: np.ndarray,
        call_index: np.ndarray | int,
        batch: int = 0,
    ) -> np.ndarray:
        """Returns actions (n, n_action_steps, action_dim) in raw units.

        Args:
          obs: "image" (n, n_frames, h, w, 3) and the policy's other inputs, as `predict_action`
            reads them. In "past_action", rows of NaN have no past actions.
          seed_index: (n,) int32, which noise each observation gets.
          call_index: number of the call within the episode, which gives it noise of its own; (n,)
            if the rows differ.
          batch: number of the batch, if calls for several batches of episodes alternate.
        """
        frames = {name: np.asarray(obs[name]) for name in cameras(self._config)}
        n, total = frames["image"].shape[:2]
        fresh = new_frames(self._config)
        kept = total - fresh
        before, moments = self._kept.get(batch, ({}, {}))
        if not before or len(before["image"]) != n:
            before, moments = {}, self._nothing(n)
        continues = self._continues(before, frames, kept)
        # At the start of an episode all frames are equal.
        starts = np.all([_same(x, x[:, :1]) for x in frames.values()], axis=0)
        if (continues | starts).all():
            index = np.where(continues[:, None], np.arange(fresh, fresh + total), total)
            new = {name: x[:, kept:] for name, x in frames.items()}
        else:
            index, new = np.tile(np.arange(total, 2 * total), (n, 1)), frames
        actions, moments = self._call(
            self.variables,
            moments,
            new,
            index.astype(np.int32),
            self._inputs(obs),
            np.asarray(seed_index, np.int32),
            np.broadcast_to(np.asarray(call_index, np.int32), (n,)),
        )
        self._kept[batch] = frames, moments
        return np.asarray(actions)

    def _continues(self, before: Mapping, frames: Mapping, kept: int) -> np.ndarray:
        """Returns for which rows the first `kept` frames are the last ones of the call before."""
        if not kept or not before:
            return np.full(len(frames["image"]), not kept)
        return np.all([_same(before[k][:, -kept:], x[:, :kept]) for k, x in frames.items()], axis=0)

    def _nothing(self, n: int) -> dict:
        empty = jnp.zeros(self._latents(n))
        return {name: (empty, empty) for name in cameras(self._config)}

    def _inputs(self, obs: Mapping) -> dict:
        """Returns the inputs beside images."""
        names = ("text_latents", "past_action", *self._config.proprio_keys)
        return {name: obs[name] for name in names if name in obs}


def _keys(noise_seed: int, index: jax.Array, call: jax.Array) -> jax.Array:
    """Returns the two keys of one observation's noise: of the VAE and of the action head."""
    base = jax.random.fold_in(jax.random.key(noise_seed), call)
    return jax.random.split(jax.random.fold_in(base, index))


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns for each row of x (n, t, ...) the entries `index` (n, t')."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _same(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns which rows of x and y (n, ...) are equal, (n,) booleans."""
    return (x == y).all(axis=tuple(range(1, x.ndim)))


def _other(keys: jax.Array) -> jax.Array:
    """Returns the keys of the second camera's noise."""
    return jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)


class Actor:
    """A policy that is given every step's observation and returns every step's action.

        actor = uva_jax.load("embedded").actor(sampling_steps=10)
        action = actor({"image": image})

    It keeps the observations of the last `n_obs_steps` steps (before the start the first one is
    repeated), the actions of the last `n_actions`, and the encoded frames. It calls the policy when
    its `n_action_steps` actions are used up. It acts in one environment, or in several at once if
    the arrays of the observation have a leading batch axis.
    """

    def __init__(
        self,
        policy: nnx.Module,
        *,
        sampling_steps: str | int = "",
        sampler: str = "ancestral",
        seed: int = 0,
    ):
        """Compiles nothing yet.

        Args:
          policy: a Policy.
          sampling_steps: diffusion steps of the action head, such as 10; "": the policy's own.
          sampler: "ancestral", "ddim" or "dpm++"; see `diffusion.sample_loop`.
          seed: of all noise.

        Raises:
          UserError: the policy has no action head, or there is no such sampler or number of steps.
        """
        if policy.action_head is None:
            raise UserError("this policy was trained only for video and has no action head to act")
        if sampler not in SAMPLERS:
            raise UserError(f"the sampler is {sampler!r}, but it can be {', '.join(SAMPLERS)}")
        self._config = policy.config
        self._call = PolicyCall(policy, str(sampling_steps), seed, sampler)
        self._calls = 0
        self.reset()

    def reset(self) -> None:
        """Starts an episode: forgets observations and actions. Its noise is not the last one's."""
        config = self._config
        self._seen: deque[dict[str, np.ndarray]] = deque(maxlen=config.n_obs_steps)
        self._done: deque[np.ndarray] = deque(maxlen=config.mar.n_actions)
        self._planned: deque[np.ndarray] = deque()

    def __call__(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the action (action_dim,) of this step in raw units.

        Args:
          obs: what is observed at this step: "image" (h, w, 3) uint8, or float in [0, 1], and what
            else the policy reads: "wrist_image" alike, "text_latents" (text_dim,), and the states
            in `config.proprio_keys` (k,). With a batch axis on all of them, the action has it too.

        Raises:
          UserError: an array is missing or does not fit the policy or the steps before.
        """
        single = np.ndim(obs.get("image")) == 3
        self._seen.append(self._checked(obs, single))
        if not self._planned:
            window = self._window()
            numbers = np.arange(len(window["image"]), dtype=np.int32)
            actions = self._call(window, numbers, self._calls)
            self._calls += 1
            self._planned.extend(np.moveaxis(actions, 1, 0))
        action = self._planned.popleft()
        self._done.append(action)
        return action[0] if single else action

    def _window(self) -> dict[str, np.ndarray]:
        """Returns the observation (b, ...) as the policy reads it."""
        config = self._config
        history = [self._seen[0]] * (config.n_obs_steps - len(self._seen)) + list(self._seen)
        picks = frame_indices(config.n_obs_steps, config.mar.n_frames)
        found = {}
        for name, value in history[-1].items():
            if name == "text_latents":
                found[name] = value
            else:
                steps = picks if name in cameras(config) else range(config.n_obs_steps)
                found[name] = np.stack([history[i][name] for i in steps], axis=1)
        if config.mar.history_action and self._done:
            missing = config.mar.n_actions - len(self._done)
            found["past_action"] = np.stack([self._done[0]] * missing + list(self._done), axis=1)
        return found

    def _checked(self, obs: Mapping[str, np.ndarray], single: bool) -> dict[str, np.ndarray]:
        """Returns the arrays that the policy reads, with a batch axis."""
        config, mar = self._config, self._config.mar
        states = config.proprio_keys if mar.proprio_dim else ()
        widths = dict(config.normalizer_fields)
        tails: dict[str, tuple] = {name: (None, None, 3) for name in cameras(config)}
        tails |= {"text_latents": (mar.text_dim,)} if mar.text_dim else {}
        tails |= {name: (widths.get(name),) for name in states}
        if missing := [name for name in tails if name not in obs]:
            raise UserError(
                f"the observation lacks {', '.join(missing)}, which this policy reads; it holds "
                f"{', '.join(obs) or 'nothing'}"
            )
        found = {}
        for name, tail in tails.items():
            array = np.asarray(obs[name])
            shape = array.shape if single else array.shape[1:]
            fits = len(shape) == len(tail) and all(
                got and wanted in (None, got) for got, wanted in zip(shape, tail, strict=True)
            )
            numbers = array.dtype == np.uint8 or array.dtype.kind == "f"
            if name not in cameras(config):
                numbers = array.dtype.kind in "fiu"
            if not fits or not numbers:
                said = " x ".join("any" if n is None else str(n) for n in tail)
                wanted = "uint8 or float in 0..1" if name in cameras(config) else "numbers"
                raise UserError(
                    f"{name} of the observation is {array.dtype} {array.shape}, but this policy "
                    f"reads {said} {wanted}, with or without a batch axis on all arrays"
                )
            if not np.isfinite(array).all():
                raise UserError(f"{name} of the observation has values that are not finite")
            array = array if array.dtype == np.uint8 else array.astype(np.float32)
            # A copy: an environment may draw its next image into the same memory.
            found[name] = np.array(array[None] if single else array)
            before = self._seen[-1][name] if self._seen else found[name]
            if found[name].shape != before.shape or found[name].dtype != before.dtype:
                raise UserError(
                    f"{name} of the observation is {array.dtype} {array.shape}, other than at the "
                    "step before: call actor.reset() when an episode starts"
                )
        if len({len(array) for array in found.values()}) > 1:
            raise UserError("the arrays of the observation have batch axes of different lengths")
        width = sum(found[name].shape[-1] for name in states)
        if width != mar.proprio_dim:
            raise UserError(
                f"the states of the observation ({', '.join(states)}) are {width} numbers wide, "
                f"but this policy reads {mar.proprio_dim}"
            )
        return found
