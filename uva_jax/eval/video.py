"""Tiles clips, writes them as mp4, gif or png, and compares frames by PSNR and SSIM.

Clips are uint8 RGB arrays (t, h, w, 3).
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw, ImageFont

from uva_jax.storage.atomic import new_file

_H264 = "-c:v libx264 -pix_fmt yuv420p -crf 20 -movflags +faststart -threads 1".split()
_PAPER = 255  # value of gaps and of the background of labels
_INK = (40, 40, 40)


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float = 10.0) -> Path:
    """Writes frames (t, h, w, 3) uint8 as H.264 in an mp4 file, atomically.

    4:2:0 colour needs even sizes: for an odd height or width the last row or column is repeated.

    Raises:
      ValueError: no frames, or not uint8 RGB.
      OSError: the file cannot be written whole, in ffmpeg's words.
    """
    frames = _checked(frames)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    # Run here rather than by imageio's writer, which takes half a file for a whole one.
    command = [get_ffmpeg_exe(), "-y", "-v", "warning", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-", "-an", *_H264]
    with new_file(path) as temporary, warnings.catch_warnings():
        # jax warns of any fork; exec follows this one at once, so it cannot deadlock.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\)", category=RuntimeWarning)
        done = subprocess.run(
            [*command, str(temporary)],
            input=frames.tobytes(),
            capture_output=True,
            restore_signals=False,  # so that a limit on files' size is an error, as in Python
        )
        if done.returncode != 0:
            words = " ".join(done.stderr.decode(errors="replace").split())
            raise OSError(f"{path} cannot be written: ffmpeg says {words[-500:]!r}")
    return Path(path)


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float = 10.0) -> Path:
    """Writes frames (t, h, w, 3) uint8 as an endless gif, atomically.

    Equal successive frames become one frame with a longer duration.

    Raises:
      ValueError: no frames, or not uint8 RGB.
    """
    first, *rest = (Image.fromarray(frame) for frame in _checked(frames))
    with new_file(path) as temporary:
        duration = round(1000 / fps)
        first.save(temporary, save_all=True, append_images=rest, duration=duration, loop=0)
    return Path(path)


def write_strip(path: str | os.PathLike, frames: np.ndarray, gap: int = 8) -> Path:
    """Writes frames (t, h, w, 3) uint8 side by side as one png, atomically.

    Raises:
      ValueError: no frames, or not uint8 RGB.
    """
    padded = np.pad(_checked(frames), ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=_PAPER)
    with new_file(path) as temporary:
        Image.fromarray(rearrange(padded, "t h w c -> h (t w) c")[:, :-gap]).save(temporary)
    return Path(path)


def tile(
    clips: Sequence[np.ndarray],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 1,
    gap: int = 8,
) -> np.ndarray:
    """Arranges clips in a grid, row by row, as one clip.

    Shorter clips repeat their last frame until the longest ends.

    Args:
      clips: arrays (t_i, h, w, 3) uint8 of one frame size.
      labels: a line of text above each clip.
      columns: clips per row; all in one row by default.
      scale: whole-number enlargement by repeating pixels.
      gap: pixels between clips.

    Returns:
      (max t_i, height, width, 3) uint8.

    Raises:
      ValueError: frame sizes differ, or there are not as many labels as clips.
    """
    clips = [_checked(clip) for clip in clips]
    sizes = {clip.shape[1:] for clip in clips}
    if len(sizes) != 1:
        raise ValueError(f"tile needs clips of one frame size, got {sorted(sizes)}")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"tile got {len(clips)} clips and {len(labels)} labels")
    length = max(len(clip) for clip in clips)
    tiles = []
    for index, clip in enumerate(clips):
        held = clip[np.minimum(np.arange(length), len(clip) - 1)]
        held = held.repeat(scale, axis=1).repeat(scale, axis=2)
        if labels is not None:
            strip = _label_strip(labels[index], held.shape[2])
            held = np.concatenate([np.repeat(strip[None], length, axis=0), held], axis=1)
        tiles.append(held)
    columns = columns or len(tiles)
    rows = -(-len(tiles) // columns)
    blank = np.full_like(tiles[0], _PAPER)
    tiles += [blank] * (rows * columns - len(tiles))
    padded = np.pad(
        np.stack(tiles), ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=_PAPER
    )
    sheet = rearrange(padded, "(r c) t h w d -> t (r h) (c w) d", c=columns)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]


def psnr(x: np.ndarray, y: np.ndarray, data_range: float = 255.0) -> np.ndarray:
    """Computes the peak signal-to-noise ratio of each frame.

    Args:
      x, y: (..., h, w, c), values within a range of `data_range`.

    Returns:
      (...) in dB, infinite for equal frames.

    Raises:
      ValueError: the shapes differ.
    """
    x, y = _pair(x, y)
    error = np.mean((x - y) ** 2, axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / error)


def ssim(x: np.ndarray, y: np.ndarray, data_range: float = 255.0) -> np.ndarray:
    """Computes the structural similarity of each frame, the mean over pixels and channels.

    As Wang et al. 2004: an 11 x 11 Gaussian window with standard deviation 1.5, K1 = 0.01,
    K2 = 0.03, at pixels where the window fits.

    Args:
      x, y: (..., h, w, c) with h, w >= 11, values within a range of `data_range`.

    Returns:
      (...), at most 1.

    Raises:
      ValueError: the shapes differ, or frames are smaller than the window.
    """
    x, y = _pair(x, y)
    if min(x.shape[-3:-1]) < 11:
        raise ValueError(f"ssim needs frames of at least 11 x 11 pixels, got {x.shape[-3:-1]}")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return np.mean(luminance * structure, axis=(-3, -2, -1))


def _blur(images: np.ndarray) -> np.ndarray:
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    for axis in (-3, -2):
        views = np.lib.stride_tricks.sliding_window_view(images, 11, axis=axis)
        images = views @ window
    return images


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.shape != y.shape:
        raise ValueError(f"frames to compare differ in shape: {x.shape} and {y.shape}")
    return x.astype(np.float64), y.astype(np.float64)


def _checked(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"a clip is a uint8 array (t, h, w, 3) with t >= 1, got {frames.dtype} {frames.shape}"
        )
    return frames


def _label_strip(text: str, width: int) -> np.ndarray:
    """Returns (height, width, 3) uint8 with the text on the background, left aligned."""
    size = max(10, min(18, width // 12))
    strip = Image.new("RGB", (width, size + 8), (_PAPER,) * 3)
    draw = ImageDraw.Draw(strip)
    draw.text((3, 2), text, fill=_INK, font=ImageFont.load_default(size))
    return np.asarray(strip)
