"""Importers copy the content of Libero's and robomimic's files and upstream's caches unchanged."""

import json
import sys
import zipfile

import h5py
import imagecodecs
import numpy as np
import pytest
import tensorstore as ts

from uva_jax.cli.import_recordings import main
from uva_jax.data import replay_writer
from uva_jax.data.import_recordings import open_hdf5, write_recordings
from uva_jax.data.import_zarr import open_zarr
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import write_replay_buffer
from uva_jax.runtime.errors import UserError

SIZE = 20  # pixels; an image must hold 1 kB to count as one
STOVE, BOOK = "KITCHEN_SCENE3_turn_on_the_stove", "STUDY_SCENE1_pick_up_the_book"


def demo_arrays(seed, steps, kind="libero"):
    """Returns one demonstration in the layout of the real files, with absolute actions."""
    rng = np.random.default_rng(seed)
    images = {"libero": ("agentview_rgb", "eye_in_hand_rgb")}.get(
        kind, ("sideview_image", "robot0_eye_in_hand_image")
    )
    hand = rng.normal(0, 0.1, (steps, 3)) + [0, 0, 1]
    arrays = {f"obs/{k}": rng.integers(0, 256, (steps, SIZE, SIZE, 3), np.uint8) for k in images}
    if kind == "libero":
        arrays["obs/ee_pos"] = hand
    else:
        arrays["obs/robot0_eef_pos"] = hand
        arrays["obs/robot0_eef_quat"] = rng.normal(size=(steps, 4))
        arrays["obs/robot0_gripper_qpos"] = rng.normal(size=(steps, 2))
    turn, gripper = rng.normal(size=(steps, 3)), rng.choice([-1.0, 1.0], (steps, 1))
    arrays["actions"] = np.concatenate([hand + 0.01, turn, gripper], axis=1)
    return arrays | {"rewards": np.zeros(steps), "dones": np.zeros(steps)}


def write_demos(path, demos):
    with h5py.File(path, "w") as file:
        for number, arrays in demos.items():
            for name, value in arrays.items():
                file[f"data/demo_{number}/{name}"] = value
    return path


@pytest.fixture
def libero(tmp_path):
    """Two tasks; the demonstrations of the first are in another order by name than by number."""
    folder = tmp_path / "libero_10"
    folder.mkdir()
    first = {n: demo_arrays(n, 5 + n) for n in (0, 2, 10)}
    write_demos(folder / f"{STOVE}_demo.hdf5", first)
    write_demos(folder / f"{BOOK}_demo.hdf5", {0: demo_arrays(20, 7)})
    return folder


@pytest.fixture
def tool_hang(tmp_path):
    demos = {n: demo_arrays(30 + n, 4 + n, "robomimic") for n in range(3)}
    return write_demos(tmp_path / "image_abs.hdf5", demos)


def read(kind, *sources, out, limit=None):
    return write_recordings(out, open_hdf5(kind, sources, limit))


def test_libero_episodes_carry_the_sentences_of_their_files(libero, tmp_path):
    buffer = read("libero", libero, out=tmp_path / "out.zarr")
    assert buffer.tasks == (STOVE.replace("_", " "), BOOK.replace("_", " "))
    assert buffer.episode_task.tolist() == [0, 0, 0, 1]
    assert np.diff(buffer.episode_ends, prepend=0).tolist() == [5, 7, 15, 7]
    assert buffer.keys == ("action", "agentview_rgb")


def test_libero_images_are_turned_as_upstream_turns_them(libero, tmp_path):
    buffer = read("libero", libero, out=tmp_path / "out.zarr")
    stored = np.concatenate([demo_arrays(n, 5 + n)["obs/agentview_rgb"] for n in (0, 2, 10)])
    # As its loader does: half a turn and a flip of the columns, channels first.
    turned = np.flip(np.rot90(np.moveaxis(stored, -1, 1), k=2, axes=(2, 3)), axis=3)
    np.testing.assert_array_equal(buffer.read("agentview_rgb", 0, 27), np.moveaxis(turned, 1, -1))


def test_robomimic_images_and_states_are_kept_as_they_are(tool_hang, tmp_path):
    buffer = read("robomimic", tool_hang, out=tmp_path / "out.zarr")
    assert buffer.tasks == () and buffer.n_episodes == 3
    for key in set(buffer.keys) - {"action"}:
        stored = [demo_arrays(30 + n, 4 + n, "robomimic")[f"obs/{key}"] for n in range(3)]
        dtype = np.uint8 if key.endswith("image") else np.float32
        assert buffer.dtype(key) == dtype
        np.testing.assert_array_equal(buffer.read(key), np.concatenate(stored).astype(dtype))


def test_actions_become_position_rotation_6d_and_gripper(tool_hang, tmp_path):
    found = read("robomimic", tool_hang, out=tmp_path / "out.zarr").read("action", 0, 4)
    actions = demo_arrays(30, 4, "robomimic")["actions"]
    assert found.shape == (4, 10) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :3], actions[:, :3].astype(np.float32))
    np.testing.assert_array_equal(found[:, 9], actions[:, 6])
    # The rows of the rotation are the images of the axes of the frame it rotates into.
    for row, vector in zip(found[:, 3:9], actions[:, 3:6], strict=True):
        angle = np.linalg.norm(vector)
        axis = vector / angle
        for x, got in zip(np.eye(3)[:2], (row[:3], row[3:]), strict=True):
            back = (
                x * np.cos(angle)
                - np.cross(axis, x) * np.sin(angle)
                + axis * (axis @ x) * (1 - np.cos(angle))
            )
            np.testing.assert_allclose(got, back, atol=1e-6)


def test_a_limit_takes_the_first_episodes_of_every_file(libero, tmp_path):
    buffer = read("libero", libero, out=tmp_path / "out.zarr", limit=1)
    assert buffer.episode_ends.tolist() == [5, 12] and buffer.episode_task.tolist() == [0, 1]


def test_an_interrupted_import_resumes_to_the_same_buffer(libero, tmp_path, monkeypatch):
    monkeypatch.setattr(replay_writer, "UNIT_STEPS", 8)
    monkeypatch.setattr(replay_writer, "FRAME_CHUNK", 8)
    whole = read("libero", libero, out=tmp_path / "whole.zarr")

    class Killed(BaseException):
        pass

    def kill(done, total):
        if done >= 16:
            raise Killed

    with pytest.raises(Killed):
        write_recordings(tmp_path / "out.zarr", open_hdf5("libero", [libero], None), progress=kill)
    with pytest.raises(UserError, match="is unfinished"):
        ReplayBuffer.open(tmp_path / "out.zarr")
    done = []
    resumed = write_recordings(
        tmp_path / "out.zarr",
        open_hdf5("libero", [libero], None),
        progress=lambda step, total: done.append(step),
    )
    assert done == [24, 32, 34]
    assert resumed.fingerprint() == whole.fingerprint()
    for key in whole.keys:
        np.testing.assert_array_equal(resumed.read(key), whole.read(key))


def relative(arrays):
    arrays["actions"][:, :3] = np.random.default_rng(0).uniform(-1, 1, (4, 3)) * 0.1


def relative_near_zero(arrays):
    """Small steps of a hand that works a hand's breadth from the origin."""
    arrays["obs/robot0_eef_pos"][:] -= [0.1, 0, 1]
    arrays["actions"][:, :3] = 0.02


def nan_action(arrays):
    arrays["actions"][2, 6] = np.nan


def infinite_state(arrays):
    arrays["obs/robot0_gripper_qpos"][3, 1] = np.inf


def without_actions(arrays):
    del arrays["actions"]


def without_images(arrays):
    del arrays["obs/sideview_image"]


def short_images(arrays):
    arrays["obs/sideview_image"] = arrays["obs/sideview_image"][:-1]


def two_arms(arrays):
    arrays["actions"] = np.tile(arrays["actions"], 2)


def float_images(arrays):
    arrays["obs/sideview_image"] = arrays["obs/sideview_image"] / 255


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (relative, "so they are relative, which UVA does not use"),
        (relative_near_zero, "demo_0 are 0.* m away .* so they are relative"),
        (nan_action, "demo_0/actions is not finite at step 2"),
        (infinite_state, "demo_0/obs/robot0_gripper_qpos is not finite at step 3"),
        (without_actions, "demo_0 lacks actions; it holds dones, obs, rewards, obs/robot0"),
        (without_images, "demo_0 lacks obs/sideview_image; it holds"),
        (short_images, r"sideview_image has shape \(3, 20, 20, 3\), where 4 steps"),
        (two_arms, r"actions has shape \(4, 14\), but 7 numbers"),
        (float_images, "sideview_image does not hold uint8 pixels"),
    ],
)
def test_a_file_that_does_not_fit_is_explained(tmp_path, damage, message):
    arrays = demo_arrays(30, 4, "robomimic")
    damage(arrays)
    path = write_demos(tmp_path / "bad.hdf5", {0: arrays})
    with pytest.raises(UserError, match=message):
        read("robomimic", path, out=tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_every_demonstration_s_actions_are_looked_at(tmp_path):
    demos = {n: demo_arrays(n, 4, "robomimic") for n in range(3)}
    relative(demos[2])
    with pytest.raises(UserError, match="the actions of /data/demo_2 .* are relative"):
        open_hdf5("robomimic", [write_demos(tmp_path / "late.hdf5", demos)], None)
    # Those before it are absolute, and can be taken alone.
    assert open_hdf5("robomimic", [tmp_path / "late.hdf5"], 2)[0].notes == []


def test_absolute_actions_are_read_where_a_file_keeps_both(tmp_path):
    demos = {n: demo_arrays(n, 4, "robomimic") for n in range(2)}
    absolute = np.concatenate([arrays["actions"] for arrays in demos.values()])
    for arrays in demos.values():
        arrays["actions_abs"] = arrays["actions"].copy()
        relative(arrays)
    path = write_demos(tmp_path / "both.hdf5", demos)
    (recording,) = open_hdf5("robomimic", [path], None)
    found = recording.read("action", 0, 8)
    np.testing.assert_array_equal(found[:, :3], absolute[:, :3].astype(np.float32))
    np.testing.assert_array_equal(found[:, 9], absolute[:, 6].astype(np.float32))
    assert recording.notes == [f"{path}: actions_abs is read in place of actions"]
    del demos[1]["actions_abs"]
    with pytest.raises(UserError, match="actions_abs, which 1 of 2 demonstrations here hold"):
        open_hdf5("robomimic", [write_demos(tmp_path / "some.hdf5", demos)], None)


def test_actions_without_a_hand_s_position_are_taken_and_it_is_said(tmp_path, capsys):
    arrays = demo_arrays(0, 4)
    arrays["obs/ee_states"] = np.tile(arrays.pop("obs/ee_pos"), 2)
    near = write_demos(tmp_path / f"{BOOK}_demo.hdf5", {0: arrays})
    assert open_hdf5("libero", [near], None)[0].notes == []
    del arrays["obs/ee_states"]
    path = write_demos(tmp_path / f"{STOVE}_demo.hdf5", {0: arrays})
    assert main(["--kind", "libero", str(path), "--out", str(tmp_path / "out.zarr")]) == 0
    assert "1 of 1 demonstrations lack the hand's position" in capsys.readouterr().out


def test_what_is_no_recording_is_explained(tmp_path):
    (tmp_path / "text.hdf5").write_text("no HDF5 at all")
    write_demos(tmp_path / "empty.hdf5", {})
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("text.hdf5", "is not a readable HDF5 file"),
        ("empty.hdf5", "holds no demonstrations data/demo_<number>; it holds nothing"),
        ("folder", "holds no .hdf5 files"),
        ("nowhere.hdf5", "there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            open_hdf5("robomimic", [tmp_path / name], None)
    with pytest.raises(UserError, match="is the sentence of their task"):
        open_hdf5("libero", [tmp_path / "empty.hdf5"], None)


def test_missing_packages_are_named_with_their_extra(tool_hang, upstream_zip, monkeypatch):
    encoded = upstream_zip("imagecodecs_jpegxl")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"pip install 'uva_jax\[hdf5\]'"):
        open_hdf5("robomimic", [tool_hang], None)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UserError, match=r"pip install 'uva_jax\[codecs\]'"):
        open_zarr([encoded], None, None, None)


@pytest.fixture
def upstream_zip(tmp_path):
    """Makes a buffer like upstream's caches: one losslessly encoded image per chunk, zipped."""

    def make(codec, name="camera0_rgb", seed=0, tokens=None):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
        folder = tmp_path / f"{codec}{seed}"
        plain = {"action": rng.normal(size=(12, 10)).astype(np.float32)}
        if tokens is not None:
            plain["language"] = tokens
        for key, value in {**plain, "": np.array([5, 12])}.items():
            inner = f"data/{key}" if key else "meta/episode_ends"
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{folder}/{inner}/"},
                "metadata": {
                    "shape": list(value.shape),
                    "chunks": list(value.shape),
                    "dtype": value.dtype.str,
                    "compressor": None,
                },
            }
            ts.open(spec, create=True).result().write(value).result()
        target = tmp_path / f"{codec}{seed}.zarr.zip"
        metadata = {
            "zarr_format": 2,
            "shape": [12, SIZE, SIZE, 3],
            "chunks": [1, SIZE, SIZE, 3],
            "dtype": "|u1",
            "compressor": {"id": codec, "level": 99},
            "fill_value": 0,
            "filters": None,
            "order": "C",
        }
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    archive.write(file, str(file.relative_to(folder)))
            archive.writestr(f"data/{name}/.zarray", json.dumps(metadata))
            for step, image in enumerate(images):
                encoded = (
                    imagecodecs.jpeg2k_encode(image, reversible=True)
                    if codec.endswith("jpeg2k")
                    else imagecodecs.jpegxl_encode(image, lossless=True)
                )
                archive.writestr(f"data/{name}/{step}.0.0.0", encoded)
        target.with_suffix(".npy").write_bytes(images.tobytes())
        return target

    return make


def stored_images(path):
    return np.frombuffer(path.with_suffix(".npy").read_bytes(), np.uint8).reshape(12, SIZE, SIZE, 3)


@pytest.mark.parametrize("codec", ["imagecodecs_jpeg2k", "imagecodecs_jpegxl"])
def test_upstreams_encoded_images_are_copied_pixel_by_pixel(upstream_zip, tmp_path, codec):
    path = upstream_zip(codec)
    buffer = write_recordings(tmp_path / "out.zarr", open_zarr([path], None, None, None))
    np.testing.assert_array_equal(buffer.read("camera0_rgb"), stored_images(path))
    assert buffer.episode_ends.tolist() == [5, 12] and buffer.tasks == ()


def test_a_buffer_of_such_images_is_refused_by_the_name_of_its_codec(upstream_zip):
    with pytest.raises(UserError, match="camera0_rgb is stored with the codec imagecodecs_jpegxl"):
        ReplayBuffer.open(upstream_zip("imagecodecs_jpegxl"))


def test_several_files_get_a_task_each(upstream_zip, tmp_path):
    paths = [upstream_zip("imagecodecs_jpegxl", seed=seed) for seed in (0, 1)]
    recordings = open_zarr(paths, ["fold the towel", "pick up the cup"], None, 1)
    buffer = write_recordings(tmp_path / "out.zarr", recordings)
    assert buffer.tasks == ("fold the towel", "pick up the cup")
    assert buffer.episode_task.tolist() == [0, 1] and buffer.episode_ends.tolist() == [5, 10]
    np.testing.assert_array_equal(buffer.read("camera0_rgb", 5), stored_images(paths[1])[:5])
    with pytest.raises(UserError, match="--task was given 1 times for 2 files"):
        open_zarr(paths, ["fold the towel"], None, None)


def test_the_libero_cache_is_turned_and_its_sentences_are_read_from_tokens(upstream_zip, tmp_path):
    words = {"stu": 5, "dy</w>": 6, "scene</w>": 7, "1</w>": 8, "<start>": 9, "<end>": 10}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    rows = np.full((12, 2, 8), 10)
    rows[:, 1] = 0
    for part, sentence in ((slice(0, 5), [9, 5, 6, 10]), (slice(5, 12), [9, 7, 8, 10])):
        rows[part, 0, :4], rows[part, 1, :4] = sentence, 1
    path = upstream_zip("imagecodecs_jpeg2k", name="agentview_rgb", tokens=rows)
    buffer = write_recordings(tmp_path / "out.zarr", open_zarr([path], None, tmp_path, None))
    assert buffer.tasks == ("study", "scene 1") and buffer.episode_task.tolist() == [0, 1]
    np.testing.assert_array_equal(buffer.read("agentview_rgb"), stored_images(path)[:, ::-1])
    with pytest.raises(UserError, match="give the folder of CLIP's vocab.json"):
        open_zarr([path], None, None, None)


def test_own_buffers_need_no_import(tmp_path):
    arrays = {"action": np.zeros((5, 2), np.float32)}
    write_replay_buffer(tmp_path / "own.zarr", arrays, np.array([5]))
    with pytest.raises(UserError, match="needs no import"):
        open_zarr([tmp_path / "own.zarr"], None, None, None)


def with_changes(path, target, **changes):
    """Copies a zip with changed files, by the end of their names: new content, or None to drop."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = changes.get(name.removeprefix("data/camera0_rgb/"), old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.mark.parametrize(("content", "state"), [(None, "missing"), (b"no image", "damaged")])
def test_a_missing_or_damaged_image_is_an_error_that_names_it(
    upstream_zip, tmp_path, content, state
):
    path = upstream_zip("imagecodecs_jpegxl")
    with zipfile.ZipFile(path) as archive:
        described = json.loads(archive.read("data/camera0_rgb/.zarray"))
    no_fill = {".zarray": json.dumps({**described, "fill_value": None})}
    bad = with_changes(path, tmp_path / "bad.zip", **{"3.0.0.0": content, **no_fill})
    recordings = open_zarr([bad], None, None, None)
    with pytest.raises(UserError, match=f"image 3 of data/camera0_rgb is {state}"):
        write_recordings(tmp_path / "out.zarr", recordings)


def test_a_black_image_may_be_left_out_and_many_may_not(upstream_zip, tmp_path):
    path = upstream_zip("imagecodecs_jpegxl")
    black = with_changes(path, tmp_path / "black.zip", **{"3.0.0.0": None})
    buffer = write_recordings(tmp_path / "out.zarr", open_zarr([black], None, None, None))
    wanted = stored_images(path).copy()
    wanted[3] = 0
    np.testing.assert_array_equal(buffer.read("camera0_rgb"), wanted)
    cut = with_changes(path, tmp_path / "cut.zip", **{f"{n}.0.0.0": None for n in range(4, 12)})
    with pytest.raises(UserError, match="camera0_rgb lacks 8 of its 12 chunks of images"):
        open_zarr([cut], None, None, None)


def test_the_command_imports_and_says_what_it_wrote(libero, tmp_path, capsys):
    out = tmp_path / "out.zarr"
    assert main(["--kind", "libero", str(libero), "--out", str(out)]) == 0
    assert "4 episodes, 34 steps" in capsys.readouterr().out
    assert ReplayBuffer.open(out).n_episodes == 4
    assert main(["--kind", "robomimic", str(tmp_path / "no"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file")
