"""Checks of demonstrations before anything is computed: forms, widths, values, the split."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import CONFIG, silently
from variants import VARIANTS, recording

from uva_jax.cli import sample
from uva_jax.data.check import BufferView, check_split
from uva_jax.data.readers import open_reader
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import write_replay_buffer
from uva_jax.data.windows import Strips, WindowSpec
from uva_jax.main import run
from uva_jax.models import surgery
from uva_jax.pretrain.windows import readout_scale
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions

ENDS = np.array([12, 30])
STRIPS = Strips(np.array([1]), np.array([[9]]), np.zeros(1, bool))


def write(folder, change=lambda arrays: None):
    arrays = recording(ENDS)
    change(arrays)
    write_replay_buffer(folder / "data.zarr", arrays, ENDS)
    return str(folder / "data.zarr")


def open_data(path):
    options = DataOptions(path=path, image_key="view", wrist_key="wrist")
    return open_reader(options, surgery.abstract_policy(VARIANTS["toolhang"]))


def dark_until(step):
    return lambda x: np.where(np.arange(len(x))[:, None, None, None] < step, x % 2, x)


FORMS = {
    "channels first": (lambda x: np.moveaxis(x, -1, 1), lambda x: x, "channels first"),
    "alpha": (lambda x: np.concatenate([x, x[..., :1]], -1), lambda x: x, "without its fourth"),
    "gray": (lambda x: x[..., 0], lambda x: np.repeat(x[..., :1], 3, -1), "as gray"),
    "gray, channels first": (
        lambda x: x[:, None, ..., 0],
        lambda x: np.repeat(x[..., :1], 3, -1),
        "channels first and as gray",
    ),
    "float, dark for long": (lambda x: dark_until(28)(x).astype(np.float32), dark_until(28), None),
    "float": (lambda x: x.astype(np.float32), lambda x: x, None),
    "not square": (lambda x: np.moveaxis(x[:, :20], -1, 1), lambda x: x[:, :20], "channels first"),
}


@pytest.mark.parametrize("form", FORMS)
def test_frames_of_every_form_are_read_as_one_and_it_is_said(form, tmp_path):
    stored, seen, words = FORMS[form]
    reader = open_data(write(tmp_path, lambda a: a.update(wrist=stored(a["wrist"]))))
    found = reader.read(STRIPS, np.arange(1))["wrist_image"]
    want = seen(recording(ENDS)["wrist"])
    assert found.dtype == np.uint8
    # Steps -6, -2, 2, 6 and so on to 9 of the second episode; its first is repeated before.
    np.testing.assert_array_equal(found[0], want[12 + np.array([0, 1, 5, 9])])
    np.testing.assert_array_equal(reader.buffer.read("wrist", 3, 5), want[3:5])
    assert reader.buffer.shape("wrist") == want.shape
    assert [words in note for note in reader.buffer.notes] == ([True] if words else [])


def shaped(name, change):
    return lambda arrays: arrays.update({name: change(arrays[name])})


def put(name, row, column, value):
    def change(arrays):
        arrays[name] = arrays[name].astype(np.float64)
        arrays[name][row, column] = value

    return change


def nan_pixel(arrays):
    arrays["view"] = arrays["view"].astype(np.float32)
    arrays["view"][0, 3, 3, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shaped("view", lambda x: x.reshape(len(x), -1)), r"data/view is uint8 of shape \(30, 307"),
        (shaped("wrist", lambda x: np.tile(x, 2)), r"data/wrist is uint8 of shape \(30, 32, 32, 6"),
        (shaped("view", lambda x: x[:, None]), "but frames are pixel values"),
        (shaped("view", lambda x: (x / 255).astype(np.float32)), "data/view should hold pixel"),
        (
            nan_pixel,
            r"data/view\[0\], step 0 of episode 0 .*range from nan to nan, but must be in 0..255",
        ),
        (shaped("action", lambda x: x[:, :7]), "data/action is 7 .* this policy's actions are 10"),
        (shaped("action", lambda x: x[:, 0]), "data/action is 1 numbers wide.* actions are 10"),
        (shaped("action", lambda x: x[:, None]), r"data/action is float32 of shape \(30, 1, 10\)"),
        (
            shaped("action", lambda x: x.astype(np.complex64)),
            r"data/action (is|holds) (complex64|<c8)",
        ),
        (shaped("robot0_eef_quat", lambda x: x[:, :3]), "data/robot0_eef_quat is 3 .* is 4"),
        (lambda a: a.pop("robot0_eef_quat"), "lacks data/robot0_eef_quat; it holds"),
        (
            put("action", 17, 3, np.nan),
            r"data/action\[17\], step 5 of episode 1 .*column 3, is nan",
        ),
        (put("action", 0, 0, 1e39), r"data/action\[0\], step 0 of episode 0 .*column 0, is 1e\+39"),
        (put("robot0_eef_pos", 29, 2, -np.inf), r"robot0_eef_pos\[29\], step 17 of .* is -inf"),
    ],
)
def test_demonstrations_that_do_not_fit_are_named(change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        open_data(write(tmp_path, change))


def pusht(folder, ends=ENDS, **changed):
    """Writes data for a policy with one camera and actions of two numbers."""
    rng, n = np.random.default_rng(0), ends[-1]
    arrays = {
        "img": rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
        "action": rng.uniform(0, 512, (n, 2)).astype(np.float32),
        "reward": np.full(n, np.nan, np.float32),
    }
    write_replay_buffer(folder / "data.zarr", arrays | changed, ends)
    return DataOptions(path=str(folder / "data.zarr"))


def test_arrays_that_nobody_reads_may_hold_anything(tmp_path):
    reader = open_reader(pusht(tmp_path), surgery.abstract_policy(CONFIG))
    assert reader.buffer.notes == [] and reader.buffer.shape("reward") == (30,)


def test_single_numbers_are_rows_of_one(tmp_path):
    data = pusht(tmp_path, action=np.arange(30.0))
    policy = surgery.abstract_policy(CONFIG)
    with pytest.raises(UserError, match="data/action is 1 numbers wide.*actions are 2"):
        open_reader(data, policy)
    any_width = WindowSpec.of(CONFIG).without_widths()
    reader = open_reader(data, policy, spec=any_width)
    assert reader.buffer.shape("action") == (30, 1)
    found = reader.read(STRIPS, np.arange(1))["action"]
    np.testing.assert_array_equal(found[0, 0, :, 0], np.minimum(21 + np.arange(16), 29))


def test_a_mirror_needs_square_frames_and_points(tmp_path):
    data = dataclasses.replace(
        pusht(tmp_path, img=np.zeros((30, 32, 40, 3), np.uint8)), mirror="pusht"
    )
    with pytest.raises(UserError, match="config.data.mirror='pusht' mirrors square.*32 x 40"):
        open_reader(data, surgery.abstract_policy(CONFIG))


def test_a_read_out_is_checked_like_the_policy_s_own_numbers(tmp_path):
    state = np.random.default_rng(0).normal(size=(30, 3))
    pusht(tmp_path, state=state, bad=np.where(np.arange(30) == 4, np.nan, 0.0))
    buffer = BufferView(ReplayBuffer.open(tmp_path / "data.zarr"))
    scale = readout_scale(buffer, "state", (), mirrored=False)
    np.testing.assert_allclose(scale(state).std(axis=0), 1, atol=1e-5)
    assert readout_scale(buffer, "", (), mirrored=True) is None
    for key, mirrored, words in (
        ("state", True, "a state of 5 numbers.*readout='state' has 3"),
        ("bad", False, r"data/bad\[4\], step 4 of episode 0.*is nan"),
        ("nope", False, "readout is 'nope', but the data holds action, bad"),
    ):
        with pytest.raises(UserError, match=words):
            readout_scale(buffer, key, (), mirrored=mirrored)


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([30], {}, "holds one episode, so none can be held out"),
        ([30, 30], {"val_ratio": 0.0}, r"no episode held out.*val_ratio=0, split_seed=42"),
        ([30, 30, 4], {"val_ratio": 0.3, "split_seed": 0}, "1 of 3 episodes held out.* of 4 steps"),
        ([4, 30, 4], {"val_ratio": 0.3, "split_seed": 1}, "none to train on: lower"),
    ],
)
def test_a_split_without_windows_is_told_as_what_it_is(lengths, options, words, tmp_path):
    data = dataclasses.replace(pusht(tmp_path, np.cumsum(lengths)), **options)
    with pytest.raises(UserError, match=words):
        check_split(ReplayBuffer.open(data.path), data)


def test_a_run_is_refused_before_anything_is_captured(make_config, tmp_path):
    data = pusht(tmp_path, np.array([30]))
    config = make_config(data__path=data.path)
    with pytest.raises(UserError, match="holds one episode"):
        silently(run, config, str(tmp_path / "run"), ["convert", "capture"])
    assert not list((tmp_path / "run" / "activations").glob("train*"))


def test_samples_of_the_only_episode_are_asked_for_by_its_number(checkpoint, tmp_path, capsys):
    data = pusht(tmp_path, np.array([60]), img=np.zeros((60, 3, 32, 32), np.uint8))
    command = ["--policy", str(checkpoint), "--dataset", data.path, "--image-key", "img"]
    command += ["--mode", "policy_model", "--sampling-steps", "2"]
    assert sample.main(command) == 2
    said = capsys.readouterr()
    assert "read with its channels first" in said.out
    assert said.err.startswith("error:") and "or say with --episode whose windows" in said.err
    assert sample.main([*command, "--episode", "0"]) == 0


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([12.5, 30.0], r"meta/episode_ends must be increasing .* is float64 \[12.5 30"),
        ([np.nan, 30.0], "is float64"),
        ([b"12", b"30"], r"episode_ends holds \|S2"),
        ([[12], [30]], "is int64"),
        ([18, 12], "is int64"),
        ([12, 31], "the episodes hold 31 steps"),
    ],
)
def test_ends_of_episodes_that_cannot_be_are_told_as_such(ends, words, tmp_path):
    data, values = pusht(tmp_path), np.array(ends)
    folder = tmp_path / "data.zarr" / "meta" / "episode_ends"
    about = json.loads((folder / ".zarray").read_text())
    about |= {"shape": values.shape, "chunks": values.shape, "dtype": values.dtype.str}
    about |= {"compressor": None, "fill_value": None}
    (folder / ".zarray").write_text(json.dumps(about))
    chunk = ".".join("0" * values.ndim)
    (folder / chunk).write_bytes(values.tobytes())
    with pytest.raises(UserError, match=words):
        open_reader(data, surgery.abstract_policy(CONFIG))
