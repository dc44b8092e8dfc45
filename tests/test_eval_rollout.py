"""Rollouts against a simple single-process implementation of UVA's protocol."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from line_world import LeftOrRight

from uva_jax.data.pusht_demos import load_demos
from uva_jax.envs.episode import RolloutSpec
from uva_jax.envs.pusht import PushT, initial_state
from uva_jax.envs.workers import WorkerError
from uva_jax.eval.rollout import EMPTY, RolloutPool
from uva_jax.eval.scores import ScoreFile
from uva_jax.runtime.errors import UserError

FRAMES = (3, 7, 11, 15)
DEMO_SEED = 500_003  # the embedded demonstration 0 starts from this seed
BOTH = RolloutSpec(names=("image", "agent_pos"))


@pytest.fixture(scope="module")
def pool():
    with RolloutPool(2) as pool:
        yield pool


def scripted(seed_index, call_index, n_action_steps=8):
    """Returns different actions for every seed, call and step."""
    rngs = [
        np.random.default_rng([int(i) + 1, int(call)])
        for i, call in zip(seed_index, call_index, strict=True)
    ]
    return np.stack([rng.uniform(0, 512, (n_action_steps, 2)) for rng in rngs]).astype(np.float32)


class Recorder:
    """A policy that returns scripted actions and records its observations by episode and call."""

    def __init__(self, n_action_steps=8):
        self.seen, self.batches = {}, []
        self._n = n_action_steps

    def __call__(self, obs, seed_index, call_index, slots):
        used = seed_index != EMPTY
        self.batches.append((len(seed_index), slots[used].tolist()))
        for row, key in enumerate(zip(seed_index.tolist(), call_index.tolist(), strict=True)):
            if key[0] != EMPTY:
                assert key not in self.seen
                self.seen[key] = {name: x[row] for name, x in obs.items()}
        return scripted(seed_index, call_index, self._n)


def plain_protocol(seed, index, calls, n_obs_steps=16, n_action_steps=8):
    """Runs the protocol: every step is rendered, and the first observation pads the history."""
    env = PushT()
    env.reset(seed)
    history, rewards, seen = [(env.render(), env.agent_position)], [], []
    for call in range(calls):
        stack = [history[0]] * (n_obs_steps - len(history)) + history[-n_obs_steps:]
        seen.append((np.stack([s[0] for s in stack]), np.stack([s[1] for s in stack])))
        for action in scripted([index], [call], n_action_steps)[0]:
            coverage, _ = env.step(action)
            rewards.append(min(coverage / 0.95, 1.0))
            history.append((env.render(), env.agent_position))
    return seen, rewards


@pytest.mark.parametrize("slots", [1, 3, 4, 32])
def test_observations_and_scores_equal_the_plain_protocol(pool, slots):
    policy = Recorder()
    seeds = list(range(100_000, 100_005))
    result = pool.run(policy, seeds, spec=replace(BOTH, max_steps=24), slots=slots)
    assert policy.seen.keys() == {(i, call) for i in range(5) for call in range(3)}
    for index, seed in enumerate(seeds):
        wanted, rewards = plain_protocol(seed, index, 3)
        assert result.scores[index] == max(rewards)
        for call, (images, positions) in enumerate(wanted):
            obs = policy.seen[index, call]
            np.testing.assert_array_equal(obs["image"], images[list(FRAMES)])
            np.testing.assert_array_equal(obs["agent_pos"], positions.astype(np.float32))
    assert obs["image"].dtype == np.uint8 and obs["agent_pos"].dtype == np.float32
    np.testing.assert_array_equal(result.seeds, seeds)
    np.testing.assert_array_equal(result.steps, 24)


def test_frames_at_odd_distances_are_rendered_too(pool):
    policy = Recorder(n_action_steps=6)
    spec = RolloutSpec(n_obs_steps=9, chunk=6, frames=(0, 4, 8), max_steps=24)
    pool.run(policy, [7], spec=spec)
    wanted, _ = plain_protocol(7, 0, 4, n_obs_steps=9, n_action_steps=6)
    for call, (images, _) in enumerate(wanted):
        np.testing.assert_array_equal(policy.seen[0, call]["image"], images[[0, 4, 8]])


def test_the_last_chunk_is_cut_at_the_step_limit(pool):
    policy = Recorder()
    result = pool.run(policy, [100_000, 100_001], spec=RolloutSpec(max_steps=20))
    assert len(policy.seen) == 2 * 3  # 8 + 8 + 4
    np.testing.assert_array_equal(result.steps, 20)
    for index, seed in enumerate(result.seeds):
        assert result.scores[index] == max(plain_protocol(seed, index, 3)[1][:20])


def test_an_episode_that_ended_makes_room_for_the_next_seed(pool):
    demo = load_demos(1)
    np.testing.assert_array_equal(demo.initial_state[0], initial_state(DEMO_SEED))
    n = len(demo.action)
    padded = np.concatenate([demo.action, np.zeros((16, 2), np.float32)])
    rows = []

    def replay(obs, seed_index, call_index, slots):
        rows.append((seed_index.tolist(), call_index.tolist()))
        assert obs["image"].shape == (1, 4, 96, 96, 3)
        start = 8 * int(call_index[0])
        solves = seed_index[0] == 0 and start < n
        return padded[None, start : start + 8] if solves else np.full((1, 8, 2), 256.0)

    seeds, ended = [DEMO_SEED, 100_003, 100_004], []
    spec = RolloutSpec(max_steps=n + 16)
    result = pool.run(replay, seeds, spec=spec, slots=1, ended=lambda o, _: ended.append(o.seed))
    assert result.scores[0] == 1.0 and result.success.tolist() == [True, False, False]
    assert result.steps.tolist() == [n, n + 16, n + 16] and ended == seeds
    calls = [-(-steps // 8) for steps in result.steps]
    assert rows == [([i], [call]) for i, count in enumerate(calls) for call in range(count)]


def test_two_halves_of_the_slots_alternate_and_are_full_until_seeds_run_out(pool):
    policy = Recorder()
    pool.run(policy, range(12), slots=4, spec=RolloutSpec(max_steps=16))
    assert policy.batches == [(2, [0, 1]), (2, [2, 3])] * 6


def test_episodes_that_fit_one_half_go_on_in_it(pool):
    """Each seed of the simulator takes its own number of steps; both halves end half empty."""
    lengths = [2, 6, 2, 6]

    def act(obs, seed_index, call_index, slots):
        calls.append((seed_index.tolist(), call_index.tolist(), slots.tolist()))
        return np.ones((2, 1, 1))

    calls, spec = [], RolloutSpec(("image",), 1, frames=(0,), chunk=1, max_steps=9)
    with RolloutPool(2, simulator="line_world:Walker") as walkers:
        result = walkers.run(act, lengths, numbers=range(4), slots=4, spec=spec)
    assert result.steps.tolist() == lengths and result.success.all()
    # The first half goes on alone until the second is known to be half empty too.
    assert calls == [
        *(([0, 1], [0, 0], [0, 1]), ([2, 3], [0, 0], [2, 3])),
        *(([0, 1], [1, 1], [0, 1]), ([2, 3], [1, 1], [2, 3])),
        ([EMPTY, 1], [2, 2], [0, 1]),
        *(([1, 3], [3 + turn, 2 + turn], [1, 3]) for turn in range(3)),
        ([EMPTY, 3], [6, 5], [1, 3]),
    ]


def test_recorded_seeds_come_back_as_videos_of_every_step(pool):
    short = RolloutSpec(max_steps=10)
    result = pool.run(Recorder(), [4, 5], spec=short, record_seeds=[5])
    assert list(result.videos) == [5]
    video = result.videos[5]
    env = PushT()
    env.reset(5)
    wanted = [env.render()]
    for action in np.concatenate([scripted([1], [0])[0], scripted([1], [1])[0, :2]]):
        env.step(action)
        wanted.append(env.render())
    np.testing.assert_array_equal(video, np.stack(wanted))
    unrecorded = pool.run(Recorder(), [4, 5], spec=short)
    np.testing.assert_array_equal(unrecorded.scores, result.scores)


def test_results_do_not_depend_on_the_number_of_workers(pool):
    spec = RolloutSpec(max_steps=24)
    with RolloutPool(1) as single:
        alone = single.run(Recorder(), [1, 2, 3], spec=spec)
    both = pool.run(Recorder(), [1, 2, 3], spec=spec)
    np.testing.assert_array_equal(alone.scores, both.scores)


def test_progress_counts_episodes(pool):
    seen = []
    run = pool.run(
        Recorder(), [1, 2], spec=RolloutSpec(max_steps=12), progress=lambda *p: seen.append(p)
    )
    assert seen == [(0, 2), (0, 2), (2, 2)]  # the start is a turn too
    assert run.times.policy + run.times.simulator <= run.times.total


def test_scores_are_stored_as_episodes_end_and_only_missing_ones_are_run(pool, tmp_path):
    episodes, spec = [(seed, seed) for seed in range(1, 5)], RolloutSpec(max_steps=8)
    path, policy = tmp_path / "scores.jsonl", Recorder()

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RolloutPool(1) as other:
        ScoreFile(path).roll_out(other, policy, episodes, spec=spec, slots=1, progress=stop)
    path.write_bytes(path.read_bytes() + b'{"seed": 3')  # what a killed run leaves behind
    file, policy, bars = ScoreFile(path), Recorder(), []
    assert file.count(episodes) == 2
    file.roll_out(pool, policy, episodes, spec=spec, progress=lambda *p: bars.append(p))
    assert {number for number, _ in policy.seen} == {3, 4} and bars[-1] == (4, 4)
    whole = pool.run(Recorder(), range(1, 5), numbers=range(1, 5), spec=spec)
    stored = ScoreFile(path)
    assert [stored.scores[e].score for e in episodes] == whole.scores.tolist()
    assert stored.times == file.times and stored.times.total > 0


def test_a_simulator_that_users_bring_is_a_class_that_the_configuration_names():
    def act(obs, seed_index, call_index, slots):
        assert obs["position"].shape == (2, 2, 1) and obs["past_action"].shape == (2, 3, 1)
        assert np.isnan(obs["past_action"]).all() == (call_index[0] == 0)
        return np.where(obs["task"][:, None, None] == 0, -1.0, 0.5) * np.ones((2, 2, 1))

    spec = RolloutSpec(
        ("image", "position", "text_latents"), 2, frames=(1,), chunk=2, past_actions=3, max_steps=5
    )
    with RolloutPool(1, simulator="line_world:LeftOrRight") as pool:
        assert pool.simulator.tasks == LeftOrRight.tasks
        pool.simulator.check(spec.names, 1, "the policy")
        with pytest.raises(
            UserError, match="lacks wrist_image, which the policy reads; it provides"
        ):
            pool.simulator.check(("image", "wrist_image"), 1, "the policy")
        with pytest.raises(
            UserError, match="takes actions of 1 numbers, but those of the policy h"
        ):
            pool.simulator.check(("image",), 2, "the policy")
        result = pool.run(act, [10, 11], spec=spec)
    assert result.success.tolist() == [True, False] and result.steps.tolist() == [3, 5]
    assert result.scores.tolist() == [1.0, pytest.approx(2.5 / 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:Class", "'nowhere.at_all:Class' cannot be imported"),
        ("line_world:TASKS", "is not a class with the methods reset, observe, step"),
    ],
)
def test_a_class_that_is_no_simulator_is_explained(name, message):
    with pytest.raises(UserError, match=message):
        RolloutPool(1, simulator=name)


def test_a_worker_that_dies_is_an_error_and_not_a_hang():
    with RolloutPool(1) as pool:

        def murderous(obs, seed_index, call_index, slots):
            os.kill(pool._workers[0].pid, signal.SIGKILL)
            return scripted(seed_index, call_index)

        with pytest.raises(WorkerError, match="killed by signal 9"):
            pool.run(murderous, [1, 2])
        with pytest.raises(ValueError, match="closed"):
            pool.run(Recorder(), [1])


@pytest.mark.parametrize(
    ("actions", "message"),
    [(np.zeros((1, 4, 2)), "shape"), (np.full((1, 8, 2), np.nan), "not finite")],
)
def test_unusable_actions_are_explained(actions, message):
    with RolloutPool(1) as other, pytest.raises(ValueError, match=message):
        other.run(lambda *_: actions, [1])
