"""Batches: a pure function of seed and step, the same from disk and memory, for any processes."""

import threading

import numpy as np
import pytest

from uva_jax.data.loader import BatchLoader, WindowReader
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import to_uint8_cache, write_replay_buffer
from uva_jax.data.sequences import create_indices, select_frames, window_rows
from uva_jax.runtime.errors import UserError

ENDS = np.array([50, 85, 145])
LENGTH = 32
INDICES = create_indices(ENDS, LENGTH, pad_before=1, pad_after=7)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "img": rng.integers(0, 256, (145, 20, 20, 3), np.uint8),
        "state": rng.normal(size=(145, 5)).astype(np.float32),
        "action": rng.uniform(0, 512, (145, 2)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return write_replay_buffer(tmp_path_factory.mktemp("data") / "b.zarr", arrays(), ENDS)


@pytest.fixture(scope="module")
def reader(buffer):
    return WindowReader(buffer, INDICES, LENGTH, memory_bytes=10**9)


def test_windows_hold_the_rows_of_their_indices(buffer):
    windows = np.array([0, 17, len(INDICES) - 1])
    batch = WindowReader(buffer, INDICES, LENGTH).read(windows)
    rows = window_rows(INDICES, LENGTH)[windows]
    assert list(batch) == ["image", "agent_pos", "action"]
    np.testing.assert_array_equal(batch["image"], arrays()["img"][rows])
    np.testing.assert_array_equal(batch["agent_pos"], arrays()["state"][rows][..., :2])
    np.testing.assert_array_equal(batch["action"], arrays()["action"][rows])
    assert batch["image"].dtype == np.uint8 and batch["agent_pos"].dtype == np.float32


def test_only_the_chosen_frames_are_read_from_images(buffer):
    frames = select_frames(LENGTH, train=True)
    some = WindowReader(buffer, INDICES, LENGTH, frame_indices=frames).read(np.arange(5))
    every = WindowReader(buffer, INDICES, LENGTH).read(np.arange(5))
    np.testing.assert_array_equal(some["image"], every["image"][:, frames])
    np.testing.assert_array_equal(some["action"], every["action"])


def test_a_call_can_choose_other_frames(reader):
    spaced = [0, 4, 9, 15, 19, 23, 27, 31]
    np.testing.assert_array_equal(
        reader.read(np.arange(3), frame_indices=spaced)["image"],
        reader.read(np.arange(3))["image"][:, spaced],
    )
    with pytest.raises(ValueError, match="windows of 32 steps"):
        reader.read(np.arange(3), frame_indices=[32])


def test_memory_and_disk_give_the_same(buffer, reader):
    disk = WindowReader(buffer, INDICES, LENGTH).read(np.arange(len(INDICES)))
    memory = reader.read(np.arange(len(INDICES)))
    for name in disk:
        np.testing.assert_array_equal(disk[name], memory[name])


def test_batches_depend_on_seed_and_step_alone(reader):
    forward = BatchLoader(reader, 8, seed=5)
    wanted = [forward.windows(step) for step in range(25)]
    again = BatchLoader(reader, 8, seed=5)
    for step in reversed(range(25)):  # as after a restart at any step
        np.testing.assert_array_equal(again.windows(step), wanted[step])
    other = BatchLoader(reader, 8, seed=6)
    assert any((other.windows(s) != wanted[s]).any() for s in range(3))


def test_an_epoch_shows_every_window_once_and_the_next_is_shuffled_anew(reader):
    loader = BatchLoader(reader, 8, seed=0)
    n = loader.steps_per_epoch
    first, second = (np.concatenate([loader.windows(e * n + s) for s in range(n)]) for e in (0, 1))
    assert n == len(reader) // 8
    assert len(set(first)) == len(set(second)) == 8 * n
    assert (first != second).any() and (np.diff(first) != 1).any()


def test_processes_share_the_global_batch_between_them(reader):
    whole = BatchLoader(reader, 8, seed=1).batch(3)
    parts = [
        BatchLoader(reader, 8, seed=1, process_index=i, process_count=4).batch(3) for i in range(4)
    ]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_prefetching_keeps_the_order_and_can_start_anywhere(reader):
    loader = BatchLoader(reader, 8, seed=2)
    for start, stop in ((0, 7), (5, 7), (6, 7), (7, 7)):
        batches = list(loader.iterate(start, stop))
        assert len(batches) == stop - start
        for step, batch in enumerate(batches, start):
            np.testing.assert_array_equal(batch["action"], loader.batch(step)["action"])


def test_leaving_the_iteration_early_ends_its_thread(reader):
    iteration = BatchLoader(reader, 8, seed=2).iterate(0, 1000)
    next(iteration)
    assert any(t.name.startswith("loader") for t in threading.enumerate())
    iteration.close()
    assert not any(t.name.startswith("loader") for t in threading.enumerate())


def test_an_error_while_prefetching_reaches_the_caller(tmp_path):
    buffer = write_replay_buffer(tmp_path / "b.zarr", arrays(), ENDS)
    (tmp_path / "b.zarr/data/img/1.0.0.0").unlink()
    loader = BatchLoader(WindowReader(buffer, INDICES, LENGTH), 16, seed=0)
    with pytest.raises(UserError, match="img cannot be read"):
        list(loader.iterate(0, 4))


def test_batches_that_cannot_be_made_are_explained(reader):
    with pytest.raises(UserError, match="fewer than one batch of 500"):
        BatchLoader(reader, 500, seed=0)
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        BatchLoader(reader, 8, seed=0, process_count=3)


@pytest.fixture(scope="module")
def float_buffer(tmp_path_factory):
    values = {**arrays(), "img": arrays()["img"].astype(np.float32)}
    return write_replay_buffer(tmp_path_factory.mktemp("float") / "f.zarr", values, ENDS)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_float_frames_come_out_as_uint8(float_buffer, memory):
    reader = WindowReader(float_buffer, INDICES, LENGTH, memory_bytes=memory)
    image = reader.read(np.array([3]))["image"]
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[0], arrays()["img"][window_rows(INDICES, LENGTH)[3]])


def test_frames_in_zero_to_one_are_refused(tmp_path):
    values = {**arrays(), "img": arrays()["img"].astype(np.float32) / 255}
    buffer = write_replay_buffer(tmp_path / "b.zarr", values, ENDS)
    with pytest.raises(UserError, match="pixel values in 0..255"):
        WindowReader(buffer, INDICES, LENGTH).read(np.array([0]))


def test_the_uint8_cache_holds_the_same_recording(float_buffer, tmp_path):
    seen = []
    cache = to_uint8_cache(float_buffer, tmp_path / "c", progress=lambda *p: seen.append(p))
    assert seen == [(145, 145)] and cache.dtype("img") == np.uint8
    np.testing.assert_array_equal(cache.read("img"), arrays()["img"])
    np.testing.assert_array_equal(cache.read("state"), arrays()["state"])
    np.testing.assert_array_equal(cache.episode_ends, ENDS)
    seen.clear()
    to_uint8_cache(float_buffer, tmp_path / "c", progress=lambda *p: seen.append(p))
    assert not seen and ReplayBuffer.open(tmp_path / "c").n_steps == 145
