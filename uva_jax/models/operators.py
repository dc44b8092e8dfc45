"""The operators that a grafted head is built of, registered by name.

Every operator returns the residual that its block adds to the stream it works on. A new operator
(windowed attention, another expansion ratio, a state-space mixer) is a class with the same call
and a line in its registry; configs then name it per block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from uva_jax.models.layers import attend, gelu, layer_norm, linear, modulate
from uva_jax.models.policy_config import GraftedHeadConfig
from uva_jax.runtime.errors import UserError

_ZERO = nnx.initializers.zeros
_WEAK = nnx.initializers.variance_scaling(0.01, "fan_avg", "uniform")  # positions lead at first
_ALIGNMENT = 6.0  # starting logit between an action step and its aggregate token


class CrossAttention(nnx.Module):
    """Attention from action steps to the memory, then a feed-forward part of its own.

    The feed-forward (as in Perceiver, arXiv 2103.03206) stands for the hidden layers of the
    aggregator that this operator replaces. Positions enter queries and keys alone, as in DETR
    (arXiv 2005.12872). Where the memory holds one token per action step (the aggregate), half of
    the heads start out looking at their own step's token; what they read there is learnt. With `y`
    (the "residual" form of the head) queries are modulated and the result is gated by it.
    """

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.norm = layer_norm(width, rngs=rngs)
        self.q = linear(width, width, rngs=rngs, dtype=dtype, kernel_init=_WEAK)
        self.k = linear(config.memory_width, width, rngs=rngs, dtype=dtype, kernel_init=_WEAK)
        self.v = linear(config.memory_width, width, rngs=rngs, dtype=dtype)
        query, key = aligned_positions(config, width, rngs)
        self.query_position, self.key_position = nnx.Param(query), nnx.Param(key)
        self.proj = linear(width, width, rngs=rngs, dtype=dtype)
        self.norm_ff = layer_norm(width, rngs=rngs)
        self.fc1 = linear(width, config.cross_mlp_ratio * width, rngs=rngs, dtype=dtype)
        self.fc2 = linear(config.cross_mlp_ratio * width, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = (
            linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)
            if config.cross_attention == "residual"
            else None
        )

    def __call__(self, s: jax.Array, memory: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """Residual of the stream.

        Args:
          s: (b, n, width) action steps.
          memory: (b, m, memory_width).
          y: (b, n, width) modulation, in the "residual" form.
        """
        x, gate = self.norm(s), 1.0
        if self.adaLN_modulation is not None:
            shift, scale, gate = jnp.split(self.adaLN_modulation(jax.nn.silu(y)), 3, axis=-1)
            x, gate = modulate(x, shift, scale), 1.0 + gate
        q = self.q(x) + self.query_position[...]
        k = self.k(memory) + self.key_position[...]
        q, k, v = (
            rearrange(a, "b n (h d) -> b n h d", h=self.num_heads) for a in (q, k, self.v(memory))
        )
        attended = self.proj(rearrange(attend(q, k, v), "b n h d -> b n (h d)"))
        return gate * (attended + self.fc2(gelu(self.fc1(self.norm_ff(s + attended)))))


def memory_tokens(config: GraftedHeadConfig) -> tuple[int, int]:
    """How many tokens of the memory come from the video, and how many from the aggregator."""
    rows, cols = config.pool if config.adapter == "conv" else config.grid
    aggregate = config.n_actions if config.memory == "video+aggregate" else 0
    return config.n_frames * rows * cols, aggregate


def aligned_positions(
    config: GraftedHeadConfig, width: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Starting query and key positions, (1, n_actions, width) and (1, m, width).

    Random, but for half of the heads, where action step i and the aggregate's token i get one
    code: unit vectors and their negatives, apart enough for a logit of `_ALIGNMENT` at the match
    and at most 0 elsewhere. Heads too narrow for that many codes stay random.
    """
    video, aggregate = memory_tokens(config)
    head_dim, heads = width // config.num_heads, config.num_heads
    query = 0.5 * jax.random.normal(rngs.params(), (config.n_actions, heads, head_dim))
    key = 0.5 * jax.random.normal(rngs.params(), (video + aggregate, heads, head_dim))
    if aggregate and 2 * head_dim >= config.n_actions:
        unit = jnp.eye(head_dim)
        codes = jnp.concatenate([unit, -unit])[: config.n_actions, None]
        codes = codes * (_ALIGNMENT * head_dim**0.5) ** 0.5
        half = heads // 2
        query = query.at[:, :half].set(codes)
        key = key.at[:, :half].set(0.0).at[video:, :half].set(codes)
    return query.reshape(1, -1, width), key.reshape(1, -1, width)


class SelfAttention(nnx.Module):
    """Attention among the action steps, adaptive-norm modulated; its gate starts closed."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.num_heads = config.self_attn_heads
        self.norm = layer_norm(width, rngs=rngs)
        self.position = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, config.n_actions, width))
        )
        self.qkv = linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.proj = linear(width, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    def __call__(self, h: jax.Array, y: jax.Array) -> jax.Array:
        """h, y (b, n, width) -> residual (b, n, width)."""
        shift, scale, gate = jnp.split(self.adaLN_modulation(jax.nn.silu(y)), 3, axis=-1)
        x = modulate(self.norm(h), shift, scale) + self.position[...]
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.num_heads
        )
        return gate * self.proj(rearrange(attend(q, k, v), "b n h d -> b n (h d)"))


class Mlp(nnx.Module):
    """The teacher's block MLP at a wider hidden layer: norm, modulation, SiLU, gate."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.in_ln = layer_norm(width, rngs=rngs)
        self.fc1 = linear(width, config.mlp_ratio * width, rngs=rngs, dtype=dtype)
        self.fc2 = linear(config.mlp_ratio * width, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    def __call__(self, h: jax.Array, y: jax.Array) -> jax.Array:
        """h, y (b, n, width) -> residual (b, n, width)."""
        shift, scale, gate = jnp.split(self.adaLN_modulation(jax.nn.silu(y)), 3, axis=-1)
        x = modulate(self.in_ln(h), shift, scale)
        return gate * self.fc2(jax.nn.silu(self.fc1(x)))


_REGISTRY: dict[str, dict[str, type[nnx.Module]]] = {
    "cross_attn": {"cross_attn": CrossAttention},
    "self_attn": {"self_attn": SelfAttention},
    "mlp": {"mlp": Mlp},
}


def register(family: str, name: str, cls: type[nnx.Module]) -> None:
    """Adds an operator to a family, so that `head.operators` can name it."""
    _REGISTRY[family][name] = cls


def make_operator(
    family: str, name: str, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs
) -> nnx.Module:
    """The operator registered under `name`.

    Raises:
      UserError: the family has no operator of that name.
    """
    known = _REGISTRY[family]
    if name not in known:
        raise UserError(f"operator {name!r} is not a {family}; known are {', '.join(known)}.")
    return known[name](config, width, dtype=dtype, rngs=rngs)
