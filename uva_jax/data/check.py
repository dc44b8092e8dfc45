"""Checks of demonstrations against the policy that reads them, before anything is computed.

Recordings store frames with channels first or last, with alpha or in gray, and actions of one
number with or without an axis. `BufferView` converts these to one form and refuses the rest, and
values that are not finite. `check_widths` compares with the policy; `check_split` refuses a split
without training or held-out windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from uva_jax.data.episodes import validation_mask
from uva_jax.data.replay_buffer import ReplayBuffer, to_uint8
from uva_jax.data.windows import WindowSpec, last_current_steps, steps_of_a_window
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions

_CHANNELS = (1, 3, 4)  # gray, RGB, RGBA
_LOOKED_AT = 8  # frames from which the range of pixels is computed, if they are not uint8


class _Frames(NamedTuple):
    """The form in which an array stores frames.

    Attributes:
      axis: the channels' axis in a frame; None: gray without such an axis.
      channels: 1, 3 or 4.
      size: height and width.
    """

    axis: int | None
    channels: int
    size: tuple[int, int]

    @classmethod
    def of(cls, item: tuple[int, ...]) -> _Frames | None:
        """Returns the form of frames of a shape, or None if it is not a frame's.

        If the first and the last axis could both be channels, the form with the larger frame is
        taken.
        """
        if len(item) == 2:
            return cls(None, 1, item) if min(item) else None
        if len(item) != 3:
            return None
        found = []
        for axis, size in ((2, item[:2]), (0, item[1:])):
            if item[axis] in _CHANNELS and min(size):
                found.append(cls(axis, item[axis], size))
        return max(found, key=lambda frames: min(frames.size), default=None)

    @property
    def words(self) -> str:
        """The form in words; "" for (h, w, 3)."""
        said = ["with its channels first"] if self.axis == 0 else []
        said += ["without its fourth channel, alpha"] if self.channels == 4 else []
        said += ["as gray, repeated for red, green and blue"] if self.channels == 1 else []
        return " and ".join(said)

    def convert(self, values: np.ndarray) -> np.ndarray:
        """Converts stored frames (..., *item) to (..., h, w, 3)."""
        if self.axis is None:
            values = values[..., None]
        elif self.axis == 0:
            values = np.moveaxis(values, -3, -1)
        if self.channels == 1:
            values = np.repeat(values, 3, axis=-1)
        return np.ascontiguousarray(values[..., :3])


class BufferView:
    """A replay buffer with the interface of `ReplayBuffer`, in the form that policies take.

    Arrays added with `add_frames` are read as (n, h, w, 3) uint8, those added with `add_numbers` as
    (n, k), and all others as they are stored.

    Attributes:
      notes: a sentence for each array that is stored in another form.
    """

    def __init__(self, buffer: ReplayBuffer):
        self._buffer = buffer
        self._frames: dict[str, _Frames] = {}
        self._numbers: list[str] = []
        self.notes: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._buffer, name)

    def add_frames(self, key: str) -> None:
        """Adds an array of frames.

        Raises:
          UserError: the array is missing or holds no frames, or sampled pixels are out of range.
        """
        shape, dtype = self._buffer.shape(key), self._buffer.dtype(key)
        frames = _Frames.of(shape[1:])
        if frames is None or dtype.kind not in "iuf":
            raise UserError(
                f"{self.path}: data/{key} is {dtype} of shape {shape}, but frames are "
                "pixel values (n, h, w, 3), or with channels first, with alpha, or gray: name the "
                "cameras' arrays with config.data.image_key and config.data.wrist_key"
            )
        self._frames[key] = frames
        if frames.words:
            self.notes.append(f"{self.path}: data/{key}, of shape {shape}, is read {frames.words}")
        if dtype != np.uint8:
            some = np.linspace(0, self.n_steps - 1, min(_LOOKED_AT, self.n_steps)).astype(int)
            found = self._buffer.read_rows({key: some})[key]
            self._pixels(key, found, some)
            to_uint8(found, f"{self.path}: data/{key}")  # refuses a range of 0..1

    def add_numbers(self, key: str, width: int | None = None) -> None:
        """Adds an array of numbers, `width` per step (None: any), without reading its values.

        Raises:
          UserError: the array is missing, or has another width, shape or dtype.
        """
        shape, dtype = self._buffer.shape(key), self._buffer.dtype(key)
        if len(shape) not in (1, 2) or not all(shape) or dtype.kind not in "biuf":
            raise UserError(
                f"{self.path}: data/{key} is {dtype} of shape {shape}, but must hold a row of "
                "numbers for each step, (n, k)"
            )
        if key not in self._numbers:
            self._numbers.append(key)
        if width is not None and self.shape(key)[1] != width:
            raise UserError(
                f"{self.path}: data/{key} is {self.shape(key)[1]} numbers wide, but must be "
                f"{width} wide"
            )

    def check_finite(self, key: str) -> None:
        """Raises UserError at the first value of an array of numbers that float32 cannot hold."""
        stored = self.read(key)
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(stored.astype(np.float32))
        rows = np.flatnonzero(bad.any(axis=1))
        if len(rows):
            first, column = rows[0], int(bad[rows[0]].argmax())
            more = f" (and in {len(rows) - 1} further steps)" if len(rows) > 1 else ""
            raise UserError(
                f"{self._place(key, first)}, column {column}, is {stored[first, column]}{more}, "
                "but must be finite: correct the recording, or leave that episode out"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of an array, (n_steps, *item)."""
        shape = self._buffer.shape(key)
        if key in self._frames:
            return (shape[0], *self._frames[key].size, 3)
        return (*shape, 1) if key in self._numbers and len(shape) == 1 else shape

    def dtype(self, key: str) -> np.dtype:
        """The dtype of an array as it is read."""
        return np.dtype(np.uint8) if key in self._frames else self._buffer.dtype(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads steps [start, stop) of one array.

        Raises:
          UserError: a frame's pixels are out of range or not finite.
        """
        values = self._buffer.read(key, start, stop)
        return self._given(key, values, np.arange(start, start + len(values)))

    def read_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Reads as `ReplayBuffer.read_rows`; errors as in `read`."""
        found = self._buffer.read_rows(rows)
        return {key: self._given(key, found[key], np.asarray(rows[key])) for key in rows}

    def _given(self, key: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Converts stored values (*rows.shape, ...) of an array."""
        if key in self._frames:
            return self._frames[key].convert(self._pixels(key, values, rows))
        if key in self._numbers and values.ndim == rows.ndim:
            return values[..., None]
        return values

    def _pixels(self, key: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Converts stored pixels to uint8; a single frame may be dark."""
        if values.dtype == np.uint8:
            return values
        flat = values.reshape(rows.size, -1)
        bad = ~((flat.min(axis=1) >= 0) & (flat.max(axis=1) <= 255))  # also true for NaN
        if bad.any():
            row = int(bad.argmax())
            low, high = flat[row].min(), flat[row].max()
            raise UserError(
                f"{self._place(key, rows.reshape(-1)[row])}, is a frame whose pixels range from "
                f"{low:g} to {high:g}, but must be in 0..255: correct the recording, or leave that "
                "episode out"
            )
        return np.rint(values).astype(np.uint8)

    def _place(self, key: str, row: int) -> str:
        episode = int(np.searchsorted(self.episode_ends, row, side="right"))
        step = row - (self.episode_ends[episode - 1] if episode else 0)
        return f"{self.path}: data/{key}[{row}], step {step} of episode {episode} (counted from 0)"


def check_widths(spec: WindowSpec, widths: Mapping[str, tuple[str, int]], path: str) -> None:
    """Checks the widths of actions and states against the policy's, if it fixes them.

    Args:
      spec: the policy's windows.
      widths: (name of the array, numbers per step) of "action" and of every state.
      path: of the recording, for error messages.

    Raises:
      UserError: the widths differ, or a state is missing.
    """
    own = "give the data that it was trained on"
    array, width = widths["action"]
    if spec.action_dim not in (None, width):
        raise UserError(
            f"{path}: {array} is {width} numbers wide, but this policy's actions are "
            f"{spec.action_dim}: {own}, or name another array with config.data.action_key "
            "(python -m uva_jax import converts actions of Libero and robomimic to UVA's 10 "
            "numbers)"
        )
    if missing := [name for name in spec.states if name not in widths]:
        raise UserError(
            f"this policy reads {', '.join(missing)}, which {path} does not hold with "
            f"config.data.layout as it is set; it holds {', '.join(widths)}"
        )
    for name, wanted in spec.state_dims:
        array, width = widths[name]
        if width != wanted:
            raise UserError(
                f"{path}: {array} is {width} numbers wide, but this policy's {name} is {wanted} "
                f"(by its normaliser): {own}"
            )
    total = sum(widths[name][1] for name in spec.states)
    if spec.state_dim not in (None, total):
        each = ", ".join(f"{array} {width}" for array, width in map(widths.get, spec.states))
        raise UserError(
            f"{path}: the arrays of the robot's state are {total} numbers wide together ({each}), "
            f"but this policy's state is {spec.state_dim}: {own}"
        )


def check_mirror(buffer: BufferView, options: DataOptions) -> None:
    """Raises UserError if `config.data.mirror` cannot mirror the frames or the actions."""
    if options.mirror != "pusht":
        return
    frame, width = buffer.shape(options.image_key)[1:3], buffer.shape(options.action_key)[1]
    if frame[0] != frame[1] or width != 2:
        raise UserError(
            f"config.data.mirror={options.mirror!r} mirrors square frames and actions that are "
            f"points, but data/{options.image_key} has frames of {frame[0]} x {frame[1]} and "
            f"data/{options.action_key} {width} numbers per step: set it to ''"
        )


def check_split(buffer: ReplayBuffer | BufferView, options: DataOptions, way_out: str = "") -> None:
    """Checks that the training episodes and the held-out episodes each hold a window.

    Args:
      buffer: the recording.
      options: of the split.
      way_out: a further remedy, appended to the error.

    Raises:
      UserError: there are no training windows or no held-out windows.
    """
    lengths = np.diff(buffer.episode_ends, prepend=0)
    long = last_current_steps(lengths, options) >= 0
    if not long.any():
        return  # `plan_strips` raises the error
    held_out = validation_mask(buffer.n_episodes, options.val_ratio, options.split_seed)
    said = f"(config.data.val_ratio={options.val_ratio:g}, split_seed={options.split_seed})"
    need = f"the {steps_of_a_window(options)} steps of a window"
    if not held_out.any() and buffer.n_episodes == 1:
        wrong = "holds one episode, so none can be held out for evaluation: give at least two"
    elif not held_out.any():
        wrong = (
            f"has no episode held out for evaluation {said}: set config.data.val_ratio above 0 "
            "(at least one episode is then held out)"
        )
    elif not (long & held_out).any():
        wrong = (
            f"has {held_out.sum()} of {buffer.n_episodes} episodes held out {said}, the longest of "
            f"{lengths[held_out].max()} steps, and none with {need}: raise config.data.val_ratio, "
            "or choose another config.data.split_seed"
        )
    elif not (long & ~held_out).any():
        wrong = (
            f"has all episodes with {need} held out {said}, and none to train on: lower "
            "config.data.val_ratio, or choose another config.data.split_seed"
        )
    else:
        return
    raise UserError(f"{buffer.path} {wrong}{way_out}")
