"""Replay buffers: written and read back, from folders and zips; errors for bad input."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import tensorstore as ts

from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import (
    UNIT_STEPS,
    ReplayBufferWriter,
    to_uint8_cache,
    write_replay_buffer,
)
from uva_jax.runtime.errors import UserError

ENDS = np.array([40, 65, 125])


def arrays(n=125, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "img": rng.integers(0, 256, (n, 20, 20, 3), np.uint8),
        "state": rng.normal(size=(n, 5)).astype(np.float32),
        "action": rng.uniform(0, 512, (n, 2)).astype(np.float32),
    }


@pytest.fixture
def folder(tmp_path):
    write_replay_buffer(tmp_path / "b.zarr", arrays(), ENDS)
    return tmp_path / "b.zarr"


def zip_up(folder, target, inside=""):
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{inside}{file.relative_to(folder)}")
    return target


def test_what_was_written_is_read_back(folder):
    buffer = ReplayBuffer.open(folder)
    assert buffer.keys == ("action", "img", "state")
    assert (buffer.n_episodes, buffer.n_steps) == (3, 125)
    np.testing.assert_array_equal(buffer.episode_ends, ENDS)
    for key, value in arrays().items():
        assert (buffer.shape(key), buffer.dtype(key)) == (value.shape, value.dtype)
        np.testing.assert_array_equal(buffer.read(key), value)
        np.testing.assert_array_equal(buffer.read(key, 30, 71), value[30:71])


def test_the_layout_is_that_of_diffusion_policy(folder):
    for group in ("", "data", "meta"):
        assert json.loads((folder / group / ".zgroup").read_text()) == {"zarr_format": 2}
        assert (folder / group / ".zattrs").is_file()
    described = json.loads((folder / "data/img/.zarray").read_text())
    assert described["zarr_format"] == 2 and described["dtype"] == "|u1"
    assert described["compressor"]["id"] == "blosc" and described["chunks"][1:] == [20, 20, 3]
    assert json.loads((folder / "meta/episode_ends/.zarray").read_text())["dtype"] == "<i8"


@pytest.mark.parametrize("inside", ["", "pusht/pusht_cchi_v7_replay.zarr/"])
def test_a_zip_reads_like_its_folder(folder, tmp_path, inside):
    zipped = ReplayBuffer.open(zip_up(folder, tmp_path / "b.zarr.zip", inside))
    plain = ReplayBuffer.open(folder)
    assert zipped.keys == plain.keys and zipped.attributes == plain.attributes
    assert zipped.fingerprint() == plain.fingerprint()
    np.testing.assert_array_equal(zipped.read("img"), plain.read("img"))


def test_a_buffer_written_by_others_is_read(tmp_path):
    values = arrays()
    for name, value, chunk in (
        ("data/img", values["img"].astype(np.float32), 50),
        ("data/action", values["action"], 50),
        ("meta/episode_ends", ENDS, 3),
    ):
        metadata = {
            "shape": list(value.shape),
            "chunks": [chunk, *value.shape[1:]],
            "dtype": value.dtype.str,
            "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2},
        }
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/{name}/"},
            "metadata": metadata,
        }
        ts.open(spec, create=True).result().write(value).result()
    buffer = ReplayBuffer.open(tmp_path, required=("img", "action"))
    assert buffer.dtype("img") == np.float32
    np.testing.assert_array_equal(buffer.read("img", 45, 60), values["img"][45:60])


def test_rows_are_gathered_in_any_shape_and_order(folder):
    rows = np.array([[124, 0, 0], [64, 65, 3]])
    found = ReplayBuffer.open(folder).read_rows({"img": rows, "action": rows[0]})
    np.testing.assert_array_equal(found["img"], arrays()["img"][rows])
    np.testing.assert_array_equal(found["action"], arrays()["action"][rows[0]])


@pytest.mark.parametrize("rows", [[0, 125], [-1, 3]])
def test_rows_outside_the_buffer_are_refused(folder, rows):
    with pytest.raises(ValueError, match="it has 125 steps"):
        ReplayBuffer.open(folder).read_rows({"img": np.array(rows)})


def test_the_fingerprint_tells_recordings_apart(folder, tmp_path):
    same = write_replay_buffer(tmp_path / "same.zarr", arrays(), ENDS)
    other = write_replay_buffer(tmp_path / "other.zarr", arrays(seed=1), ENDS)
    mine = ReplayBuffer.open(folder).fingerprint()
    assert same.fingerprint() == mine != other.fingerprint()


def damage_nothing(folder):
    shutil.rmtree(folder)


def damage_zarr3(folder):
    shutil.rmtree(folder / "data")
    (folder / "zarr.json").write_text("{}")


def damage_no_ends(folder):
    shutil.rmtree(folder / "meta/episode_ends")


def damage_short_array(folder):
    write_replay_buffer(folder.parent / "short.zarr", arrays(124), np.array([40, 65, 124]))
    shutil.rmtree(folder / "data/action")
    shutil.copytree(folder.parent / "short.zarr/data/action", folder / "data/action")


def damage_unfinished(folder):
    text = (folder / ".zattrs").read_text()
    (folder / ".zattrs").write_text(text.replace('"complete": true', '"complete": false'))


def damage_metadata(folder):
    (folder / "data/img/.zarray").write_text('{"shape": [12')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing, "there is no replay buffer at"),
        (damage_zarr3, "zarr of version 3"),
        (damage_no_ends, "lacks meta/episode_ends; it holds data/action, data/img, data/state"),
        (damage_short_array, r"data/action has shape \(124, 2\), but .* 125 steps"),
        (damage_unfinished, "is unfinished"),
        (damage_metadata, "img/.zarray is not readable JSON"),
    ],
)
def test_a_bad_buffer_is_explained(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        ReplayBuffer.open(folder)


def test_a_missing_array_is_named_beside_what_is_there(folder):
    with pytest.raises(UserError, match="lacks data/wrist; it holds data/action, data/img"):
        ReplayBuffer.open(folder, required=("img", "wrist"))


def test_the_folder_above_a_buffer_gives_a_hint(folder):
    with pytest.raises(UserError, match=f"did you mean {folder}"):
        ReplayBuffer.open(folder.parent)


@pytest.mark.parametrize("content", [None, b"not a chunk"])
def test_a_missing_or_damaged_chunk_is_an_error_and_not_zeros(folder, content):
    chunk = folder / "data/img/2.0.0.0"
    chunk.unlink() if content is None else chunk.write_bytes(content)
    buffer = ReplayBuffer.open(folder)
    buffer.read("img", 0, 64)
    with pytest.raises(UserError, match="img cannot be read .* incomplete or damaged"):
        buffer.read_rows({"img": np.array([70])})


def test_a_zip_without_a_buffer_and_a_file_that_is_no_zip_are_explained(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes/readme.txt", "hello")
    with pytest.raises(UserError, match="holds 0; found notes"):
        ReplayBuffer.open(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes(b"PK or not")
    with pytest.raises(UserError, match="neither a zarr folder nor a readable zip"):
        ReplayBuffer.open(tmp_path / "b.zip")


def long_writer(path, **attributes):
    described = {"state": ((5,), "float32"), "action": ((2,), "float32")}
    ends = np.array([UNIT_STEPS, 2 * UNIT_STEPS + 7])
    return ReplayBufferWriter.create(path, described, ends, attributes=attributes)


def unit_values(writer, unit):
    rows = np.arange(*writer.unit_range(unit), dtype=np.float32)
    return {"state": np.repeat(rows[:, None], 5, 1), "action": np.repeat(rows[:, None], 2, 1)}


def test_an_interrupted_writer_goes_on_with_the_missing_units(tmp_path):
    writer = long_writer(tmp_path / "w")
    writer.write_unit(1, unit_values(writer, 1))
    again = long_writer(tmp_path / "w")
    assert not again.complete and again.missing_units() == [0, 2]
    with pytest.raises(ValueError, match=r"units \[0, 2\] of 3 are not written"):
        again.finish()
    for unit in again.missing_units():
        again.write_unit(unit, unit_values(again, unit))
    buffer = again.finish()
    assert long_writer(tmp_path / "w").complete
    np.testing.assert_array_equal(buffer.read("action")[:, 0], np.arange(2 * UNIT_STEPS + 7))


def test_a_unit_counts_only_when_its_last_array_is_there(tmp_path):
    writer = long_writer(tmp_path / "w")
    writer.write_unit(0, unit_values(writer, 0))
    (tmp_path / "w/data/action/0.0").unlink()
    assert long_writer(tmp_path / "w").missing_units() == [0, 1, 2]


def test_values_of_a_wrong_shape_are_refused(tmp_path):
    writer = long_writer(tmp_path / "w")
    values = {**unit_values(writer, 0), "action": np.zeros((1, 2), np.float32)}
    with pytest.raises(ValueError, match="unit 0 needs arrays"):
        writer.write_unit(0, values)


def test_the_writer_touches_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not written by uva_jax"):
        long_writer(tmp_path)
    long_writer(tmp_path / "w", source="a")
    with pytest.raises(UserError, match="holds a different replay buffer"):
        long_writer(tmp_path / "w", source="b")


TASKS = ("pick up the mug", "fold the towel")


@pytest.fixture
def of_tasks(tmp_path):
    values = {"action": arrays()["action"]}
    path = tmp_path / "tasks.zarr"
    write_replay_buffer(path, values, ENDS, tasks=TASKS, episode_task=np.array([1, 0, 1]))
    return path


def test_tasks_are_read_back_from_folder_and_zip(of_tasks, tmp_path):
    for path in (of_tasks, zip_up(of_tasks, tmp_path / "b.zip", "inner/tasks.zarr/")):
        buffer = ReplayBuffer.open(path)
        assert buffer.tasks == TASKS and buffer.episode_task.tolist() == [1, 0, 1]


def test_a_buffer_without_tasks_names_none(folder):
    buffer = ReplayBuffer.open(folder)
    assert buffer.tasks == () and buffer.episode_task.tolist() == [0, 0, 0]


def test_tasks_are_part_of_the_fingerprint_and_of_a_uint8_copy(of_tasks, tmp_path):
    buffer = ReplayBuffer.open(of_tasks)
    plain = write_replay_buffer(tmp_path / "plain.zarr", {"action": buffer.read("action")}, ENDS)
    assert plain.fingerprint() != buffer.fingerprint()
    assert to_uint8_cache(buffer, tmp_path / "copy.zarr").fingerprint() == buffer.fingerprint()


def rename_tasks(folder, tasks):
    (folder / "meta/.zattrs").write_text(json.dumps({"tasks": tasks}))


def renumber(folder, values):
    shutil.rmtree(folder / "meta/episode_task")
    values = np.array(values)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/meta/episode_task/"},
        "metadata": {"shape": list(values.shape), "dtype": values.dtype.str, "compressor": None},
    }
    ts.open(spec, create=True).result().write(values).result()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rename_tasks(f, "pick"), "tasks of meta must be a list of sentences"),
        (lambda f: rename_tasks(f, ["pick", 3]), "tasks of meta must be a list of sentences"),
        (lambda f: rename_tasks(f, ["pick"]), "names the tasks 0 to 1, but .* holds 1 sentences"),
        (lambda f: renumber(f, [0, -1, 0]), "names the tasks -1 to 0"),
        (lambda f: renumber(f, [0, 1]), r"each of the 3 episodes, but has shape \(2,\)"),
        (lambda f: renumber(f, [0.0, 1.0, 0.0]), "one whole number .* dtype float64"),
        (lambda f: shutil.rmtree(f / "meta/episode_task"), "lacks meta/episode_task"),
        (lambda f: (f / "meta/.zattrs").write_text("[]"), "should hold a JSON object"),
    ],
)
def test_damaged_tasks_are_explained(of_tasks, damage, message):
    damage(of_tasks)
    with pytest.raises(UserError, match=message):
        ReplayBuffer.open(of_tasks)


def test_a_foreign_codec_is_named(folder):
    file = folder / "data/img/.zarray"
    described = json.loads(file.read_text())
    described["compressor"] = {"id": "imagecodecs_jpegxl", "level": 99}
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match="data/img is stored with the codec imagecodecs_jpegxl"):
        ReplayBuffer.open(folder)
