"""CLIP's text transformer, which turns a task's sentence into a language latent.

Libero checkpoints contain it. UVA does not use CLIP's vision tower, so it is not ported. The tower
is frozen in UVA's training and runs once per task, so it always computes in float32. Names follow
`CLIPModel` of transformers and formulas the CLIP paper (arXiv 2103.00020).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from uva_jax.models.layers import Linear, attend, layer_norm, linear
from uva_jax.models.policy_config import TextTowerConfig

_EPS = 1e-5
_INIT = nnx.initializers.normal(0.02)


def quick_gelu(x: jax.Array) -> jax.Array:
    """Computes CLIP's approximation of GELU, `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


class _SelfAttention(nnx.Module):
    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(width, width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        qkv = (
            rearrange(proj(x), "b n (h d) -> b n h d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(attend(*qkv, mask=mask), "b n h d -> b n (h d)"))


class _Mlp(nnx.Module):
    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = linear(width, hidden, rngs=rngs)
        self.fc2 = linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(quick_gelu(self.fc1(x)))


class _Layer(nnx.Module):
    """A pre-norm transformer layer like `layers.Block`, but causal and with CLIP's GELU."""

    def __init__(self, config: TextTowerConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config.width, eps=_EPS, rngs=rngs)
        self.self_attn = _SelfAttention(config.width, config.num_heads, rngs=rngs)
        self.layer_norm2 = layer_norm(config.width, eps=_EPS, rngs=rngs)
        self.mlp = _Mlp(config.width, config.mlp_width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class TextTower(nnx.Module):
    """Maps the token numbers of sentences to language latents."""

    def __init__(self, config: TextTowerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.token_embedding = nnx.Param(_INIT(rngs.params(), (c.vocab_size, c.width)))
        self.position_embedding = nnx.Param(_INIT(rngs.params(), (c.max_length, c.width)))
        self.layers = nnx.List([_Layer(c, rngs=rngs) for _ in range(c.depth)])
        self.final_layer_norm = layer_norm(c.width, eps=_EPS, rngs=rngs)
        self.text_projection = Linear(c.width, c.projection, use_bias=False, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds token numbers (b, n): (b, n, width)."""
        positions = self.position_embedding[...][: tokens.shape[1]]
        return jnp.take(self.token_embedding[...], tokens, axis=0) + positions

    def pool(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """Projects the last layer's output (b, n, width) to language latents (b, projection).

        It uses the output at the end token: the first token with the highest number, as
        transformers does for the published weights. Padding repeats the end token after it.
        """
        x = self.final_layer_norm(x)
        end = jnp.argmax(tokens, axis=1)
        return self.text_projection(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Computes language latents, equal to `CLIPModel.get_text_features`.

        Args:
          tokens: (b, n) integers, n at most `config.max_length`.
          mask: (b, n) 1 for tokens, 0 for padding.

        Returns:
          (b, projection) float32, not normalised.
        """
        seen = attention_mask(mask)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, seen)
        return self.pool(x, tokens)


def attention_mask(mask: jax.Array) -> jax.Array:
    """Returns the causal attention mask (b, 1, n, n) of a padding mask (b, n), 1 for tokens.

    A token attends to itself and to the tokens before it, but not to padding.
    """
    return jnp.tril(jnp.ones((mask.shape[1],) * 2, bool)) & (mask != 0)[:, None, None]
