"""I3D, the video classifier whose outputs the Fréchet video distance compares, for inference.

The network is that of Carreira and Zisserman 2017 as upstream's `fvd/pytorch_i3d.py` evaluates it:
every convolution and pooling pads its input "same", with the extra zero on the far side. A batch
normalisation has fixed statistics here, so that it is part of the convolution's kernel and bias.
Module names follow the PyTorch original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from uva_jax.models import surgery
from uva_jax.models.policy import resize_bilinear

SIZE = 224  # pixels of the frames
FRAMES = 16  # of a video, in every published protocol
CLASSES = 400
# Endpoint -> (channels, kernel size, stride) of a unit, (window, stride) of a pooling, or the six
# widths of a module: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after a pooling.
LAYERS: dict[str, tuple] = {
    "Conv3d_1a_7x7": (64, 7, 2),
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2b_1x1": (64, 1, 1),
    "Conv3d_2c_3x3": (192, 3, 1),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def preprocess(videos: jax.Array) -> jax.Array:
    """Scales the shorter side to 224 (bilinear, half-pixel centres) and crops the centre.

    Args:
      videos: (b, t, h, w, 3), values 0..255.

    Returns:
      (b, t, 224, 224, 3) float32 in [-1, 1].
    """
    height, width = videos.shape[-3:-1]
    scale = SIZE / min(height, width)
    # As in the original, where rounding up in floating point can give one pixel more.
    if height < width:
        height, width = SIZE, math.ceil(width * scale)
    else:
        height, width = math.ceil(height * scale), SIZE
    videos = resize_bilinear(videos.astype(jnp.float32) / 255.0, (height, width))
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    return (videos[..., top : top + SIZE, left : left + SIZE, :] - 0.5) * 2.0


def _pool(x: jax.Array, window: tuple, stride: tuple) -> jax.Array:
    """Takes maxima over "same" windows of (b, t, h, w, c); inputs are not negative.

    One axis after another, which on a CPU is several times as fast as one three-dimensional window.
    """
    for axis, (size, step) in enumerate(zip(window, stride, strict=True), start=1):
        parts = _shifted(x, axis, size, step)
        x = parts[0]
        for part in parts[1:]:
            x = jnp.maximum(x, part)
    return x


def _shifted(x: jax.Array, axis: int, size: int, step: int) -> list[jax.Array]:
    """Returns the elements of "same" windows along an axis: `size` arrays, one per offset."""
    length = x.shape[axis]
    out = -(-length // step)
    padding = max((out - 1) * step + size - length, 0)
    before = padding // 2
    x = jnp.pad(x, [(before, padding - before) if a == axis else (0, 0) for a in range(x.ndim)])
    last = (out - 1) * step + 1
    return [lax.slice_in_dim(x, i, i + last, step, axis) for i in range(size)]


class Unit(nnx.Module):
    """A "same" convolution with its batch normalisation, and ReLU."""

    def __init__(self, n_in: int, n_out: int, size: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.stride = stride
        shape, spread = (size, size, size, n_in, n_out), (2.0 / (size**3 * n_in)) ** 0.5
        self.kernel = nnx.Param(spread * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(n_out))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, t, h, w, c_in) to (b, t', h', w', c_out).

        The time steps under the kernel become channels of a convolution over space, because XLA's
        three-dimensional convolution takes up to five times as long on a CPU.
        """
        kernel, batch = self.kernel[...], x.shape[0]
        x = jnp.concatenate(_shifted(x, 1, kernel.shape[0], self.stride), axis=-1)
        y = lax.conv_general_dilated(
            rearrange(x, "b t h w c -> (b t) h w c"),
            rearrange(kernel, "t h w i o -> h w (t i) o"),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(rearrange(y, "(b t) h w c -> b t h w c", b=batch) + self.bias[...])


class Inception(nnx.Module):
    """Four branches side by side; see `LAYERS` for `widths`."""

    def __init__(self, n_in: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.b0 = Unit(n_in, widths[0], 1, rngs=rngs)
        self.b1a = Unit(n_in, widths[1], 1, rngs=rngs)
        self.b1b = Unit(widths[1], widths[2], 3, rngs=rngs)
        self.b2a = Unit(n_in, widths[3], 1, rngs=rngs)
        self.b2b = Unit(widths[3], widths[4], 3, rngs=rngs)
        self.b3b = Unit(n_in, widths[5], 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, t, h, w, c_in) to (b, t, h, w, sum of the branches' widths)."""
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled))
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """The network; attributes are named like the endpoints in `LAYERS`."""

    def __init__(self, *, rngs: nnx.Rngs):
        width = 3
        for name, layer in LAYERS.items():
            if len(layer) == 3:
                setattr(self, name, Unit(width, *layer, rngs=rngs))
                width = layer[0]
            elif len(layer) == 6:
                setattr(self, name, Inception(width, layer, rngs=rngs))
                width = layer[0] + layer[2] + layer[4] + layer[5]
        self.logits = nnx.Linear(width, CLASSES, rngs=rngs)

    def endpoints(self, videos: jax.Array) -> dict[str, jax.Array]:
        """Returns every endpoint's output (b, t', h', w', c) by name, and "logits" (b, 400).

        Args:
          videos: (b, t, 224, 224, 3) in [-1, 1] as from `preprocess`, t at least 9.
        """
        found, x = {}, videos
        for name, layer in LAYERS.items():
            x = _pool(x, *layer) if len(layer) == 2 else getattr(self, name)(x)
            found[name] = x
        # Averages over 2 x 7 x 7, of which one fits into 7 x 7; the logits are averaged over time.
        x = jnp.mean(x, axis=(2, 3))
        found["logits"] = self.logits(jnp.mean((x[:, :-1] + x[:, 1:]) / 2, axis=1))
        return found

    def __call__(self, videos: jax.Array) -> jax.Array:
        """Returns the logits (b, 400) of videos; see `endpoints`."""
        return self.endpoints(videos)["logits"]


def abstract() -> I3D:
    """Returns the network with shapes in place of arrays."""
    return nnx.eval_shape(lambda: I3D(rngs=nnx.Rngs(0)))


def make(arrays: Mapping[str, np.ndarray]) -> I3D:
    """Returns the network with the given arrays, by path as `surgery.flatten` names them.

    Raises:
      UserError: they do not fit.
    """
    return surgery.replace(abstract(), {path: jnp.asarray(x) for path, x in arrays.items()})
