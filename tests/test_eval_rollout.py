"""Rollouts against a simple single-process implementation of UVA's protocol."""

import os
import signal

import numpy as np
import pytest

from uva_jax.data.pusht_demos import load_demos
from uva_jax.envs.pusht import PushT, initial_state
from uva_jax.envs.workers import WorkerError
from uva_jax.eval.rollout import RolloutPool, run_rollouts

FRAMES = (3, 7, 11, 15)
DEMO_SEED = 500_003  # the embedded demonstration 0 starts from this seed


@pytest.fixture(scope="module")
def pool():
    with RolloutPool(2) as pool:
        yield pool


def scripted(seed_index, call, n_action_steps=8):
    """Returns different actions for every seed, call and step."""
    rngs = [np.random.default_rng([int(i), call]) for i in seed_index]
    return np.stack([rng.uniform(0, 512, (n_action_steps, 2)) for rng in rngs]).astype(np.float32)


class Recorder:
    """A policy that returns scripted actions and records its observations."""

    def __init__(self, n_action_steps=8):
        self.seen = []
        self._n = n_action_steps

    def __call__(self, obs, seed_index, call_index):
        self.seen.append(obs)
        return scripted(seed_index, call_index, self._n)


def plain_protocol(seed, index, calls, n_obs_steps=16, n_action_steps=8):
    """Runs the protocol: every step is rendered, and the first observation pads the history."""
    env = PushT()
    env.reset(seed)
    history, rewards, seen = [(env.render(), env.agent_position)], [], []
    for call in range(calls):
        stack = [history[0]] * (n_obs_steps - len(history)) + history[-n_obs_steps:]
        seen.append((np.stack([s[0] for s in stack]), np.stack([s[1] for s in stack])))
        for action in scripted([index], call, n_action_steps)[0]:
            coverage, _ = env.step(action)
            rewards.append(min(coverage / 0.95, 1.0))
            history.append((env.render(), env.agent_position))
    return seen, rewards


def test_observations_and_scores_equal_the_plain_protocol(pool):
    policy = Recorder()
    seeds = [100_000, 100_001, 100_002]
    result = pool.run(policy, seeds, max_steps=40)
    assert len(policy.seen) == 5
    for index, seed in enumerate(seeds):
        wanted, rewards = plain_protocol(seed, index, 5)
        assert result.scores[index] == max(rewards)
        for obs, (images, positions) in zip(policy.seen, wanted, strict=True):
            np.testing.assert_array_equal(obs["image"][index], images[list(FRAMES)])
            np.testing.assert_array_equal(obs["agent_pos"][index], positions.astype(np.float32))
    assert obs["image"].dtype == np.uint8 and obs["agent_pos"].dtype == np.float32
    np.testing.assert_array_equal(result.steps, 40)


def test_frames_at_odd_distances_are_rendered_too(pool):
    policy = Recorder(n_action_steps=6)
    pool.run(policy, [7], max_steps=24, n_obs_steps=9, n_action_steps=6, frame_indices=(0, 4, 8))
    wanted, _ = plain_protocol(7, 0, 4, n_obs_steps=9, n_action_steps=6)
    for obs, (images, _) in zip(policy.seen, wanted, strict=True):
        np.testing.assert_array_equal(obs["image"][0], images[[0, 4, 8]])


def test_the_last_chunk_is_cut_at_the_step_limit(pool):
    policy = Recorder()
    result = pool.run(policy, [100_000, 100_001], max_steps=20)
    assert len(policy.seen) == 3  # 8 + 8 + 4
    np.testing.assert_array_equal(result.steps, 20)
    for index, seed in enumerate(result.seeds):
        assert result.scores[index] == max(plain_protocol(seed, index, 3)[1][:20])


def test_an_episode_ends_at_success_and_the_batch_keeps_its_shape(pool):
    demos = load_demos(1)
    np.testing.assert_array_equal(demos.initial_state[0], initial_state(DEMO_SEED))
    n = len(demos.action)
    padded = np.concatenate([demos.action, np.zeros((16, 2), np.float32)])
    shapes = set()

    def replay(obs, seed_index, call):
        shapes.add(obs["image"].shape)
        demo = padded[8 * call : 8 * call + 8]
        demo = demo if len(demo) == 8 else np.zeros((8, 2))
        return np.stack([demo, np.full((8, 2), 256.0)])

    result = pool.run(replay, [DEMO_SEED, 100_003], max_steps=n + 16)
    assert result.scores[0] == 1.0 and result.coverage[0] > 0.95
    assert result.steps.tolist() == [n, n + 16]
    assert result.success.tolist() == [True, False]
    assert shapes == {(2, 4, 96, 96, 3)}
    assert result.mean == pytest.approx((1 + result.scores[1]) / 2)


def test_recorded_seeds_come_back_as_videos_of_every_step(pool):
    result = pool.run(Recorder(), [4, 5], max_steps=10, record_seeds=[5])
    assert list(result.videos) == [5]
    video = result.videos[5]
    env = PushT()
    env.reset(5)
    wanted = [env.render()]
    for action in np.concatenate([scripted([1], 0)[0], scripted([1], 1)[0, :2]]):
        env.step(action)
        wanted.append(env.render())
    np.testing.assert_array_equal(video, np.stack(wanted))
    unrecorded = pool.run(Recorder(), [4, 5], max_steps=10)
    np.testing.assert_array_equal(unrecorded.scores, result.scores)


def test_results_do_not_depend_on_the_number_of_workers(pool):
    alone = run_rollouts(Recorder(), [1, 2, 3], workers=1, max_steps=24)
    both = pool.run(Recorder(), [1, 2, 3], max_steps=24)
    np.testing.assert_array_equal(alone.scores, both.scores)
    np.testing.assert_array_equal(alone.coverage, both.coverage)


def test_progress_ends_at_the_step_limit(pool):
    seen = []
    pool.run(Recorder(), [1], max_steps=20, progress=lambda *p: seen.append(p))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_a_worker_that_dies_is_an_error_and_not_a_hang():
    with RolloutPool(1) as pool:

        def murderous(obs, seed_index, call):
            os.kill(pool._workers[0].pid, signal.SIGKILL)
            return scripted(seed_index, call)

        with pytest.raises(WorkerError, match="killed by signal 9"):
            pool.run(murderous, [1, 2])
        with pytest.raises(ValueError, match="closed"):
            pool.run(Recorder(), [1])


@pytest.mark.parametrize(
    ("actions", "message"),
    [(np.zeros((1, 4, 2)), "shape"), (np.full((1, 8, 2), np.nan), "not finite")],
)
def test_unusable_actions_are_explained(actions, message):
    with pytest.raises(ValueError, match=message):
        run_rollouts(lambda *_: actions, [1], workers=1)
