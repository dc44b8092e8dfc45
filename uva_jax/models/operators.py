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

from uva_jax.errors import UserError
from uva_jax.models.layers import attend, gelu, layer_norm, linear, modulate
from uva_jax.models.policy_config import GraftedHeadConfig

_ZERO = nnx.initializers.zeros


class CrossAttention(nnx.Module):
    """Attention from action steps to the memory, then a feed-forward part of its own.

    The feed-forward (as in Perceiver, arXiv 2103.03206) stands for the hidden layers of the
    aggregator that this operator replaces. With `y` (the "residual" form of the head) queries are
    modulated and the result is gated by it.
    """

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.norm = layer_norm(width, rngs=rngs)
        self.q = linear(width, width, rngs=rngs, dtype=dtype)
        self.kv = linear(config.stream_width, 2 * width, rngs=rngs, dtype=dtype)
        self.proj = linear(width, width, rngs=rngs, dtype=dtype)
        self.norm_ff = layer_norm(width, rngs=rngs)
        self.fc1 = linear(width, config.mlp_ratio * width, rngs=rngs, dtype=dtype)
        self.fc2 = linear(config.mlp_ratio * width, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = (
            linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)
            if config.cross_attention == "residual"
            else None
        )

    def __call__(
        self,
        s: jax.Array,
        memory: jax.Array,
        position: jax.Array,
        y: jax.Array | None = None,
    ) -> jax.Array:
        """Residual of the stream.

        Args:
          s: (b, n, width) action steps.
          memory: (b, m, stream_width).
          position: (1, n, width), added to the queries.
          y: (b, n, width) modulation, in the "residual" form.
        """
        x = self.norm(s)
        gate = None
        if self.adaLN_modulation is not None:
            shift, scale, gate = jnp.split(self.adaLN_modulation(jax.nn.silu(y)), 3, axis=-1)
            x = modulate(x, shift, scale)
        q = rearrange(self.q(x + position), "b n (h d) -> b n h d", h=self.num_heads)
        k, v = rearrange(self.kv(memory), "b m (two h d) -> two b m h d", two=2, h=self.num_heads)
        attended = self.proj(rearrange(attend(q, k, v), "b n h d -> b n (h d)"))
        out = attended + self.fc2(gelu(self.fc1(self.norm_ff(s + attended))))
        return out if gate is None else gate * out


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


FAMILIES = ("cross_attn", "self_attn", "mlp")
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
