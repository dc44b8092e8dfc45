"""A policy's compiled call, which rollouts and the actor make on windows of observations.

This module does not import the policy's, which has an actor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.models import diffusion
from uva_jax.models.encoding import encode_in_parts
from uva_jax.models.frames import frame_indices
from uva_jax.models.policy_config import PolicyConfig, steps_of
from uva_jax.runtime import parallel

ENCODE_FRAMES = 16  # frames that the VAE encodes at a time: they fit a CPU's cache


def cameras(config: PolicyConfig) -> tuple[str, ...]:
    """Returns the names of the images that a policy reads."""
    return ("image", "wrist_image") if config.mar.proprio_image else ("image",)


def new_frames(config: PolicyConfig) -> int:
    """Returns how many of a window's frames are not yet in the window one chunk of actions ago."""
    picks = frame_indices(config.n_obs_steps, config.mar.n_frames)
    return sum(pick + config.n_action_steps not in picks for pick in picks)


def ahead_steps(config: PolicyConfig) -> frozenset[int]:
    """Returns the numbers of steps before a call at which new frames of its window are observed.

    Such a frame can be encoded when it is observed (`PolicyCall.encode_ahead`). The call's own step
    is left out. The set is empty if a call encodes frames again that an earlier step has observed.
    """
    last = config.n_obs_steps - 1
    picks = frame_indices(config.n_obs_steps, config.mar.n_frames)
    since = [last - pick for pick in picks if last - pick < config.n_action_steps]
    return frozenset(since) - {0} if len(since) == new_frames(config) else frozenset()


class _Kept(NamedTuple):
    """The frames that are encoded for the next call of a slot, with their moments, by camera.

    Both are (n, n_frames, ...), for several slots; `row` is the slot's.
    """

    frames: dict[str, np.ndarray]
    moments: dict[str, tuple[jax.Array, jax.Array]]
    row: int

    def moment(self, camera: str, part: int) -> np.ndarray:
        """Returns the row's means (part 0) or log-variances (1)."""
        return np.asarray(self.moments[camera][part])[self.row]


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
        *,
        encodes_ahead: bool = False,
    ):
        """Compiles nothing yet.

        Args:
          policy: a Policy.
          sampling_steps: diffusion steps of the action head; "": the policy's own.
          noise_seed: of all noise.
          sampler: see `diffusion.sample_loop`.
          encodes_ahead: new frames are given to `encode_ahead` when they are observed, at the
            `ahead_steps`, so that a call has only the last one to encode.
        """
        self.load(policy)
        graph, tree = nnx.graphdef(policy), jax.tree.structure(nnx.state(policy))
        self._config = policy.config
        ahead = ahead_steps(self._config) if encodes_ahead else ()
        self._fresh = new_frames(self._config) - len(ahead)  # frames that a call encodes
        head = self._config.action_head
        steps = steps_of(head, sampling_steps)
        draws = len(diffusion.make_schedule(steps)) + 1

        def encode(policy, frames):
            n, f = frames.shape[:2]
            flat = frames.reshape(n * f, *frames.shape[2:])
            moments = encode_in_parts(policy, flat, ENCODE_FRAMES)
            return (x.reshape(n, f, *x.shape[1:]).astype(jnp.float32) for x in moments)

        def normal(keys, shape, axis=0):
            return jax.vmap(lambda key: jax.random.normal(key, shape), out_axes=axis)(keys)

        def merge(variables):
            return nnx.merge(graph, jax.tree.unflatten(tree, variables))

        @jax.jit
        def encode_new(variables, moments, frames):
            found = {}
            for camera, new in frames.items():
                encoded = zip(moments[camera], encode(merge(variables), new), strict=True)
                found[camera] = tuple(
                    jnp.concatenate([old[:, 1:], new], axis=1) for old, new in encoded
                )
            return found

        @jax.jit
        def call(variables, moments, frames, index, inputs, seed_index, call_index):
            policy = merge(variables)
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

        self._call, self._encode_ahead = call, encode_new

    def load(self, policy: nnx.Module) -> None:
        """Uses the parameters of another policy of the same architecture."""
        # A list, because jax.jit takes a millisecond to flatten an nnx.State.
        self.variables = jax.tree.leaves(nnx.state(policy))
        # Calls return moments that are committed to a device if the parameters are. Were the first
        # ones not, the second call would be compiled again, in the middle of an episode.
        first = self.variables[0]
        committed = getattr(first, "committed", False) and len(first.devices()) == 1
        self._sharding = first.sharding if committed else None
        self._latents = policy.latent_shape
        self._kept: dict[int, _Kept] = {}  # by slot

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
        slots: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns actions (n, n_action_steps, action_dim) in raw units.

        Args:
          obs: "image" (n, n_frames, h, w, 3) and the policy's other inputs, as `predict_action`
            reads them. In "past_action", rows of NaN have no past actions.
          seed_index: (n,) int32, which noise each observation gets.
          call_index: number of the call within the episode, which gives it noise of its own; (n,)
            if the rows differ.
          slots: (n,) number of each row's environment, if not all act in every call; by default
            0 to n - 1. The encoded frames are kept by slot.
        """
        frames = {name: np.asarray(obs[name]) for name in cameras(self._config)}
        n, total = frames["image"].shape[:2]
        numbers = range(n) if slots is None else np.asarray(slots).tolist()
        before = [self._kept.get(number) for number in numbers]
        fresh = self._fresh
        kept = total - fresh
        moments = self._moments(before)
        if not self._kept and fresh < new_frames(self._config):
            # Compiles it before the first action and not while something moves.
            self._encode_ahead(
                self.variables, moments, {name: x[:, -1:] for name, x in frames.items()}
            )
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
        self._kept |= {slot: _Kept(frames, moments, row) for row, slot in enumerate(numbers)}
        return np.asarray(actions)

    def encode_ahead(
        self, frames: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Encodes frames before the call whose window they are in, without waiting for the result.

        Args:
          frames: (n, h, w, 3) by camera, of slots 0 to n - 1, all of which have had a call.

        Returns:
          the moments of each slot's last frames, by camera, which the next call uses.
        """
        before = [self._kept[slot] for slot in range(len(frames["image"]))]
        new = {name: np.asarray(x)[:, None] for name, x in frames.items()}
        moments = self._encode_ahead(self.variables, self._moments(before), new)
        last = {
            name: np.concatenate([[kept.frames[name][kept.row, 1:] for kept in before], x], axis=1)
            for name, x in new.items()
        }
        self._kept |= {slot: _Kept(last, moments, slot) for slot in range(len(before))}
        return moments

    def _moments(self, before: Sequence[_Kept | None]) -> dict:
        """Returns the moments of the call before for these rows, by camera."""
        first = before[0]
        if first is not None and all(
            x is not None and x.moments is first.moments and x.row == row
            for row, x in enumerate(before)
        ):
            if len(first.moments["image"][0]) == len(before):
                return first.moments  # the batch is that of the call before
        empty = np.zeros(self._latents(1)[1:], np.float32)

        def rows(name: str, part: int) -> jax.Array:
            found = np.stack([empty if x is None else x.moment(name, part) for x in before])
            return jax.device_put(found, self._sharding)

        return {name: (rows(name, 0), rows(name, 1)) for name in cameras(self._config)}

    def _continues(self, before: Sequence[_Kept | None], frames: Mapping, kept: int) -> np.ndarray:
        """Returns for which rows the first `kept` frames are the last ones of the call before."""

        def continues(row: int, last: _Kept | None) -> bool:
            return last is not None and all(
                np.array_equal(last.frames[name][last.row, -kept:], x[row, :kept])
                for name, x in frames.items()
            )

        if not kept:
            return np.ones(len(before), bool)
        return np.array([continues(row, last) for row, last in enumerate(before)])

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
