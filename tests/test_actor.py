"""The actor: equal to rollouts, the windows of training, frames encoded once, and bad input."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import CONFIG, make_policy
from variants import ROBOT_STATE, VARIANTS

import uva_jax
from uva_jax.data.windows import WindowSpec
from uva_jax.envs.pusht import PushT
from uva_jax.eval.rollout import RolloutPool, spec_of
from uva_jax.models import surgery
from uva_jax.models.actor import Actor
from uva_jax.models.policy_call import PolicyCall, ahead_steps, new_frames
from uva_jax.models.policy_config import VAEConfig
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError

# Every input that a policy can have, and the smallest VAE.
SMALL = dataclasses.replace(
    VARIANTS["everything"],
    image_size=16,
    patch_size=4,
    vae=VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, attn_levels=(), z_channels=4),
    mar=dataclasses.replace(VARIANTS["everything"].mar, token_dim=64),
    video_head=None,
    wrist_head=None,
)


def observations(steps, batch=None, size=16):
    """Returns an observation per step for the variant "everything"."""
    rng, lead = np.random.default_rng(0), () if batch is None else (batch,)
    images = {
        name: rng.integers(0, 256, (steps, *lead, size, size, 3), np.uint8)
        for name in ("image", "wrist_image")
    }
    states = {
        k: rng.normal(size=(steps, *lead, n)).astype(np.float32) for k, n in ROBOT_STATE.items()
    }
    text = {"text_latents": rng.normal(size=(steps, *lead, 12)).astype(np.float32)}
    return [{k: v[i] for k, v in (images | states | text).items()} for i in range(steps)]


def test_an_actor_does_what_rollouts_do(teacher, quick_compilation):
    with RolloutPool(1) as pool:
        call = PolicyCall(teacher, "3", noise_seed=5)
        seeds = [100_000, 100_001]
        result = pool.run(call, seeds, spec=spec_of(CONFIG, 20), record_seeds=seeds)
    actor, envs = teacher.actor(sampling_steps=3, seed=5), [PushT(), PushT()]
    for env, seed in zip(envs, result.seeds, strict=True):
        env.reset(int(seed))
    for step in range(20):
        images = np.stack([env.render() for env in envs])
        for seed, image in zip(result.seeds, images, strict=True):
            np.testing.assert_array_equal(image, result.videos[seed][step])
        for env, action in zip(envs, actor({"image": images, "unused": None}), strict=True):
            env.step(action)


@pytest.fixture
def calls(monkeypatch):
    """What the policy is called with; it acts by the number of the call."""
    seen = []

    def call(self, window, seed_index, call_index):
        seen.append(window)
        steps = np.arange(8)[:, None] + 8.0 * call_index + np.zeros((8, 10))
        return np.repeat(steps[None].astype(np.float32), len(seed_index), axis=0)

    monkeypatch.setattr(PolicyCall, "__call__", call)
    monkeypatch.setattr(PolicyCall, "encode_ahead", lambda self, frames: None)
    return seen


def test_an_actor_calls_the_policy_on_the_windows_of_training(calls):
    config = SMALL
    actor = Actor(surgery.abstract_policy(config))
    given = observations(40)
    actions = np.stack([actor(obs) for obs in given])
    np.testing.assert_array_equal(actions[:, 0], np.arange(40))
    offsets = WindowSpec.of(config).offsets()
    assert len(calls) == 5 and np.isnan(calls[0]["past_action"]).all()
    for current, window in zip(range(0, 40, 8), calls, strict=True):

        def rows(name, offsets, current=current):
            return np.stack([given[i][name] for i in np.maximum(current + offsets, 0)])[None]

        for name in ("image", "wrist_image"):
            np.testing.assert_array_equal(window[name], rows(name, offsets.frames))
        for name in ROBOT_STATE:
            np.testing.assert_array_equal(window[name], rows(name, offsets.states))
        np.testing.assert_array_equal(window["text_latents"][0], given[current]["text_latents"])
        if current:
            past = actions[np.maximum(current + offsets.past_actions, 0)][None]
            np.testing.assert_array_equal(window["past_action"], past)


def test_a_new_episode_starts_without_the_last_ones_history(calls):
    actor, given = Actor(surgery.abstract_policy(SMALL)), observations(4)
    for obs in given[:3]:
        actor(obs)
    actor.reset()
    actor(given[3])
    assert len(calls) == 2 and np.isnan(calls[1]["past_action"]).all()
    assert (calls[1]["image"] == given[3]["image"]).all()


def test_a_frame_is_encoded_once(quick_compilation):
    policy = make_policy(SMALL)
    actor, given, encoded = policy.actor(sampling_steps=2), observations(17), []
    call, encode_ahead = actor._call._call, actor._call._encode_ahead
    actor._call._call = lambda *args: encoded.append((step, args[2])) or call(*args)
    actor._call._encode_ahead = lambda *args: encoded.append((step, args[2])) or encode_ahead(*args)
    for step in range(len(given)):
        actor(given[step])
    assert new_frames(policy.config) == 2  # 4 frames, 4 steps apart; 8 actions between the calls
    assert [(step, {k: v.shape[1] for k, v in x.items()}) for step, x in encoded] == [
        (step, {"image": 1, "wrist_image": 1})
        for step in (0, 0, 4, 8, 12, 16)  # the first is there for the compilation
    ]
    window = actor._window()
    encode = jax.jit(lambda frames: policy.vae.encode(policy.preprocess(frames)))
    for name, kept in actor._call._kept[0].moments.items():
        wanted = encode(window[name][0])
        for found, moment in zip(kept, wanted, strict=True):
            np.testing.assert_allclose(found[0], moment, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("committed", [False, True])
def test_nothing_is_compiled_after_the_first_action(quick_compilation, committed):
    """A policy that was loaded from a folder is committed to its device."""
    policy = make_policy(SMALL)
    if committed:
        arrays = jax.device_put(surgery.flatten(policy), jax.devices()[0])
        policy = surgery.replace(surgery.abstract_policy(SMALL), arrays)
    actor, given = policy.actor(sampling_steps=2), observations(17)
    for obs in given:
        actor(obs)
    assert actor._call._encode_ahead._cache_size() == actor._call._call._cache_size() == 1


@pytest.mark.parametrize(
    ("executed", "ahead"), [(8, {4}), (16, {4, 8, 12}), (4, set()), (10, set())]
)
def test_new_frames_are_encoded_before_the_call(executed, ahead):
    """With 10 actions a call's frames lie between those of the call before."""
    config = dataclasses.replace(SMALL, n_action_steps=executed)
    assert ahead_steps(config) == ahead


def test_each_environment_of_a_batch_gets_what_it_gets_alone(quick_compilation):
    policy = make_policy(SMALL)
    both, alone = policy.actor(sampling_steps=2), policy.actor(sampling_steps=2)
    for obs in observations(9, batch=2):
        found, wanted = both(obs), alone({k: v[0] for k, v in obs.items()})
        assert found.shape == (2, 10) and wanted.shape == (10,)
        np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_can_be_at_different_calls(quick_compilation):
    """Row 0 begins an episode while row 1 goes on, in another row of each call."""
    policy = make_policy(SMALL)
    given, index = observations(25, batch=2), np.arange(2, dtype=np.int32)

    def window(rows, now):
        steps = np.maximum(now - 15 + np.arange(16), 0)
        picks = steps[[3, 7, 11, 15]]
        found = {"text_latents": np.stack([given[0]["text_latents"][r] for r in rows])}
        for name in ("image", "wrist_image"):
            found[name] = np.stack([[given[i][name][r] for i in picks] for r in rows])
        for name in ROBOT_STATE:
            found[name] = np.stack([[given[i][name][r] for i in steps] for r in rows])
        past = np.zeros((len(rows), 16, 10), np.float32)
        return found | {"past_action": past if now else np.full_like(past, np.nan)}

    def both(first, second):
        return {k: np.concatenate([first[k], second[k]]) for k in first}

    call, alone = PolicyCall(policy, "2"), PolicyCall(policy, "2")
    wanted = {now: alone(window([1], now), index[1:], now // 8) for now in (0, 8, 16)}
    first = {k: v for k, v in window([0], 0).items() if k != "past_action"}
    start = PolicyCall(policy, "2")(first, index[:1], 0)
    for turn, now in enumerate((0, 8, 16)):
        call(window([0, 1], 0), index, 0, slots=index + 2)
        rows = [window([0], 0), window([1], now)]
        order = (0, 1) if turn < 2 else (1, 0)
        found = call(
            both(rows[order[0]], rows[order[1]]),
            index[list(order)],
            np.array([0, turn])[list(order)],
            slots=index[list(order)],
        )
        np.testing.assert_allclose(found[order[0]], start[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[order[1]], wanted[now][0], rtol=1e-4, atol=1e-4)
    assert call._kept.keys() == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "the observation lacks image, which this policy reads; it holds wrist"),
        ({"robot0_eef_pos": None}, "lacks robot0_eef_pos"),
        ({"image": np.zeros((16, 16), np.uint8)}, r"image of the observation is uint8 \(16, 16\)"),
        ({"image": np.zeros((16, 16, 3), np.int64)}, "reads any x any x 3 uint8 or float in 0..1"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "other than at the step before"),
        ({"wrist_image": np.zeros((2, 16, 16, 3), np.uint8)}, "with or without a batch axis"),
        ({"robot0_eef_pos": np.zeros(4)}, r"is float64 \(4,\), but this policy reads 3 numbers"),
        ({"robot0_eef_pos": np.full(3, np.nan)}, "not finite"),
        ({"text_latents": "push"}, "text_latents of the observation is"),
    ],
)
def test_an_observation_that_does_not_fit_is_explained(calls, changes, message):
    actor, given = Actor(surgery.abstract_policy(SMALL)), observations(2)
    actor(given[0])
    changed = {k: v for k, v in (given[1] | changes).items() if v is not None}
    with pytest.raises(UserError, match=message):
        actor(changed)
    actor(given[1])  # nothing of the refused observation is kept
    assert len(actor._seen) == 2


def test_sampling_steps_that_do_not_exist_are_refused_at_once():
    with pytest.raises(UserError, match="'many'"):
        surgery.abstract_policy(CONFIG).actor(sampling_steps="many")


def test_a_policy_is_loaded_by_name():
    policy = uva_jax.load("embedded")
    assert policy.config.task == "pusht" and callable(policy.actor)
    with pytest.raises(UserError, match=r"there is no such file or folder: give a policy folder"):
        uva_jax.load("nowhere.ckpt")


def test_the_package_itself_imports_nothing():
    code = "import sys, uva_jax; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_shapes_alone_lower_the_call(quick_compilation):
    policy = surgery.abstract_policy(SMALL)
    frame = jax.ShapeDtypeStruct((1, 4, 16, 16, 3), np.uint8)
    obs = {"image": frame, "wrist_image": frame}
    obs |= {k: jax.ShapeDtypeStruct((1, 16, n), np.float32) for k, n in ROBOT_STATE.items()}
    obs["text_latents"] = jax.ShapeDtypeStruct((1, 12), np.float32)
    one = parallel.replicated(parallel.make_mesh(devices=jax.devices()[:1]))
    actions, moments = PolicyCall(policy, "2").lower(obs, one).out_info
    assert actions.shape == (1, 8, 10)
    assert moments["wrist_image"][0].shape == policy.latent_shape(1)
