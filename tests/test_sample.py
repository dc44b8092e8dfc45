"""`sample`: every variant of policy, errors against the recording, files, and bad input."""

import dataclasses
import functools
import json

import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, silently
from PIL import Image
from variants import VARIANTS, write_recording

from convert.to_torch import export_policy
from uva_jax.cli.sample import main
from uva_jax.eval import predict
from uva_jax.eval.cameras import Camera
from uva_jax.eval.predict import Prediction, Sampling
from uva_jax.models import policy_folder, surgery
from uva_jax.models.policy_config import VAEConfig
from uva_jax.runtime.errors import UserError

FULL = Sampling("full_dynamic_model", sampling_steps=2)
ACT = Sampling("policy_model", sampling_steps=2)
SIZE = 16


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _small(config):
    """Returns the config with the smallest VAE that keeps inputs and outputs."""
    heads = {
        name: dataclasses.replace(getattr(config, name), channels=64)
        for name in ("video_head", "wrist_head")
        if getattr(config, name)
    }
    return dataclasses.replace(
        config,
        image_size=SIZE,
        patch_size=4,
        vae=VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, attn_levels=(), z_channels=4),
        mar=dataclasses.replace(config.mar, token_dim=64),
        **heads,
    )


CONFIGS = {name: _small(config) for name, config in ({"plain": CONFIG} | VARIANTS).items()}


@functools.cache
def policy_of(name):
    """Returns a policy with all parameters random, as zero gates would hide earlier layers."""
    policy, random = surgery.abstract_policy(CONFIGS[name]), np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(0.15 * random.standard_normal(leaf.shape), leaf.dtype)
        for path, leaf in surgery.shapes(policy).items()
    }
    for path in arrays:
        if path.endswith("/scale") and path.startswith("normalizer/"):
            arrays[path] = jnp.full_like(arrays[path], 0.9)
    return surgery.replace(policy, arrays)


@functools.cache
def predictor(name, sampling):
    return predict.make_predictor(policy_of(name), sampling)


def predicted(name, sampling, number=0, window_seed=0):
    obs = predict.checked_window(CONFIGS[name], sampling.mode, window(name, window_seed), "a test")
    return predictor(name, sampling)(obs, number)


def window(name, seed=0):
    """Returns an observation with its future, and more fields than any policy reads."""
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    images = [f"{when}{camera}image" for when in ("", "future_") for camera in ("", "wrist_")]
    found = {image: rng.integers(0, 256, (4, 20, 20, 3), np.uint8) for image in images}
    shapes = {key: (16, width) for key, width in config.normalizer_fields}
    shapes |= {"action": (16, config.action_dim), "past_action": (16, config.action_dim)}
    shapes["text_latents"] = (config.mar.text_dim or 7,)
    return found | {key: rng.normal(size=shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Policies, a recording for the one with a wrist camera, and observations."""
    folder = tmp_path_factory.mktemp("sample")
    for name in ("plain", "libero10", "toolhang"):
        policy_folder.save_policy(folder / name, policy_of(name), source={})
    write_recording(folder)
    for name in ("plain", "libero10"):
        obs = window(name)
        np.savez(folder / f"{name}.npz", **obs)
        blind = ("image", "text_latents")
        np.savez(folder / f"{name}_blind.npz", **{k: obs[k] for k in blind})
    return folder


def sample(*arguments) -> str:
    """Runs the command; returns its output."""
    status, printed = silently(main, [str(a) for a in arguments])
    assert status == 0
    return printed


def wrist_arguments(folder):
    data = ("--dataset", folder / "recording.zarr", "--image-key", "view", "--wrist-key", "wrist")
    return ("--policy", folder / "toolhang", *data)


@pytest.mark.filterwarnings("ignore:os.fork")  # of reading the video back
def test_a_wrist_policy_predicts_and_shows_both_cameras(folder, tmp_path):
    out, table = tmp_path / "new" / "video.mp4", tmp_path / "table.json"
    settings = ("--num-iter", 1, "--sampling-steps", 2, "--episode", 0, "--windows", 2)
    printed = sample(*wrist_arguments(folder), *settings, "--out", out, "--json", table)
    frames = imageio.mimread(out, memtest=False)
    assert len(frames) == 8  # four of history, four of future
    # Two windows beside each other, and for each camera the real row above the predicted one.
    assert frames[0].shape[1] >= 2 * 192 and frames[0].shape[0] >= 4 * 192
    found = json.loads(table.read_text())
    assert set(found["all"]["cameras"]) == {"main", "wrist"}
    assert [row["window"] for row in found["windows"]] == ["ep. 0, step 10", "ep. 0, step 20"]
    assert f"{found['all']['action_mse']:.5f}" in printed
    for camera in found["all"]["cameras"].values():
        assert set(camera) == {"predicted", "last_frame", "reconstruction"}


def test_a_language_policy_predicts_from_an_observation_without_a_truth(folder, tmp_path):
    arguments = ("--policy", folder / "libero10", "--obs", folder / "libero10_blind.npz")
    settings = ("--mode", "video_model", "--num-iter", 1, "--sampling-steps", 2)
    printed = sample(*arguments, *settings, "--out", tmp_path / "strip.png")
    assert "no future" in printed and "PSNR" not in printed
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width == 8 * 192 + 7 * 8 and strip.height < 2 * 192  # one row


def test_frames_and_actions_have_the_policys_sizes():
    found = predicted("plain", FULL)
    assert list(found.cameras) == ["main"] and found.action.shape == (16, 2)
    for frames in dataclasses.astuple(found.cameras["main"]):
        assert frames.shape == (4, SIZE, SIZE, 3) and frames.dtype == np.uint8


def test_noise_depends_on_the_number_of_the_window_alone():
    first, again, other = (predicted("plain", ACT, number).action for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_guidance_changes_the_video_and_not_the_actions():
    plain = predicted("plain", FULL)
    guided = predicted("plain", dataclasses.replace(FULL, guidance=4.0, schedule="constant"))
    np.testing.assert_allclose(plain.action, guided.action, atol=1e-4)
    assert (plain.cameras["main"].predicted != guided.cameras["main"].predicted).any()


def test_inverse_model_infers_actions_from_both_cameras_futures():
    sampling = dataclasses.replace(ACT, mode="inverse_model")
    first, other = (predicted("toolhang", sampling, window_seed=seed) for seed in (0, 1))
    assert not first.cameras and np.abs(first.action - other.action).max() > 1e-4


def test_figures_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    clips = rng.integers(50, 200, (4, 3, 16, 16, 3)).astype(np.uint8)
    future = np.stack([clips[1, 0]] * 3)
    camera = Camera(clips[0], future, future + np.uint8(10), future + np.uint8(1))
    found = predict.figures([Prediction({"main": camera}, np.zeros((16, 2)), 0.25, 1.5)] * 2)
    main = found["cameras"]["main"]
    assert main["predicted"]["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    assert main["reconstruction"]["psnr"] == pytest.approx(20 * np.log10(255))
    held = np.mean((clips[0, -1].astype(float) - clips[1, 0]) ** 2)
    assert main["last_frame"]["psnr"] == pytest.approx(10 * np.log10(255**2 / held))
    assert 0.9 < main["predicted"]["ssim"] < main["reconstruction"]["ssim"] < 1
    assert (found["action_mse"], found["latent_spread"]) == (0.25, 1.5)


def test_windows_are_training_windows(folder):
    """Frames 3, 7, ..., 31 of 32 steps, of which the current one is the sixteenth."""
    from uva_jax.cli.sample import open_reader
    from uva_jax.data.replay_buffer import ReplayBuffer
    from uva_jax.eval.recorded import read_windows

    keys = {"image_key": "view", "wrist_key": "wrist"}
    reader = open_reader(policy_of("toolhang"), str(folder / "recording.zarr"), keys)
    (found,) = read_windows(reader, np.array([1]), np.array([17]))  # the episode starts at 40
    buffer = ReplayBuffer.open(folder / "recording.zarr")
    rows = 40 + 2 + np.array([3, 7, 11, 15, 19, 23, 27, 31])
    for name, key in (("image", "view"), ("wrist_image", "wrist")):
        frames = np.concatenate([found[name], found[f"future_{name}"]])
        np.testing.assert_array_equal(frames, buffer.read(key)[rows])
    np.testing.assert_array_equal(found["action"], buffer.read("action")[57:73])
    np.testing.assert_array_equal(found["past_action"], buffer.read("action")[41:57])
    assert found["robot0_eef_pos"].shape == (16, 3)


def test_actions_alone_can_be_written_and_depend_on_the_seed(folder, tmp_path):
    arguments = ("--policy", folder / "plain", "--obs", folder / "plain.npz")
    settings = ("--mode", "policy_model", "--sampling-steps", 2, "--temperature", 1, "--seed", 1)
    printed = sample(*arguments, *settings, "--out", tmp_path / "actions.npz")
    with np.load(tmp_path / "actions.npz") as found:
        assert set(found.files) == {"action"} and found["action"].shape == (1, 16, 2)
        assert np.abs(found["action"] - predicted("plain", ACT).action).max() > 1e-3
    assert "action MSE" in printed and "PSNR" not in printed


def test_gifs_hold_every_frame(tmp_path):
    from uva_jax.eval.film import write

    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (4, 4, 16, 16, 3)).astype(np.uint8)
    write(tmp_path / "a.gif", [Prediction({"main": Camera(*clips)}, None, None, 1.0)], ["one"])
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "dreaming"), "mode 'dreaming' is unknown"),
        (("--schedule", "cosine"), "'cosine'; it can be linear or constant"),
        (("--num-iter", 17), "num_iter is 17"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--sampling-steps", 2000), "sampling_steps is 2000"),
        (("--mode", "policy_model", "--out", "x.mp4"), "predicts actions and no video"),
        (("--out", "x.avi"), "should end in .mp4, .gif"),
        (("--out", "/dev/null/x.mp4"), "cannot be written"),
        (("--json", "/nowhere/at/all.json"), "its folder does not exist"),
        (("--policy", "missing.ckpt"), "no such file or folder"),
        (("--dataset", "embedded"), "either --dataset PATH"),
        (("--obs", "missing.npz"), "there is no such file"),
    ],
)
def test_bad_options_are_one_sentence(arguments, words, folder, capsys):
    given = ("--policy", folder / "plain", "--obs", folder / "plain.npz", *arguments)
    assert main([str(a) for a in given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--episode", 3), "has episodes 0 to 2"),
        (("--episode", 0, "--step", 31), "can begin at steps 0 to 30"),
        (("--step", 3), "give --episode too"),
        (("--windows", 0), "--windows is 0"),
        (("--wrist-key", ""), "wrist camera"),
        (("--image-key", "nope"), "lacks data/nope"),
        (("--image-key", "action"), "pixel values"),
    ],
)
def test_windows_that_are_not_there_are_refused(arguments, words, folder, capsys):
    given = (*wrist_arguments(folder), *arguments)
    assert main([str(a) for a in given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


def _changed(**changes):
    obs = window("toolhang") | changes
    return {k: v for k, v in obs.items() if v is not None}


@pytest.mark.parametrize(
    ("mode", "obs", "words"),
    [
        ("policy_model", _changed(image=None), "lacks image"),
        ("policy_model", _changed(wrist_image=None), "lacks wrist_image"),
        ("policy_model", _changed(robot0_eef_pos=None), "lacks robot0_eef_pos"),
        ("dynamic_model", _changed(action=None), "lacks action"),
        ("inverse_model", _changed(future_wrist_image=None), "lacks future_wrist_image"),
        ("policy_model", _changed(image=np.zeros((5, 8, 8, 3), np.uint8)), "16 or 4 x any x any x"),
        ("policy_model", _changed(image=np.zeros((4, 8, 8, 3))), "takes uint8"),
        ("policy_model", _changed(image=np.zeros((4, 0, 8, 3), np.uint8)), "takes uint8"),
        ("policy_model", _changed(past_action=np.zeros((16, 2))), "takes float 16 x 10"),
        ("policy_model", _changed(robot0_eef_pos=np.zeros((16, 4))), "takes float 16 x 3"),
        ("policy_model", _changed(action=np.full((16, 10), np.nan)), "not finite"),
    ],
)
def test_observations_that_do_not_fit_are_refused(mode, obs, words):
    with pytest.raises(UserError, match=words):
        predict.checked_window(CONFIGS["toolhang"], mode, obs, "obs.npz")


def test_states_of_another_width_are_refused_without_a_normalizer():
    config = CONFIGS["umi"]
    obs = {"image": np.zeros((4, 8, 8, 3), np.uint8), "text_latents": np.zeros(12)}
    obs |= {name: np.zeros((16, 3)) for name in config.proprio_keys}
    with pytest.raises(UserError, match="12 numbers wide, but this policy takes 16"):
        predict.checked_window(config, "policy_model", obs, "obs.npz")


def test_a_policy_without_a_video_head_cannot_predict_video():
    config = dataclasses.replace(CONFIGS["plain"], video_head=None)
    with pytest.raises(UserError, match="this policy has no video head"):
        FULL.check(surgery.abstract_policy(config))


def test_a_checkpoint_of_video_alone_predicts_video_and_no_actions(folder, tmp_path, capsys):
    config = dataclasses.replace(CONFIGS["plain"], action_head=None, task_modes=("video_model",))
    arrays = {
        k: v for k, v in surgery.flatten(policy_of("plain")).items() if "action_head" not in k
    }
    policy = surgery.replace(surgery.abstract_policy(config), arrays)
    export_policy(policy, tmp_path / "video.ckpt")  # as UVA's first phase leaves it
    arguments = ("--policy", tmp_path / "video.ckpt", "--obs", folder / "plain.npz")
    arguments += ("--sampling-steps", 2)
    for mode in ("video_model", "full_dynamic_model"):
        out = tmp_path / f"{mode}.npz"
        printed = sample(*arguments, "--mode", mode, "--out", out)
        assert "PSNR" in printed and "action MSE" not in printed
        assert np.load(out).files == ["main_frames"]
    assert main([str(a) for a in (*arguments, "--mode", "policy_model")]) == 2
    assert "trained for video alone" in capsys.readouterr().err


def test_a_file_that_is_no_npz_is_refused(folder, tmp_path, capsys):
    np.savez(tmp_path / "pickled.npz", image=np.array([{}], object))
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("pickled.npz", "text.npz", "array.npy"):
        arguments = ("--policy", folder / "plain", "--obs", tmp_path / name)
        assert main([str(a) for a in arguments]) == 2
        assert "cannot be read" in capsys.readouterr().err


def test_a_prediction_that_goes_nowhere_is_refused(folder, capsys):
    arguments = ("--policy", folder / "plain", "--obs", folder / "plain_blind.npz")
    assert main([str(a) for a in arguments]) == 2
    assert "give --out" in capsys.readouterr().err


def test_a_wide_spread_of_latents_is_called_a_divergence():
    assert predict.divergence(None) is None and predict.divergence(1.1) is None
    for spread in (110.0, float("nan"), float("inf")):
        assert "sampling diverged" in predict.divergence(spread)
