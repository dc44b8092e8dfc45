"""Upstream's own replay buffers, whose images are stored by codecs that tensorstore cannot decode.

UMI's published recordings hold JPEG XL images, the caches of the Libero and robomimic loaders JPEG
2000, one image a chunk. Here they are read as `Recording`s, to be copied once into a plain buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore as ts

from uva_jax.data.replay_buffer import OWN_ATTRIBUTES, ReplayBuffer, read_json, to_uint8
from uva_jax.envs.workers import usable_cores
from uva_jax.runtime.errors import UserError

_DECODERS = {  # codec -> function of imagecodecs
    "imagecodecs_jpeg2k": "jpeg2k_decode",
    "imagecodecs_jpegxl": "jpegxl_decode",
}
_UPSIDE_DOWN = ("agentview_rgb",)  # Libero's images, which upstream turns when it reads them
_TOKENS = "language"  # the Libero cache's sentences, as CLIP's token numbers at every step


class EncodedBuffer(ReplayBuffer):
    """A replay buffer that also reads images stored one a chunk by `imagecodecs`."""

    codecs = (*ReplayBuffer.codecs, *_DECODERS)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Steps [start, stop) of one array; images are decoded on all cores.

        Raises:
          UserError: imagecodecs is missing, or a chunk is missing or damaged.
        """
        if self._codec(key) not in _DECODERS:
            return super().read(key, start, stop)
        return self._images(key, np.arange(start, self.n_steps if stop is None else stop))

    def read_rows(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `ReplayBuffer.read_rows`; errors as in `read`."""
        encoded = [key for key in rows if self._codec(key) in _DECODERS]
        found = super().read_rows({k: v for k, v in rows.items() if k not in encoded})
        for key in encoded:
            wanted = np.asarray(rows[key], np.int64)
            images = self._images(key, wanted.reshape(-1))
            found[key] = images.reshape(*wanted.shape, *images.shape[1:])
        return found

    def _codec(self, key: str) -> str | None:
        return (self._array(key)["compressor"] or {}).get("id")

    def _images(self, key: str, steps: np.ndarray) -> np.ndarray:
        metadata, item = self._array(key), self.shape(key)[1:]
        if metadata["chunks"] != [1, *item] or metadata.get("filters"):
            raise UserError(
                f"{self.path}: data/{key} has chunks of shape {metadata['chunks']}, where one "
                f"whole image of {item} a chunk is expected"
            )
        decode = _decoder(self._codec(key), self.path)
        inner = f"{self._kvstore.get('path', '')}data/{key}/"
        chunks = ts.KvStore.open({**self._kvstore, "path": inner}).result()
        separator = metadata.get("dimension_separator", ".")
        tail = f"{separator}0" * len(item)

        def image(step: int) -> np.ndarray:
            found = chunks.read(f"{step}{tail}").result()
            if found.state != "value":
                raise UserError(
                    f"{self.path}: image {step} of data/{key} is missing: the copy is incomplete"
                )
            try:
                return np.asarray(decode(found.value)).reshape(item)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{self.path}: image {step} of data/{key} is damaged: {error}"
                ) from error

        with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
            return np.stack(list(pool.map(image, steps.tolist())))


class ZarrRecording:
    """One of upstream's buffers, or its first episodes (a `Recording`)."""

    def __init__(self, path: Path, *, task: str | None, vocabulary: Path | None, limit: int | None):
        """Opens the buffer.

        Args:
          path: a folder or zip.
          task: the sentence for all its episodes.
          vocabulary: a folder with CLIP's vocab.json, or that file, for the Libero cache.
          limit: take that many episodes.

        Raises:
          UserError: it cannot be opened, needs no import, or its sentences cannot be read.
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
        """See `Recording.read`; images uint8, everything else in its own dtype."""
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
    """The recordings of several buffers; `tasks` holds one sentence for each.

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


def _decoder(codec: str, path: Path) -> Callable[[bytes], np.ndarray]:
    try:
        import imagecodecs
    except ImportError as error:
        raise UserError(
            f"{path} holds images of the codec {codec}, which imagecodecs reads: install it with "
            "pip install 'uva_jax[codecs]'"
        ) from error
    return getattr(imagecodecs, _DECODERS[codec])


def _words(vocabulary: Path | None, path: Path) -> dict[int, str]:
    """CLIP's vocabulary by number."""
    if vocabulary is None:
        raise UserError(
            f"{path} holds its tasks as CLIP's token numbers: name the folder that holds CLIP's "
            "vocab.json with --vocabulary, or the one task of this file with --task"
        )
    file = vocabulary / "vocab.json" if vocabulary.is_dir() else vocabulary
    if not file.is_file():
        raise UserError(f"there is no vocabulary {file}: name the folder of CLIP's vocab.json")
    return {number: word for word, number in read_json(file).items()}


def _sentence(tokens: np.ndarray, words: Mapping[int, str], path: Path) -> str:
    """The sentence of token numbers and their mask (2, length), in CLIP's lower case."""
    numbers = tokens[0][tokens[1] > 0].tolist()[1:-1]  # without start and end
    if unknown := [number for number in numbers if number not in words]:
        raise UserError(f"{path}: the vocabulary has no word number {unknown[0]}: is it CLIP's?")
    return "".join(words[number] for number in numbers).replace("</w>", " ").strip()
