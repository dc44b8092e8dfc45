"""Layers that several models share, equal to their PyTorch originals.

Factories of linear, convolution and norm layers have the project's conventions of initialisation
and precision: parameters, norms and softmax in float32, products in `dtype`. Random keys are
arguments of calls; modules hold no random state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

_XAVIER = nnx.initializers.xavier_uniform()
_ROWS_AND_COLUMNS = (((1,), (0,)), ((), ()))  # of a plain matrix product
_SMALL_MAP = 64  # positions
_STRIPES = 64


def _bfloat16_dot(x: jax.Array, y: jax.Array, dimensions=_ROWS_AND_COLUMNS) -> jax.Array:
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


@jax.custom_vjp
def bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x (n, c) times kernel (c, d) in float32, with factors rounded to bfloat16.

    TPUs multiply float32 like this by default. XLA's CPU backend has AMX kernels for exactly this
    form, which are four times as fast as float32.
    """
    return _bfloat16_dot(x, kernel)


def _product_forward(x, kernel):
    return _bfloat16_dot(x, kernel), (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


def _product_backward(factors, grad):
    x, kernel = factors
    grad = grad.astype(jnp.bfloat16)
    to_x = _bfloat16_dot(grad, kernel, (((1,), (1,)), ((), ())))
    # The transposed rows are copied first, because XLA would fuse a plain transposition into the
    # product, for which the CPU has no fast kernel.
    if len(x) % _STRIPES == 0:
        columns = x.reshape(_STRIPES, -1, x.shape[1]).transpose(2, 0, 1).reshape(x.shape[1], -1)
    else:
        columns = x.T
    return to_x, _bfloat16_dot(columns, grad)


bfloat16_product.defvjp(_product_forward, _product_backward)


def _matrix_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x (n, c) times kernel (c, d) in the precision of `jax.default_matmul_precision`."""
    wanted = jax.config.jax_default_matmul_precision == "bfloat16"
    return bfloat16_product(x, kernel) if wanted and x.dtype == jnp.float32 else x @ kernel


class Linear(nnx.Linear):
    """A linear layer that flattens the leading axes of its input to one.

    With several leading axes XLA's CPU backend takes twice as long for the gradient of a kernel. It
    also ignores `jax.default_matmul_precision("bfloat16")`, which this layer observes.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        rows = inputs.reshape(-1, inputs.shape[-1])
        bias = None if self.bias is None else self.bias[...]
        rows, kernel, bias = self.promote_dtype((rows, self.kernel[...], bias), dtype=self.dtype)
        rows = _matrix_product(rows, kernel)
        rows = rows if bias is None else rows + bias
        return rows.reshape(*inputs.shape[:-1], rows.shape[-1])


def linear(
    in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype=None, kernel_init=_XAVIER
) -> Linear:
    """Makes a linear layer with MAR's initialisation: Xavier-uniform kernel, zero bias."""
    return Linear(in_features, out_features, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


def layer_norm(features: int, *, eps: float = 1e-6, affine: bool = True, rngs: nnx.Rngs):
    """Makes a LayerNorm in float32 with the two-pass variance of PyTorch."""
    return nnx.LayerNorm(
        features,
        epsilon=eps,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )


def conv(
    in_features: int,
    out_features: int,
    kernel: tuple[int, ...],
    *,
    padding,
    strides: int | tuple[int, ...] = 1,
    rngs: nnx.Rngs,
    dtype=None,
) -> nnx.Conv:
    """Makes a convolution of channels-last maps; `padding` has one pair per spatial axis."""
    return nnx.Conv(
        in_features,
        out_features,
        kernel,
        strides,
        padding=padding,
        dtype=dtype,
        rngs=rngs,
    )


def conv3x3(layer: nnx.Conv, x: jax.Array) -> jax.Array:
    """Applies a 3x3 convolution with stride 1 and padding 1 to x (n, h, w, c).

    On small maps it is a matrix product, because convolutions inside a loop are a hundred times
    slower in XLA's CPU backend, and the product is not slower elsewhere.
    """
    if x.shape[1] * x.shape[2] > _SMALL_MAP:
        return layer(x)
    kernel, bias = layer.kernel[...], layer.bias[...]
    if layer.dtype is not None:
        x, kernel, bias = (v.astype(layer.dtype) for v in (x, kernel, bias))
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = rearrange(jnp.stack(shifted, axis=3), "n h w k c -> (n h w) (k c)")
    kernel = rearrange(kernel, "i j c d -> (i j c) d")
    out = _matrix_product(rows, kernel) + bias
    return out.reshape(*x.shape[:3], -1)


def gelu(x: jax.Array) -> jax.Array:
    """Computes GELU by the error function, as timm; `jax.nn.gelu` approximates by tanh."""
    return jax.nn.gelu(x, approximate=False)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Computes the adaptive layer-norm modulation of DiT, `x * (1 + scale) + shift`."""
    return x * (1 + scale) + shift


class Modulated(nnx.Module):
    """A module with DiT's adaptive norm, modulated by y, which is made of timestep and condition.

    The modulation does not depend on x, so a sampler computes it for many steps in one product. A
    subclass has the layer `adaLN_modulation` and the method `modulated(x, modulation)`.
    """

    def modulation(self, y: jax.Array) -> jax.Array:
        """Computes shift, scale and, for some, gate (..., k * width) of y (..., width)."""
        return self.adaLN_modulation(jax.nn.silu(y))

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the module's result for x, modulated by y, both (..., width)."""
        return self.modulated(x, self.modulation(y))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Applies inverted dropout; the identity without a key (inference) or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def sub_key(key: jax.Array | None, index: int) -> jax.Array | None:
    """Returns the key of part `index`, or None without a key (inference)."""
    return None if key is None else jax.random.fold_in(key, index)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention with float32 softmax.

    Args:
      q: (b, n, heads, head_dim) queries.
      k: (b, m, heads, head_dim) keys.
      v: (b, m, heads, value_dim) values.
      mask: booleans that broadcast to (b, heads, n, m): True for attended keys. None: all.
      dropout_rate: share of attention weights that are dropped if `key` is given.
      key: random key, or None for inference.

    Returns:
      (b, n, heads, value_dim), in q's dtype.
    """
    # Heads become a leading axis, because XLA's CPU backend is three times faster with plain
    # batched matrices than with transposed ones.
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if mask is not None:  # finite, so that a query without keys gives no NaN
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = dropout(weights, dropout_rate, key).astype(v.dtype)
    return rearrange(jnp.einsum("bhnm,bhmd->bhnd", weights, v), "b h n d -> b n h d")


class Attention(nnx.Module):
    """Multi-head self-attention of timm's ViT: packed qkv with bias, in the order q, k, v."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.attn_dropout, self.proj_dropout = attn_dropout, proj_dropout
        self.qkv = linear(dim, 3 * dim, rngs=rngs, dtype=dtype)
        self.proj = linear(dim, dim, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """(b, n, c) -> (b, n, c)."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.num_heads)
        out = attend(*qkv, dropout_rate=self.attn_dropout, key=sub_key(key, 0))
        out = self.proj(rearrange(out, "b n h d -> b n (h d)"))
        return dropout(out, self.proj_dropout, sub_key(key, 1))


class Mlp(nnx.Module):
    """timm's two-layer MLP with exact GELU and dropout after both layers."""

    def __init__(
        self, dim: int, hidden: int, *, dropout_rate: float = 0.0, dtype=None, rngs: nnx.Rngs
    ):
        self.dropout_rate = dropout_rate
        self.fc1 = linear(dim, hidden, rngs=rngs, dtype=dtype)
        self.fc2 = linear(hidden, dim, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """(..., c) -> (..., c)."""
        x = dropout(gelu(self.fc1(x)), self.dropout_rate, sub_key(key, 0))
        return dropout(self.fc2(x), self.dropout_rate, sub_key(key, 1))


class Block(nnx.Module):
    """Pre-norm transformer block of timm's ViT: no q/k norm, no layer scale, no drop path."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        eps: float,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(dim, eps=eps, rngs=rngs)
        self.attn = Attention(
            dim,
            num_heads,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = layer_norm(dim, eps=eps, rngs=rngs)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout_rate=proj_dropout, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """(b, n, c) -> (b, n, c)."""
        x = x + self.attn(self.norm1(x), key=sub_key(key, 0))
        return x + self.mlp(self.norm2(x), key=sub_key(key, 1))
