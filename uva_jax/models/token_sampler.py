"""The token sampler: samples future video and actions from a policy in any task mode.

Masked tokens are filled in over `num_iter` rounds (MaskGIT's cosine schedule, arXiv 2202.04200, as
MAR and UVA use it). The number of tokens of each round is fixed, so all shapes are static.
Upstream: `sample_tokens` of `mar_con_unified.py`, which crashes with guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from uva_jax.models import mar
from uva_jax.models.layers import sub_key
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError

_ONE_PASS = ("policy_model", "inverse_model")


def masked_counts(tokens: int, num_iter: int) -> list[int]:
    """Returns the masked tokens of a frame before each round and after the last.

    After round s they are floor(tokens * cos(pi/2 * (s+1) / num_iter)), at least 1 and at most one
    less than before; the last round fills all.

    Args:
      tokens: of a frame.
      num_iter: rounds.

    Returns:
      num_iter + 1 numbers.

    Raises:
      UserError: there are more rounds than tokens.
    """
    if not 1 <= num_iter <= tokens:
        raise UserError(f"num_iter is {num_iter}; it can be 1 to {tokens}, the tokens of a frame")
    counts = [tokens]
    for step in range(num_iter - 1):
        kept = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / num_iter))
        counts.append(max(1, min(counts[-1] - 1, kept)))
    return [*counts, 0]


def _guidance(cfg: float, schedule: str, masked: int, tokens: int) -> float:
    if schedule == "constant":
        return cfg
    if schedule == "linear":
        # The original's sampler counts one token as masked after the last round.
        return 1 + (cfg - 1) * (tokens - max(1, masked)) / tokens
    raise UserError(f"cfg_schedule is {schedule!r}; it can be 'linear' or 'constant'")


def sample_tokens(
    policy: Policy,
    cond: jax.Array,
    *,
    task_mode: str,
    num_iter: int = 1,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    sampling_steps: str | None = None,
    sampler: str = "ancestral",
    key: jax.Array | None = None,
    orders: jax.Array | None = None,
    noises: Sequence[jax.Array] | None = None,
    target: jax.Array | None = None,
    wrist_target: jax.Array | None = None,
    nactions: jax.Array | None = None,
    streams: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Samples what the task mode predicts; it can be jitted with static settings.

    Args:
      policy: the model.
      cond: (b, t, h', w', z) history latents.
      task_mode: one of TASK_MODES. policy_model and inverse_model give only actions.
      num_iter: rounds.
      cfg: guidance scale of the video heads; 1: none. Actions are never guided.
      cfg_schedule: "linear" (grows with the share of filled tokens) or "constant".
      temperature: factor on the noise of each diffusion step.
      sampling_steps: respacing in place of each head's own.
      sampler: of every loop; see `diffusion.sample_loop`.
      key: for draws that are not given.
      orders: (b, s) permutations, whose first entries are the masked tokens.
      noises: (K + 1, b, rows, c) of every diffusion loop in order of call: in each round the
        actions, then (if the mode has video) the video, then the wrist camera.
      target, wrist_target: (b, t, h', w', z) future latents, used in inverse_model.
      nactions: (b, n_actions, action_dim) in [-1, 1], used in dynamic_model.
      streams: further inputs of `MAR.embed`.

    Returns:
      "actions" (b, n_actions, action_dim) in [-1, 1], of the last round; with video also "latents"
      (b, t, h', w', z), and "wrist_latents" if the policy predicts them. "actions" is None for a
      policy without an action head (UVA's first phase of training).

    Raises:
      UserError: a setting is unknown, or an input that the mode needs is missing.
    """
    config, patch = policy.config.mar, policy.config.patch_size
    batch, tokens_per_frame = cond.shape[0], config.tokens_per_frame
    counts = masked_counts(tokens_per_frame, num_iter)
    cond_tokens = mar.patchify(cond, patch)
    if task_mode == "inverse_model" and target is None:
        raise UserError("inverse_model infers actions from the future video, but got no target")
    loops = iter(noises) if noises is not None else None
    if loops is None and key is None:
        raise UserError("sampling needs a key, or orders and the noise of every loop")
    if orders is None:
        uniform = jax.random.uniform(sub_key(key, 0), (batch, tokens_per_frame))
        orders = jnp.argsort(uniform, axis=-1)
    loop = {"temperature": temperature, "sampling_steps": sampling_steps, "sampler": sampler}
    calls = 0

    def draw():
        nonlocal calls
        calls += 1
        return {"noise": next(loops)} if loops else {"key": sub_key(key, calls)}

    def decoder(values: dict, mask, unconditional: bool):
        return policy.mar(
            values.get("tokens"),
            mask,
            cond_tokens,
            task_mode=task_mode,
            nactions=nactions,
            wrist_tokens=values.get("wrist_tokens"),
            drop_condition=unconditional,
            **(streams or {}),
        )

    def act(z):
        return policy.action_head.sample(z, **loop, **draw())

    if policy.action_head is None and task_mode in _ONE_PASS:
        raise UserError(f"{task_mode} predicts actions, but this policy has no action head")
    if task_mode in _ONE_PASS:
        values = {}
        if task_mode == "inverse_model":
            values["tokens"] = mar.patchify(target, patch)
            if config.wrist and wrist_target is not None:
                values["wrist_tokens"] = mar.patchify(wrist_target, patch)
        hidden = jnp.zeros((batch, config.n_frames, tokens_per_frame))
        return {"actions": act(decoder(values, hidden, False))}

    heads = {"tokens": policy.video_head}
    if config.wrist:
        heads["wrist_tokens"] = policy.wrist_head
    if policy.video_head is None:
        raise UserError(f"{task_mode} predicts video, but this policy has no video head")
    empty = jnp.zeros((batch, config.n_frames, tokens_per_frame, config.token_dim))
    values = dict.fromkeys(heads, empty)
    actions = None
    rows = jnp.arange(batch)[:, None]
    for masked, left in zip(counts[:-1], counts[1:], strict=True):
        mask = jnp.zeros((batch, tokens_per_frame)).at[rows, orders[:, :masked]].set(1.0)
        mask = jnp.repeat(mask[:, None], config.n_frames, axis=1)
        z = decoder(values, mask, False)
        actions = act(z) if policy.action_head is not None else None
        # Every frame fills the same positions, in the order of the grid.
        filled = jnp.sort(orders[:, left:masked], axis=-1)
        frames = jnp.arange(config.n_frames) * tokens_per_frame
        positions = rearrange(frames[None, :, None] + filled[:, None], "b t n -> b (t n)")
        picked = jnp.take_along_axis(z, positions[..., None], axis=1)
        options: dict = dict(loop)
        if cfg != 1.0:
            z_free = decoder(values, mask, True)
            picked_free = jnp.take_along_axis(z_free, positions[..., None], axis=1)
            picked = jnp.concatenate([picked, picked_free], axis=0)
            scale = _guidance(cfg, cfg_schedule, left, tokens_per_frame)
            options |= {"cfg": scale, "guided": True}
        sampled = {
            name: head.sample(picked, **options, **draw())[:batch] for name, head in heads.items()
        }
        for name, rows_new in sampled.items():
            flat = rearrange(values[name], "b t s c -> b (t s) c")
            flat = flat.at[rows, positions].set(rows_new)
            values[name] = rearrange(flat, "b (t s) c -> b t s c", t=config.n_frames)
    result = {
        name.replace("tokens", "latents"): mar.unpatchify(value, config.grid, patch)
        for name, value in values.items()
    }
    return result | {"actions": actions}
