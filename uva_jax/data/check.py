"""Demonstrations held against the policy that reads them, before anything is computed.

Recordings keep frames with their channels first or last, with alpha or in gray, and single numbers
without an axis of their own. `AsRead` gives them all one form, refuses what has none, and finds
numbers that are not finite; `check_widths` compares with the policy, `check_split` asks whether
there are windows to train on and to judge by.
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
_LOOKED_AT = 8  # frames that tell the range of pixels which are not uint8


class _Frames(NamedTuple):
    """How an array keeps its frames: the channels' axis in a step (None: gray without one)."""

    axis: int | None
    channels: int
    size: tuple[int, int]

    @classmethod
    def of(cls, item: tuple[int, ...]) -> _Frames | None:
        """The form of frames of that shape; None: it is no frame's.

        Where both ends could be channels, they are at the end that leaves the larger frame.
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
        """What is done with them, if they are not (h, w, 3) already."""
        said = ["with its channels first"] if self.axis == 0 else []
        said += ["without its fourth channel, alpha"] if self.channels == 4 else []
        said += ["as gray, which is shown as red, green and blue"] if self.channels == 1 else []
        return " and ".join(said)

    def shown(self, values: np.ndarray) -> np.ndarray:
        """Stored frames (..., *item) as (..., h, w, 3)."""
        if self.axis is None:
            values = values[..., None]
        elif self.axis == 0:
            values = np.moveaxis(values, -3, -1)
        if self.channels == 1:
            values = np.repeat(values, 3, axis=-1)
        return np.ascontiguousarray(values[..., :3])


class AsRead:
    """A replay buffer whose arrays have the form that policies take; else as the buffer it is of.

    Frames are (n, h, w, 3) uint8 and numbers (n, k), as soon as an array was announced with
    `take_frames` or `take_numbers`.

    Attributes:
      notes: what was done to arrays of another form, a sentence each.
    """

    def __init__(self, buffer: ReplayBuffer):
        self._buffer = buffer
        self._frames: dict[str, _Frames] = {}
        self._numbers: list[str] = []
        self.notes: list[str] = []

    def __getattr__(self, name: str):
        return getattr(self._buffer, name)

    def take_frames(self, key: str) -> None:
        """Announces an array of frames.

        Raises:
          UserError: the array is not there, holds no frames, or pixels out of range in those few
            of its frames that are looked at.
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
            to_uint8(found, f"{self.path}: data/{key}")  # that they are not 0..1, all together

    def take_numbers(self, key: str, width: int | None = None) -> None:
        """Announces an array of numbers, `width` a step (None: any). `check_finite` reads them.

        Raises:
          UserError: the array is not there, or holds something else.
        """
        shape, dtype = self._buffer.shape(key), self._buffer.dtype(key)
        if len(shape) not in (1, 2) or not all(shape) or dtype.kind not in "biuf":
            raise UserError(
                f"{self.path}: data/{key} is {dtype} of shape {shape}, where a row of numbers for "
                "each step is expected, (n, k)"
            )
        if key not in self._numbers:
            self._numbers.append(key)
        if width is not None and self.shape(key)[1] != width:
            raise UserError(
                f"{self.path}: data/{key} is {self.shape(key)[1]} numbers wide, where {width} are "
                "expected"
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
                "where only finite numbers make sense: mend the recording, or leave the episode out"
            )

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole array's shape, steps first."""
        shape = self._buffer.shape(key)
        if key in self._frames:
            return (shape[0], *self._frames[key].size, 3)
        return (*shape, 1) if key in self._numbers and len(shape) == 1 else shape

    def dtype(self, key: str) -> np.dtype:
        return np.dtype(np.uint8) if key in self._frames else self._buffer.dtype(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Steps [start, stop) of one array.

        Raises:
          UserError: a frame's pixels are out of range or not finite.
        """
        values = self._buffer.read(key, start, stop)
        return self._given(key, values, np.arange(start, start + len(values)))

    def read_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `ReplayBuffer.read_rows`; errors as in `read`."""
        found = self._buffer.read_rows(rows)
        return {key: self._given(key, found[key], np.asarray(rows[key])) for key in rows}

    def _given(self, key: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Values (*rows.shape, ...) in the announced form."""
        if key in self._frames:
            return self._frames[key].shown(self._pixels(key, values, rows))
        if key in self._numbers and values.ndim == rows.ndim:
            return values[..., None]
        return values

    def _pixels(self, key: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Stored pixels as uint8; frames may be all dark."""
        if values.dtype == np.uint8:
            return values
        flat = values.reshape(rows.size, -1)
        bad = ~((flat.min(axis=1) >= 0) & (flat.max(axis=1) <= 255))  # NaN is bad too
        if bad.any():
            row = int(bad.argmax())
            low, high = flat[row].min(), flat[row].max()
            raise UserError(
                f"{self._place(key, rows.reshape(-1)[row])}, is a frame whose pixels range from "
                f"{low:g} to {high:g}, where 0..255 is expected: mend the recording, or leave the "
                "episode out"
            )
        return np.rint(values).astype(np.uint8)

    def _place(self, key: str, row: int) -> str:
        episode = int(np.searchsorted(self.episode_ends, row, side="right"))
        step = row - (self.episode_ends[episode - 1] if episode else 0)
        return f"{self.path}: data/{key}[{row}], step {step} of episode {episode} (counted from 0)"


def check_widths(spec: WindowSpec, widths: Mapping[str, tuple[str, int]], path: str) -> None:
    """Compares what the data give with what a policy takes, where the policy says.

    Args:
      spec: of the policy.
      widths: for "action" and every state, the array that it comes from, and numbers a step.
      path: the data's.

    Raises:
      UserError: they differ; both numbers and the arrays are named.
    """
    own = "give the data that it was trained on"
    array, width = widths["action"]
    if spec.action_dim not in (None, width):
        raise UserError(
            f"{path}: {array} is {width} numbers wide, but this policy's actions are "
            f"{spec.action_dim}: {own}, or name another array with config.data.action_key "
            "(python -m uva_jax import turns actions of Libero and robomimic into the 10 numbers "
            "that UVA learns)"
        )
    if missing := [name for name in spec.states if name not in widths]:
        raise UserError(
            f"this policy reads {', '.join(missing)}, which {path} does not give as it is laid out "
            f"(config.data.layout); it gives {', '.join(widths)}"
        )
    for name, wanted in spec.state_dims:
        array, width = widths[name]
        if width != wanted:
            raise UserError(
                f"{path}: {array} is {width} numbers wide, but this policy's {name} is {wanted} "
                f"(its normaliser has so many): {own}"
            )
    total = sum(widths[name][1] for name in spec.states)
    if spec.state_dim not in (None, total):
        each = ", ".join(f"{array} {width}" for array, width in map(widths.get, spec.states))
        raise UserError(
            f"{path}: the arrays of the robot's state are {total} numbers wide together ({each}), "
            f"but this policy's state is {spec.state_dim}: {own}"
        )


def check_mirror(buffer: AsRead, options: DataOptions) -> None:
    """Raises UserError for data that `config.data.mirror` has no mirror image for."""
    if options.mirror != "pusht":
        return
    frame, width = buffer.shape(options.image_key)[1:3], buffer.shape(options.action_key)[1]
    if frame[0] != frame[1] or width != 2:
        raise UserError(
            f"config.data.mirror={options.mirror!r} mirrors square frames and actions that are "
            f"points, but data/{options.image_key} has frames of {frame[0]} x {frame[1]} and "
            f"data/{options.action_key} {width} numbers a step: set it to ''"
        )


def check_split(buffer: ReplayBuffer | AsRead, options: DataOptions, way_out: str = "") -> None:
    """Asks whether both parts of the episodes, training and held-out, have a window.

    Args:
      buffer: the data.
      options: says which episodes are held out.
      way_out: what else can be done, at the end of the sentence.

    Raises:
      UserError: one of them has none.
    """
    lengths = np.diff(buffer.episode_ends, prepend=0)
    long = last_current_steps(lengths, options) >= 0
    if not long.any():
        return  # said by `plan_strips`
    held_out = validation_mask(buffer.n_episodes, options.val_ratio, options.split_seed)
    said = f"(config.data.val_ratio={options.val_ratio:g}, split_seed={options.split_seed})"
    need = f"the {steps_of_a_window(options)} steps of a window"
    if not held_out.any() and buffer.n_episodes == 1:
        wrong = "holds one episode, so that none can be held out to judge by: give at least two"
    elif not held_out.any():
        wrong = (
            f"has no episode held out to judge by {said}: set config.data.val_ratio above 0 (at "
            "least one episode is then held out)"
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
