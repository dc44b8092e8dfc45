"""Windows of a replay buffer as batches: deterministic from (seed, step), prefetched, resumable.

The order is a pure function of seed and epoch and the position is one integer, so a run that saved
its step continues with the very batches that it would have seen.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from uva_jax.data.replay_buffer import ReplayBuffer, to_uint8
from uva_jax.data.sequences import window_rows
from uva_jax.runtime.errors import UserError

# The batch's name -> (the buffer's key, how many leading columns, all if None).
PUSHT_FIELDS = {"image": ("img", None), "agent_pos": ("state", 2), "action": ("action", None)}
_LOAD_STEPS = 256  # steps read at a time when a buffer is loaded whole


class WindowReader:
    """Reads windows of a replay buffer by number.

    Low-dimensional arrays are held in memory; image arrays too, as uint8, when all of them fit in
    `memory_bytes`. Otherwise only the frames asked for are read, in one gather a call.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        indices: np.ndarray,
        sequence_length: int,
        *,
        fields: Mapping[str, tuple[str, int | None]] = PUSHT_FIELDS,
        frame_indices: Sequence[int] | None = None,
        memory_bytes: int = 0,
    ):
        """Prepares to read.

        Args:
          indices: (n, 4) as from `sequences.create_indices`.
          fields: the batch's name -> (the buffer's key, leading columns or None for all).
          frame_indices: the window's positions whose frames are read; all by default.
          memory_bytes: what images may take in memory; 0 leaves them on the disk.

        Raises UserError when the buffer lacks an array or images are not in 0..255.
        """
        self._buffer = buffer
        self._rows = window_rows(indices, sequence_length)
        self._fields = dict(fields)
        self._positions = _checked_positions(frame_indices, sequence_length)
        self._frames = [n for n, (k, _) in fields.items() if buffer.is_frame(k)]
        self._arrays: dict[str, np.ndarray] = {}
        for name, (key, columns) in fields.items():
            if name not in self._frames:
                self._arrays[name] = np.asarray(buffer.read(key)[..., :columns], np.float32)
        sizes = [np.prod(buffer.shape(fields[name][0]), dtype=np.int64) for name in self._frames]
        if sum(sizes) <= memory_bytes:
            for name in self._frames:
                self._arrays[name] = _load_frames(buffer, fields[name][0])

    def __len__(self) -> int:
        return len(self._rows)

    def read(
        self, windows: np.ndarray, *, frame_indices: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """The windows of the given numbers (b,).

        `frame_indices` overrides the reader's own choice for this call (random history spacing).

        Returns:
          images uint8 (b, f, h, w, 3) and all other fields float32 (b, sequence_length, d).
        """
        rows = self._rows[np.asarray(windows)]  # (b, t)
        positions = self._positions
        if frame_indices is not None:
            positions = _checked_positions(frame_indices, rows.shape[1])
        frame_rows = rows if positions is None else rows[:, positions]
        batch = {
            name: array[frame_rows if name in self._frames else rows]
            for name, array in self._arrays.items()
        }
        on_disk = {self._fields[n][0]: frame_rows for n in self._frames if n not in batch}
        if on_disk:
            found = self._buffer.read_rows(on_disk)
            for name in set(self._frames) - set(batch):
                key = self._fields[name][0]
                batch[name] = to_uint8(found[key], f"{self._buffer.path}: data/{key}")
        return {name: batch[name] for name in self._fields}


class BatchLoader:
    """Shuffled batches of windows; a batch depends on the seed and its step alone.

    With several processes each reads its own slice of the global batch, in the order of
    `process_index`. An epoch's last incomplete batch is left out.
    """

    def __init__(
        self,
        reader: WindowReader,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`batch_size` is the global one. Raises UserError where it does not fit the data or
        the number of processes."""
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"the batch size {batch_size} must be a multiple of the {process_count} processes"
            )
        if len(reader) < batch_size:
            raise UserError(
                f"the data holds {len(reader)} windows, fewer than one batch of {batch_size}: use "
                "more episodes or a smaller batch"
            )
        self.steps_per_epoch = len(reader) // batch_size
        self._reader = reader
        self._batch_size = batch_size
        self._seed = seed
        share = batch_size // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    def windows(self, step: int) -> np.ndarray:
        """The numbers of this process's windows at `step`, int64 (local batch,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._order = epoch, rng.permutation(len(self._reader))
        start = place * self._batch_size
        return self._order[1][start : start + self._batch_size][self._share]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's part of the batch at `step`, as `WindowReader.read` gives it."""
        return self._reader.read(self.windows(step))

    def iterate(self, start: int, stop: int, *, prefetch: int = 2) -> Iterator[dict]:
        """Yields the batches of steps [start, stop), reading `prefetch` ahead in a thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            ahead: deque = deque()
            try:
                for step in range(start, stop):
                    ahead.append(thread.submit(self.batch, step))
                    if len(ahead) > prefetch:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


def _load_frames(buffer: ReplayBuffer, key: str) -> np.ndarray:
    frames = np.empty(buffer.shape(key), np.uint8)
    for start in range(0, buffer.n_steps, _LOAD_STEPS):
        stop = min(start + _LOAD_STEPS, buffer.n_steps)
        frames[start:stop] = to_uint8(buffer.read(key, start, stop), f"{buffer.path}: data/{key}")
    return frames


def _checked_positions(frame_indices, sequence_length: int) -> np.ndarray | None:
    if frame_indices is None:
        return None
    positions = np.asarray(frame_indices, np.int64)
    if positions.size and not (positions.min() >= 0 and positions.max() < sequence_length):
        raise ValueError(
            f"frames {positions.tolist()} were asked for in windows of {sequence_length} steps"
        )
    return positions
