"""The environment against UVA's protocol: initial states, pixels, rewards, worker processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gym_pusht.envs.pusht import PushTEnv

from uva_jax.data.pusht_demos import load_demos
from uva_jax.envs.pusht import PushT, initial_state
from uva_jax.envs.workers import WorkerError, WorkerProcess
from uva_jax.runtime.errors import UserError

# First rows of `data/state` of episodes 0, 1 and 2 of the human demonstrations: recorded by the
# original environment under seeds 0, 1 and 2.
HUMAN_STARTS = np.array(
    [
        [222.0, 97.0, 222.99382, 381.59903, 3.0079994],
        [87.0, 285.0, 158.1625, 357.18033, 5.9706206],
        [218.0, 65.0, 178.35867, 211.54848, 2.9998143],
    ],
    np.float32,
)


@pytest.fixture(scope="module")
def env():
    return PushT()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_seed_starts_where_the_original_environment_did(env, seed):
    env.reset(seed)
    np.testing.assert_allclose(env.state, HUMAN_STARTS[seed], rtol=1e-7)


def test_the_legacy_start_of_a_test_seed():
    rng = np.random.RandomState(100_000)
    numbers = [rng.randint(50, 450), rng.randint(50, 450)]
    numbers += [rng.randint(100, 400), rng.randint(100, 400), rng.randn() * 2 * np.pi - np.pi]
    np.testing.assert_array_equal(initial_state(100_000), numbers)


def test_renders_equal_gym_pushts_own_pixels(env):
    plain = PushTEnv(obs_type="pixels", render_mode="rgb_array")
    for seed in (3, 100_007):
        env.reset(seed)
        pixels, _ = plain.reset(options={"reset_to_state": initial_state(seed)})
        for action in np.random.default_rng(seed).uniform(0, 512, (6, 2)):
            np.testing.assert_array_equal(env.render(), pixels)
            env.step(action)
            pixels, *_ = plain.step(action)
    assert env.render().shape == (96, 96, 3) and env.render().dtype == np.uint8


def test_advancing_moves_exactly_as_stepping(env):
    actions = np.random.default_rng(0).uniform(0, 512, (20, 2))
    ends = []
    for move in (env.step, env.advance):
        env.reset(5)
        for action in actions:
            move(action)
        ends.append(env.state)
    np.testing.assert_array_equal(*ends)


def test_a_demonstration_replays_to_success_at_its_last_step(env):
    demos = load_demos(1)
    env.reset_to(demos.initial_state[0])
    outcomes = [env.step(action) for action in demos.action]
    assert [done for _, done in outcomes] == [False] * (len(outcomes) - 1) + [True]
    assert outcomes[-1][0] > 0.95 >= max(coverage for coverage, _ in outcomes[:-1])


def test_a_restored_state_is_exact_and_its_picture_fresh(env):
    env.reset(11)
    for shift in ((9, 0), (0, 9), (-7, 4)):  # without contacts, which are drawn but not restored
        env.step(env.agent_position + shift)
    state, picture = env.state, env.render()
    other = PushT()
    other.reset(12)
    other.set_state(state)
    np.testing.assert_allclose(other.state, state, atol=1e-9)
    np.testing.assert_array_equal(other.render(), picture)


def test_worker_modules_import_neither_jax_nor_torch():
    code = (
        "import sys, uva_jax.envs.pusht, uva_jax.data.pusht_demos\n"
        "found = {'jax', 'flax', 'torch'} & set(sys.modules)\n"
        "assert not found, found"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


def test_a_worker_that_fails_or_is_killed_says_so_at_once():
    refused = WorkerProcess("uva_jax.data.pusht_demos:RenderWorker", "/nowhere", 10**9)
    refused.send("render", 0)
    with pytest.raises(UserError, match="1000000000 demonstrations were asked for"):
        refused.receive()
    refused.close()
    failing = WorkerProcess("uva_jax.envs.pusht:PushTTask", "an argument too many")
    with pytest.raises(WorkerError, match="takes no arguments"):
        failing.receive()
    failing.close()
    killed = WorkerProcess("uva_jax.envs.pusht:PushTTask")
    os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="killed by signal 9"):
        killed.receive()
    killed.close()


def test_equal_episodes_have_equal_coverage_to_the_bit():
    start = np.array([222.0, 97.0, 243.0, 271.0, 0.9])
    found, kept = set(), []
    for _ in range(40):
        env = PushT()
        kept.append(env)  # so that every simulator's shapes have different addresses
        env.reset_to(start)
        found.add(env.step(np.array([222.0, 97.0]))[0])
    assert len(found) == 1 and 0.0 < found.pop() < 1.0
