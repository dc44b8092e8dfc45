"""Reads upstream's own replay buffers, whose image codecs tensorstore does not support.

UMI's published recordings hold JPEG XL images, the caches of the Libero and robomimic loaders JPEG
2000, one image per chunk. They are read as `Recording`s and copied once into a plain buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uva_jax.data.replay_buffer import OWN_ATTRIBUTES, ReplayBuffer, read_json, to_uint8
from uva_jax.runtime.errors import UserError

_UPSIDE_DOWN = ("agentview_rgb",)  # Libero's images, which upstream rotates when it reads them
_TOKENS = "language"  # the Libero cache's sentences, as CLIP's token numbers at every step


class EncodedBuffer(ReplayBuffer):
    """A replay buffer that also reads encoded images, one per chunk."""

    reads_images = True


class ZarrRecording:
    """One of upstream's buffers, or its first episodes, as a `Recording`."""

    def __init__(self, path: Path, *, task: str | None, vocabulary: Path | None, limit: int | None):
        """Opens the buffer.

        Args:
          path: a folder or zip.
          task: sentence for all its episodes.
          vocabulary: a folder with CLIP's vocab.json, or that file, for the Libero cache.
          limit: number of episodes, from the first; None: all.

        Raises:
          UserError: the buffer cannot be opened, needs no import, or its sentences cannot be read.
        """
        self.buffer = EncodedBuffer.open(path)
        if OWN_ATTRIBUTES in self.buffer.attributes:
            raise UserError(f"{path} was written by uva_jax and needs no import: use it as it is")
        ends = self.buffer.episode_ends[:limit]
        self.name = f"{path.name} {self.buffer.fingerprint()}"
        self.lengths = np.diff(ends, prepend=0)
        keys = [key for key in self.buffer.keys if key != _TOKENS]
        self.arrays = {
            key: (self.buffer.shape(key)[1:], np.dtype(self._dtype(key)).str) for key in keys
        }
        self.tasks: tuple[str, ...] = ()
        if task is not None:
            self.tasks = (task,) * len(ends)
        elif _TOKENS in self.buffer.keys:
            words = _words(vocabulary, path)
            tokens = self.buffer.read_rows({_TOKENS: ends - self.lengths})[_TOKENS]
            self.tasks = tuple(_sentence(row, words, path) for row in tokens)

    def _dtype(self, key: str):
        return np.uint8 if self.buffer.is_frame(key) else self.buffer.dtype(key)

    def read(self, key: str, start: int, stop: int) -> np.ndarray:
        """Reads as `Recording.read`; images are uint8, other arrays keep their dtype."""
        values = self.buffer.read(key, start, stop)
        if self.buffer.is_frame(key):
            values = to_uint8(values, f"{self.buffer.path}: data/{key}")
        return values[:, ::-1] if key in _UPSIDE_DOWN else values


def open_zarr(
    sources: Sequence[Path],
    tasks: Sequence[str] | None,
    vocabulary: Path | None,
    limit: int | None,
) -> list[ZarrRecording]:
    """Opens several buffers; `tasks` holds one sentence for each.

    Raises:
      UserError: counts differ, or a buffer cannot be used.
    """
    if tasks and len(tasks) != len(sources):
        raise UserError(
            f"--task was given {len(tasks)} times for {len(sources)} files: give it once for each, "
            "in their order"
        )
    return [
        ZarrRecording(source, task=task, vocabulary=vocabulary, limit=limit)
        for source, task in zip(sources, tasks or [None] * len(sources), strict=True)
    ]


def _words(vocabulary: Path | None, path: Path) -> dict[int, str]:
    """Returns CLIP's vocabulary by number."""
    if vocabulary is None:
        raise UserError(
            f"{path} holds its tasks as CLIP's token numbers: give the folder of CLIP's vocab.json "
            "with --vocabulary, or the task of this file with --task"
        )
    file = vocabulary / "vocab.json" if vocabulary.is_dir() else vocabulary
    if not file.is_file():
        raise UserError(f"there is no vocabulary {file}: give the folder of CLIP's vocab.json")
    return {number: word for word, number in read_json(file).items()}


def _sentence(tokens: np.ndarray, words: Mapping[int, str], path: Path) -> str:
    """Returns the sentence of token numbers and their mask (2, length), in lower case."""
    numbers = tokens[0][tokens[1] > 0].tolist()[1:-1]  # without start and end
    if unknown := [number for number in numbers if number not in words]:
        raise UserError(
            f"{path}: the vocabulary has no word number {unknown[0]}: give CLIP's vocabulary"
        )
    return "".join(words[number] for number in numbers).replace("</w>", " ").strip()
