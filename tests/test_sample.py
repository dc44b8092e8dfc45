"""Predicted futures: every kind of policy, figures against the truth, files, and bad input."""

import dataclasses
import json

import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import make_policy, silently
from PIL import Image
from variants import TASKS, VARIANTS, write_recording

from uva_jax import policy_io
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.eval import predict
from uva_jax.eval.predict import Camera, Prediction, Sampling
from uva_jax.sample import main

FULL = Sampling("full_dynamic_model", num_iter=2, sampling_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher):
    """Holds the tiny policy, one with a wrist camera, and recordings for the latter."""
    folder = tmp_path_factory.mktemp("sample")
    policy_io.save_policy(folder / "plain", teacher, source={})
    policy_io.save_policy(folder / "toolhang", make_policy(VARIANTS["toolhang"]), source={})
    write_recording(folder)
    return folder


def window(config, seed=0):
    """An observation of any policy with what came after; values are noise."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    names = [f"{when}{camera}image" for when in ("", "future_") for camera in ("", "wrist_")]
    widths = dict(config.normalizer_fields) | {k: 6 for k in ("robot0_eef_rot_axis_angle",)}
    found = {name: rng.integers(0, 256, (4, 32, 32, 3), np.uint8) for name in names}
    found |= {
        "action": normal(16, config.action_dim),
        "past_action": normal(16, config.action_dim),
        "text_latents": normal(12),
    }
    sizes = {"pos": 3, "angle": 6, "width": 1, "start": 6}  # UMI's, which has no normaliser
    for name in config.proprio_keys:
        found[name] = normal(16, widths.get(name) or sizes[name.split("_")[-1]])
    return found


def predicted(policy, sampling, obs, number=0):
    obs = predict.checked_window(policy.config, sampling.mode, obs, "the test")
    return predict.make_predictor(policy, sampling)(obs, number)


def sample(*arguments, status=0):
    """Runs the command; returns what it printed."""
    code, printed = silently(main, [str(a) for a in arguments])
    assert code == status, printed
    return printed


def refused(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("name", ["libero10", "umi", "toolhang", "everything"])
def test_every_kind_of_policy_predicts_all_its_cameras(name):
    policy = make_policy(VARIANTS[name])
    found = predicted(policy, FULL, window(policy.config))
    cameras = ["main", "wrist"] if policy.config.mar.wrist else ["main"]
    assert list(found.cameras) == cameras
    for camera in found.cameras.values():
        for frames in dataclasses.astuple(camera):
            assert frames.shape == (4, 32, 32, 3) and frames.dtype == np.uint8
    assert found.action.shape == (16, 10) and found.action_mse > 0
