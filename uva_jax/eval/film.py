"""Writes predictions as a video, an image or arrays, with real frames above predicted ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uva_jax.eval import video
from uva_jax.eval.predict import Prediction
from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import new_file

SUFFIXES = (".mp4", ".gif", ".png", ".npz")
_TILE = 192  # frames are enlarged to about this many pixels
_FPS = 2.5  # frames are four steps apart, and most policies act at 10 Hz


def film(predictions: Sequence[Prediction], names: Sequence[str]) -> np.ndarray:
    """Returns windows side by side as one clip (2 n_frames, h, w, 3) uint8.

    Each camera has a row with the real frames, if the future is known, and below it a row with the
    given history followed by the predicted frames.
    """
    cameras = predictions[0].cameras
    halves = []
    for past in (True, False):
        clips, labels = [], []
        for camera in cameras:
            shown = [p.cameras[camera] for p in predictions]
            rows = {"predicted": [c.history if past else c.predicted for c in shown]}
            if all(c.future is not None for c in shown):
                rows = {"real": [c.history if past else c.future for c in shown]} | rows
            for kind, row in rows.items():
                said = "given" if past and kind == "predicted" else kind
                said = said if len(cameras) == 1 else f"{camera} {said}"
                # Only the top row shows names, because labels are narrow.
                labels += [said if labels else f"{said}: {n}" for n in names]
                blank = np.full_like(shown[0].predicted, 255)
                clips += [blank if clip is None else clip for clip in row]
        scale = max(1, round(_TILE / clips[0].shape[2]))
        halves.append(video.tile(clips, labels, len(predictions), scale))
    return np.concatenate(halves)


def write(path: Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """Writes predictions in the format of the file name's suffix: video, image or arrays.

    Raises:
      UserError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".npz":
            found = {
                f"{camera}_frames": np.stack([p.cameras[camera].predicted for p in predictions])
                for camera in predictions[0].cameras
            }
            if predictions[0].action is not None:
                found["action"] = np.stack([p.action for p in predictions])
            with new_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **found)
        elif suffix == ".png":  # time runs to the right, so windows are placed below each other
            parts = [film([p], [name]) for p, name in zip(predictions, names, strict=True)]
            video.write_strip(path, np.concatenate(parts, axis=1))
        else:
            writer = video.write_mp4 if suffix == ".mp4" else video.write_gif
            writer(path, film(predictions, names), _FPS)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error}") from error
