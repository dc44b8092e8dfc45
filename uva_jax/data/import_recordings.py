"""Converts recordings of Libero, robomimic and UMI to replay buffers in the form of the policies.

Arrays keep the names of upstream's `shape_meta`; `action` becomes position, rotation_6d and
gripper. Files are read in parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from uva_jax.data.replay_buffer import Progress, ReplayBuffer
from uva_jax.data.replay_writer import ReplayBufferWriter
from uva_jax.data.zarr_container import not_hdf5
from uva_jax.envs.rotations import actions_to_10d
from uva_jax.runtime.errors import UserError

_LIBERO_FILE = "_demo.hdf5"
# Absolute targets are close to the hand; relative ones are small numbers anywhere. The distance to
# the hand over the distance to 0 is about 0.1 for absolute targets of Libero and robomimic, else 1.
_NEAR = 0.5
_ACTIONS = ("actions_abs", "actions")  # robomimic 0.5 stores absolute and relative ones
_BLOCK = 128  # steps that are read at once


class Recording(Protocol):
    """Episodes that are read in parts.

    Attributes:
      name: of the source; the written buffer records it.
      tasks: the sentence of each episode's task, or ().
      lengths: (episodes,) steps.
      arrays: key -> (shape of one step, dtype).
    """

    name: str
    tasks: tuple[str, ...]
    lengths: np.ndarray
    arrays: dict[str, tuple[tuple[int, ...], str]]

    def read(self, key: str, start: int, stop: int) -> np.ndarray:
        """Reads steps [start, stop) of the concatenated episodes, (stop - start, *item)."""


class _Layout(NamedTuple):
    """The names of a policy's inputs below data/demo_<i>/obs of a type of HDF5 file."""

    frames: tuple[str, ...]
    states: tuple[str, ...]
    positions: tuple[
        str, ...
    ]  # arrays that begin with the hand's position, in the frame of absolute actions
    upside_down: bool  # Libero stores MuJoCo's images, whose first row is at the bottom


LAYOUTS = {
    "libero": _Layout(("agentview_rgb",), (), ("ee_pos", "ee_states"), True),
    "robomimic": _Layout(
        ("robot0_eye_in_hand_image", "sideview_image"),
        ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
        ("robot0_eef_pos",),
        False,
    ),
}


class Hdf5Recording:
    """The demonstrations of an HDF5 file of Libero or robomimic, as a `Recording`.

    Attributes:
      notes: sentences for the user.
    """

    def __init__(self, path: Path, layout: _Layout, task: str | None, limit: int | None):
        """Opens the file and checks every demonstration.

        Args:
          path: the file.
          layout: names of its arrays.
          task: sentence of its task, or None.
          limit: number of demonstrations, from the first; None: all.

        Raises:
          UserError: the file is not HDF5 or has no demonstrations; an array is missing, has another
            shape or is not finite; or the actions are not absolute.
        """
        self.path, self.name = path, f"{path.name} {path.stat().st_size}"
        self._layout = layout
        h5py = _h5py()
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            said = f"{path} is not a readable HDF5 file: {error}"
            raise UserError(not_hdf5(path) or said) from error
        group = self._file.get("data")
        group = group if isinstance(group, h5py.Group) else {}
        numbers = sorted(int(m[1]) for m in (re.fullmatch(r"demo_(\d+)", k) for k in group) if m)
        self._demos = [group[f"demo_{number}"] for number in numbers[:limit]]
        if not self._demos:
            found = ", ".join(self._file) or "nothing"
            raise UserError(f"{path} holds no demonstrations data/demo_<number>; it holds {found}")
        with_absolute = sum(_ACTIONS[0] in demo for demo in self._demos)
        self._actions = _ACTIONS[with_absolute < len(self._demos)]
        # An import that began with the other actions must not go on with these.
        self.name += f" {_ACTIONS[0]}" * (self._actions == _ACTIONS[0])
        self.tasks = () if task is None else (task,) * len(self._demos)
        self.lengths = np.array([self._length(demo) for demo in self._demos])
        first = self._demos[0]
        self.arrays = {
            key: (first[f"obs/{key}"].shape[1:], "uint8" if key in layout.frames else "float32")
            for key in layout.frames + layout.states
        }
        self.arrays["action"] = ((10,), "float32")
        self.notes: list[str] = []
        self._check_numbers()
        self._starts = np.append(0, np.cumsum(self.lengths))

    def read(self, key: str, start: int, stop: int) -> np.ndarray:
        """Reads as `Recording.read`; images are uint8, other arrays float32."""
        parts = []
        episodes = zip(self._demos, self._starts[:-1], self._starts[1:], strict=True)
        for demo, begin, end in episodes:
            if begin < stop and end > start:
                values = demo[self._actions if key == "action" else f"obs/{key}"]
                parts.append(self._read(values, max(start - begin, 0), min(stop, end) - begin))
        values = np.concatenate(parts)
        if key == "action":
            return actions_to_10d(values)
        if key not in self._layout.frames:
            return values.astype(np.float32)
        return values[:, ::-1] if self._layout.upside_down else values

    def _read(self, values, start: int = 0, stop: int | None = None) -> np.ndarray:
        try:
            return values[start:stop]
        except OSError as error:
            raise UserError(f"{self.path}: {values.name} is damaged: {error}") from error

    def _length(self, demo) -> int:
        """Checks a demonstration and returns its number of steps."""
        frames, states = self._layout.frames, self._layout.states
        actions = self._actions
        wanted = [actions, *(f"obs/{key}" for key in (*frames, *states))]
        if missing := [key for key in wanted if key not in demo]:
            found = ", ".join([*demo, *(f"obs/{key}" for key in demo.get("obs", {}))]) or "nothing"
            raise UserError(
                f"{self.path}: {demo.name} lacks {', '.join(missing)}; it holds {found}"
            )
        steps, first = (demo[actions].shape or (0,))[0], self._demos[0]
        for key in wanted:
            if demo[key].shape != (steps, *first[key].shape[1:]) or not steps:
                raise UserError(
                    f"{self.path}: {demo.name}/{key} has shape {demo[key].shape}, where {steps} "
                    f"steps of {first[key].shape[1:]} are expected"
                )
            if key.removeprefix("obs/") not in frames and demo[key].dtype.kind not in "iuf":
                raise UserError(
                    f"{self.path}: {demo.name}/{key} holds {demo[key].dtype}, not real numbers"
                )
        if demo[actions].shape[1:] != (7,):
            raise UserError(
                f"{self.path}: {demo.name}/{actions} has shape {demo[actions].shape}, but 7 "
                "numbers per step are expected: position, axis-angle and gripper of one arm"
            )
        if bad := [key for key in frames if demo[f"obs/{key}"].dtype != np.uint8]:
            raise UserError(
                f"{self.path}: {demo.name}/obs/{bad[0]} does not hold uint8 pixels: convert it"
            )
        return steps

    def _check_numbers(self) -> None:
        """Checks the values of all actions and states, and notes what could not be checked.

        Raises:
          UserError: values are not finite, or the actions are relative, while UVA learns absolute
            ones.
        """
        unknown = 0
        for demo in self._demos:
            for key in (self._actions, *(f"obs/{key}" for key in self._layout.states)):
                bad = np.argwhere(~np.isfinite(self._read(demo[key])))
                if len(bad):
                    raise UserError(
                        f"{self.path}: {demo.name}/{key} is not finite at step {bad[0][0]} "
                        "(counted from 0): correct the file, or leave that demonstration out"
                    )
            hand = self._hand(demo)
            unknown += hand is None
            if hand is not None:
                self._check_absolute(demo, hand)
        if self._actions == _ACTIONS[0]:
            self.notes.append(f"{self.path}: actions_abs is read in place of actions")
        if unknown:
            wanted = " or ".join(f"obs/{name}" for name in self._layout.positions)
            self.notes.append(
                f"{self.path}: {unknown} of {len(self._demos)} demonstrations lack the hand's "
                f"position ({wanted}), so it could not be checked that their actions are absolute, "
                "as UVA needs them"
            )

    def _check_absolute(self, demo, hand: np.ndarray) -> None:
        targets = self._read(demo[self._actions])[:, :3]
        away, long = (
            float(np.median(np.linalg.norm(x, axis=1))) for x in (targets - hand, targets)
        )
        if away <= _NEAR * long:
            return
        held = sum(_ACTIONS[0] in demo for demo in self._demos)
        raise UserError(
            f"{self.path}: the actions of {demo.name} are {away:.2g} m away from the hand and "
            f"{long:.2g} m from 0, so they are relative, which UVA does not use: give the "
            "file of absolute actions (robomimic: image_abs.hdf5, or a file with actions_abs, "
            f"which {held} of {len(self._demos)} demonstrations here hold; Libero: upstream's "
            "converted .zarr.zip with --kind zarr)"
        )

    def _hand(self, demo) -> np.ndarray | None:
        """Reads the hand's positions (steps, 3) in metres, or returns None if there are none."""
        for name in self._layout.positions:
            place = demo.get(f"obs/{name}")
            shape = getattr(place, "shape", ())
            if len(shape) == 2 and shape[0] == len(demo[self._actions]) and shape[1] >= 3:
                found = self._read(place)[:, :3]
                return found if np.isfinite(found).all() else None
        return None


def open_hdf5(kind: str, sources: Sequence[Path], limit: int | None) -> list[Hdf5Recording]:
    """Opens files, or folders of files, in the order of their names.

    Args:
      kind: "libero" or "robomimic".
      sources: files or folders.
      limit: number of demonstrations of every file; None: all.

    Raises:
      UserError: there are no files, or a file does not fit.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = sorted([*source.glob("*.hdf5"), *source.glob("*.h5")])
            if not found:
                raise UserError(not_hdf5(source) or f"{source} holds no .hdf5 files")
            files += found
        elif source.exists():
            files.append(source)
        else:
            raise UserError(f"there is no file {source}: check the path")
    tasks: list[str | None] = [None] * len(files)
    if kind == "libero":
        for number, file in enumerate(files):
            if not file.name.endswith(_LIBERO_FILE):
                raise UserError(
                    f"{file} is not named <task>{_LIBERO_FILE}, but the name of Libero's files is "
                    "the sentence of their task: rename it"
                )
            tasks[number] = file.name.removesuffix(_LIBERO_FILE).replace("_", " ")
    layout = LAYOUTS[kind]
    return [Hdf5Recording(f, layout, t, limit) for f, t in zip(files, tasks, strict=True)]


def write_recordings(
    out: str | os.PathLike,
    recordings: Sequence[Recording],
    *,
    progress: Progress | None = None,
) -> ReplayBuffer:
    """Writes recordings as one replay buffer, or resumes an unfinished one.

    Args:
      out: the folder.
      recordings: with equal arrays; their tasks become the buffer's.
      progress: called with (steps done, total steps).

    Raises:
      UserError: the recordings' arrays differ, only some name a task, or `out` holds something
        else.
    """
    first = recordings[0]
    for other in recordings[1:]:
        if other.arrays != first.arrays:
            raise UserError(
                f"{other.name} and {first.name} do not fit into one buffer, they hold "
                f"{other.arrays} and {first.arrays}: import them separately"
            )
    lengths = np.concatenate([r.lengths for r in recordings])
    shown = [task for r in recordings for task in r.tasks]
    if shown and len(shown) != len(lengths):
        raise UserError("either all or none of the recordings must have sentences of tasks")
    tasks = list(dict.fromkeys(shown))
    writer = ReplayBufferWriter.create(
        out,
        first.arrays,
        np.cumsum(lengths),
        attributes={"imported_from": [r.name for r in recordings]},
        tasks=tasks,
        episode_task=np.array([tasks.index(task) for task in shown], np.int64),
    )
    if writer.complete:
        return ReplayBuffer.open(out)
    ends = np.cumsum([r.lengths.sum() for r in recordings])
    for unit in writer.missing_units():
        start, stop = writer.unit_range(unit)
        values = {k: np.empty((stop - start, *s), d) for k, (s, d) in first.arrays.items()}
        for recording, end in zip(recordings, ends, strict=True):
            begin = end - recording.lengths.sum()
            for step in range(max(start, begin), min(stop, end), _BLOCK):
                until = min(step + _BLOCK, stop, end)
                for key, target in values.items():
                    target[step - start : until - start] = recording.read(
                        key, step - begin, until - begin
                    )
        writer.write_unit(unit, values)
        del values  # frees memory before the next unit is read
        if progress is not None:
            progress(stop, writer.n_steps)
    return writer.finish()


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "reading HDF5 files needs h5py: install it with pip install 'uva_jax[hdf5]'"
        ) from error
    return h5py
