"""The operators of a grafted head, which `head.operators` names for each block.

Every operator returns a residual, which its block adds to its input. A new operator is a class with
the constructor and the call of its family and one `register` call; a configuration can also name it
as "package.module:Class" without a call. If its layers are `linear` and `layer_norm` (in attributes
that begin with "norm") and its other arrays `nnx.Param`, its weights convert to torch by name
(`convert/rules.py`). The modulations of a `Modulated` operator are computed for many sampling steps
at once, those of another in every step.

An MLP operator may have a method `from_teacher(block)`, which returns arrays by path with which it
computes the function of the teacher's block (`head.start="preserve"`).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from uva_jax.models.layers import Modulated, attend, gelu, layer_norm, linear, modulate
from uva_jax.models.policy_config import GraftedHeadConfig
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.plugins import named_class

_ZERO = nnx.initializers.zeros
# Weak, so that positions dominate at first.
_WEAK = nnx.initializers.variance_scaling(0.01, "fan_avg", "uniform")
_ALIGNMENT = 6.0  # initial logit between an action step and its aggregate token


class CrossAttention(Modulated):
    """Attention from action steps to the memory, followed by a feed-forward layer.

    The feed-forward layer (as in Perceiver, arXiv 2103.03206) replaces the hidden layers of the
    aggregator. Positions are added only to queries and keys, as in DETR (arXiv 2005.12872). If the
    memory has one token per action step (the aggregate), half of the heads initially attend to the
    token of their own step. With `y` (the "residual" form of the head) it modulates the queries and
    gates the result.
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
        """Computes the residual of the stream.

        Args:
          s: (b, n, width) action steps.
          memory: (b, m, memory_width).
          y: (b, n, width) modulation, in the "residual" form.

        Returns:
          (b, n, width).
        """
        modulation = None if self.adaLN_modulation is None else self.modulation(y)
        return self.modulated(s, modulation, self.keys_and_values(memory))

    def modulated(
        self, s: jax.Array, modulation: jax.Array | None, memory: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """Returns the residual (b, n, width) of s, given the memory's keys and values."""
        x, gate = self.norm(s), 1.0
        if modulation is not None:
            shift, scale, gate = jnp.split(modulation, 3, axis=-1)
            x, gate = modulate(x, shift, scale), 1.0 + gate
        q = self.q(x) + self.query_position[...]
        q, k, v = (rearrange(a, "b n (h d) -> b n h d", h=self.num_heads) for a in (q, *memory))
        attended = self.proj(rearrange(attend(q, k, v), "b n h d -> b n (h d)"))
        return gate * (attended + self.fc2(gelu(self.fc1(self.norm_ff(s + attended)))))

    def keys_and_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projects the memory (b, m, memory_width) to keys and values, each (b, m', width)."""
        return self.k(memory) + self.key_position[...], self.v(memory)


class PooledCrossAttention(CrossAttention):
    """Cross-attention to means of the video's tokens over 2 x 2 of a frame's grid.

    It does not pool the aggregate's tokens. It is cheaper for a large memory.
    """

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        rows, cols = memory_grid(config)
        if rows % 2 or cols % 2:
            raise UserError(
                f"pooled_cross_attn averages 2 x 2 memory tokens of a frame, which has {rows} x "
                f"{cols}: use cross_attn in config.head.operators"
            )
        super().__init__(config, width, dtype=dtype, rngs=rngs)
        self.frames, self.grid = config.n_frames, (rows, cols)
        aggregate = memory_tokens(config)[1]
        position = self.key_position[...]
        video = self._pooled(position[:, : position.shape[1] - aggregate])
        self.key_position = nnx.Param(
            jnp.concatenate([video, position[:, position.shape[1] - aggregate :]], axis=1)
        )

    def _pooled(self, tokens: jax.Array) -> jax.Array:
        """Pools (b, frames * rows * cols, c) to (b, frames * rows / 2 * cols / 2, c)."""
        rows, cols = self.grid
        return reduce(
            tokens,
            "b (t h i w j) c -> b (t h w) c",
            "mean",
            t=self.frames,
            h=rows // 2,
            w=cols // 2,
            i=2,
            j=2,
        )

    def keys_and_values(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        video = self.frames * self.grid[0] * self.grid[1]
        tokens = jnp.concatenate([self._pooled(memory[:, :video]), memory[:, video:]], axis=1)
        return super().keys_and_values(tokens)


def memory_grid(config: GraftedHeadConfig) -> tuple[int, int]:
    """Returns rows and columns of the memory's tokens for each frame."""
    return config.pool if config.adapter == "conv" else config.grid


def memory_tokens(config: GraftedHeadConfig) -> tuple[int, int]:
    """Returns the numbers of the memory's tokens from the video and from the aggregator."""
    rows, cols = memory_grid(config)
    aggregate = config.n_actions if config.memory == "video+aggregate" else 0
    return config.n_frames * rows * cols, aggregate


def aligned_positions(
    config: GraftedHeadConfig, width: int, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Returns initial query and key positions, (1, n_actions, width) and (1, m, width).

    They are random, except for half of the heads: there action step i and the aggregate's token i
    get the same code, a unit vector or its negative, which gives a logit of `_ALIGNMENT` for the
    match and at most 0 otherwise. Heads too narrow for enough codes stay random.
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


class SelfAttention(Modulated):
    """Attention among the action steps with adaptive layer norm; its gate starts at zero."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.num_heads = config.self_attn_heads
        self.norm = layer_norm(width, rngs=rngs)
        self.position = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, config.n_actions, width))
        )
        self.qkv = linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.proj = linear(width, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    def modulated(self, h: jax.Array, modulation: jax.Array) -> jax.Array:
        """Returns the residual (b, n, width) of h (b, n, width)."""
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        x = modulate(self.norm(h), shift, scale) + self.position[...]
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.num_heads
        )
        attended = attend(q, k, v, mask=self.mask(h.shape[1]))
        return gate * self.proj(rearrange(attended, "b n h d -> b n (h d)"))

    def mask(self, steps: int) -> jax.Array | None:
        """Returns the attention mask (steps, steps), True for attended steps; None: all."""
        return None


class WindowedSelfAttention(SelfAttention):
    """Self-attention of each step to at most `self_attn_window` steps on either side."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        super().__init__(config, width, dtype=dtype, rngs=rngs)
        self.window = config.self_attn_window

    def mask(self, steps: int) -> jax.Array:
        position = jnp.arange(steps)
        return jnp.abs(position[:, None] - position) <= self.window


class LightSelfAttention(nnx.Module):
    """Self-attention at a quarter of the width, which adds a tenth to the cost of three MLP blocks.

    It has no modulation: its input has passed modulated blocks. Its output layer starts at zero.
    Positions are added to queries, keys and values.
    """

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        inner, self.num_heads = light_size(config, width)
        self.norm = layer_norm(width, rngs=rngs)
        self.position = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, config.n_actions, 3 * inner))
        )
        self.qkv = linear(width, 3 * inner, rngs=rngs, dtype=dtype)
        self.proj = linear(inner, width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    def __call__(self, h: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the residual (b, n, width) of h (b, n, width); y is not used."""
        del y
        qkv = self.qkv(self.norm(h)) + self.position[...]
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.num_heads)
        return self.proj(rearrange(attend(q, k, v), "b n h d -> b n (h d)"))


def light_size(config: GraftedHeadConfig, width: int) -> tuple[int, int]:
    """Returns inner width and heads of `LightSelfAttention`: a quarter, with heads as wide."""
    heads = max(1, config.self_attn_heads // 4)
    return width // config.self_attn_heads * heads, heads


class Mlp(Modulated):
    """The teacher's block MLP with a wider hidden layer: norm, modulation, SiLU, gate."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        hidden = self.hidden(config, width)
        self.in_ln = layer_norm(width, rngs=rngs)
        self.fc1 = linear(width, hidden, rngs=rngs, dtype=dtype)
        self.fc2 = linear(hidden, width, rngs=rngs, dtype=dtype)
        self.adaLN_modulation = linear(width, 3 * width, rngs=rngs, dtype=dtype, kernel_init=_ZERO)

    @staticmethod
    def hidden(config: GraftedHeadConfig, width: int) -> int:
        """Returns the number of units of the hidden layer."""
        return config.mlp_ratio * width

    def modulated(self, h: jax.Array, modulation: jax.Array) -> jax.Array:
        """Returns the residual (b, n, width) of h (b, n, width)."""
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        return gate * self.fc2(self.activation(modulate(self.in_ln(h), shift, scale)))

    def activation(self, x: jax.Array) -> jax.Array:
        """Computes the hidden layer (b, n, hidden) of x (b, n, width)."""
        return jax.nn.silu(self.fc1(x))

    def from_teacher(self, block: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns arrays with which this computes the function of the teacher's block.

        As in Net2WiderNet (arXiv 1511.05641), but the output weights of new units are zero.

        Args:
          block: arrays of the teacher's ResBlock by path, such as "fc1/kernel".
        """
        width = block["fc1/kernel"].shape[1]
        first, second = self.fc1.kernel[...], self.fc2.kernel[...]
        return dict(block) | {
            "fc1/kernel": first.at[:, :width].set(block["fc1/kernel"]),
            "fc1/bias": self.fc1.bias[...].at[:width].set(block["fc1/bias"]),
            "fc2/kernel": jnp.zeros_like(second).at[:width].set(block["fc2/kernel"]),
        }


class SwiGLU(Mlp):
    """The MLP with a gated hidden layer, silu(fc1 x) * fc_gate x (arXiv 2002.05202)."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        super().__init__(config, width, dtype=dtype, rngs=rngs)
        self.fc_gate = linear(width, self.hidden(config, width), rngs=rngs, dtype=dtype)

    def activation(self, x: jax.Array) -> jax.Array:
        return super().activation(x) * self.fc_gate(x)

    def from_teacher(self, block: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Does the same as `Mlp.from_teacher`; the gate of the teacher's units is constantly 1."""
        width = block["fc1/kernel"].shape[1]
        kernel, bias = self.fc_gate.kernel[...], self.fc_gate.bias[...]
        return super().from_teacher(block) | {
            "fc_gate/kernel": kernel.at[:, :width].set(0.0),
            "fc_gate/bias": bias.at[:width].set(1.0),
        }


class KeptMlp(Mlp):
    """The teacher's block MLP with unchanged width and weights; Stage 1 does not train it."""

    @staticmethod
    def hidden(config: GraftedHeadConfig, width: int) -> int:
        return width


class Nothing(nnx.Module):
    """An operator with residual zero, for blocks without an attention."""

    def __init__(self, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs):
        pass

    def __call__(self, stream: jax.Array, *inputs: jax.Array) -> jax.Array:
        """Returns zeros of the shape of `stream` (b, n, width)."""
        return jnp.zeros_like(stream)


KEEP = ("none", "none", "keep")  # a block that equals the teacher's

_REGISTRY: dict[str, dict[str, type[nnx.Module]]] = {
    "cross_attn": {
        "cross_attn": CrossAttention,
        "pooled_cross_attn": PooledCrossAttention,
        "none": Nothing,
    },
    "self_attn": {
        "self_attn": SelfAttention,
        "windowed_self_attn": WindowedSelfAttention,
        "light_self_attn": LightSelfAttention,
        "none": Nothing,
    },
    "mlp": {"mlp": Mlp, "swiglu": SwiGLU, "keep": KeptMlp},
}


def register(family: str, name: str, cls: type[nnx.Module]) -> None:
    """Adds an operator to a family, so that `head.operators` can name it."""
    _REGISTRY[family][name] = cls


def works_modulated(operator: nnx.Module) -> bool:
    """Returns whether `modulated` equals a call: the operator's class does not redefine it."""
    calls = (Modulated.__call__, CrossAttention.__call__)
    return isinstance(operator, Modulated) and type(operator).__call__ in calls


def learns_in_stage1(operator: nnx.Module) -> bool:
    """Whether Stage 1 trains an operator."""
    return not isinstance(operator, Nothing | KeptMlp)


def _imported(family: str, name: str) -> type[nnx.Module]:
    found = named_class(f"{family} operator", name)
    if found is None or not issubclass(found, nnx.Module):
        raise UserError(
            f"the {family} operator {name!r} is not a class of flax.nnx.Module: name such a class"
        )
    return found


def make_operator(
    family: str, name: str, config: GraftedHeadConfig, width: int, *, dtype=None, rngs: nnx.Rngs
) -> nnx.Module:
    """Makes the operator registered under `name`, or of the class "package.module:Class".

    Raises:
      UserError: the family has no operator of that name, or it cannot be imported.
    """
    known = _REGISTRY[family]
    if name not in known and ":" not in name:
        raise UserError(
            f"operator {name!r} is not a {family}: use one of {', '.join(known)}, or name a class "
            "as 'package.module:Class'"
        )
    cls = known[name] if name in known else _imported(family, name)
    return cls(config, width, dtype=dtype, rngs=rngs)
