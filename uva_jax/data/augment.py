"""Augmentation: PushT's mirror symmetry, and upstream's random crops and blurs of windows.

Scene, physics and goal of PushT are symmetric about the anti-diagonal of the canvas, which doubles
the data: the point (x, y) becomes (512 - y, 512 - x); the goal pose (256, 256, π/4) is unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from uva_jax.runtime.errors import UserError

CANVAS = 512  # side of the canvas in pixels, the unit of points


def mirror_pusht(batch: Mapping[str, Any], where: Any = None) -> dict[str, Any]:
    """Mirrors the arrays of a batch, of numpy or jax (also under jit).

    Mirroring twice restores images exactly, and points up to float rounding.

    Args:
      batch: any of `image` (..., h, h, 3) of any dtype; `action` and `agent_pos` (..., 2) in
        pixels, 0..512; `state` (..., 5), agent x, y and block x, y in pixels and block angle in
        radians.
      where: booleans (b,): the samples of the first axis to mirror; all by default.

    Returns:
      the same names with arrays of the same shape and dtype; angles are in 0..2π.

    Raises:
      ValueError: a name is unknown, or an array has another shape.
    """
    mirrored = {}
    for name, array in batch.items():
        if name not in _MIRRORS:
            raise ValueError(f"{name!r} cannot be mirrored: only {', '.join(_MIRRORS)} can")
        mirror, fits = _MIRRORS[name]
        if not fits(array.shape):
            raise ValueError(f"{name} of shape {array.shape} cannot be mirrored")
        mirrored[name] = mirror(array)
        if where is not None:
            chosen = where.reshape(-1, *[1] * (array.ndim - 1))
            mirrored[name] = _namespace(array).where(chosen, mirrored[name], array)
    return mirrored


@dataclass(frozen=True)
class CropAndBlur:
    """Upstream's augmentation of a window of PushT; crop and blur each have probability 0.5.

    Attributes:
      crop: side of the crop over the frame's, in (0, 1]; the crop is resized to the frame's size.
      blur: largest standard deviation of the Gaussian, in pixels; the smallest is 0.1.

    Raises:
      UserError: a value is out of range.
    """

    crop: float = 0.95
    blur: float = 2.0

    def __post_init__(self):
        if not 0 < self.crop <= 1:
            raise UserError(f"crop is {self.crop}, but must be above 0 and at most 1")
        if self.blur < 0.1:
            raise UserError(f"blur is {self.blur}, but must be at least 0.1 pixels")

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Applies one crop and one blur, drawn from `rng`, to all frames (n, h, w, 3) uint8."""
        import cv2  # only the simulator and this need it

        height, width = frames.shape[1:3]
        crops, blurs = rng.random(2) < 0.5
        tall, wide = int(height * self.crop), int(width * self.crop)
        top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
        deviation = rng.uniform(0.1, self.blur)
        found = np.empty_like(frames)
        for i, frame in enumerate(frames):
            if crops:
                frame = cv2.resize(frame[top : top + tall, left : left + wide], (width, height))
            if blurs:
                frame = cv2.GaussianBlur(
                    frame, (5, 5), deviation, borderType=cv2.BORDER_REFLECT_101
                )
            found[i] = frame
        return found


def _mirror_images(images):
    return images[..., ::-1, ::-1, :].swapaxes(-3, -2)


def _mirror_points(points):
    return CANVAS - points[..., ::-1]


def _mirror_states(states):
    parts = [
        _mirror_points(states[..., 0:2]),
        _mirror_points(states[..., 2:4]),
        (np.pi / 2 - states[..., 4:5]) % (2 * np.pi),
    ]
    return _namespace(states).concatenate(parts, axis=-1)


def _namespace(array):
    return np if isinstance(array, np.ndarray) else array.__array_namespace__()


_MIRRORS = {
    "image": (_mirror_images, lambda s: len(s) >= 3 and s[-3] == s[-2] and s[-1] == 3),
    "action": (_mirror_points, lambda s: s[-1:] == (2,)),
    "agent_pos": (_mirror_points, lambda s: s[-1:] == (2,)),
    "state": (_mirror_states, lambda s: s[-1:] == (5,)),
}
