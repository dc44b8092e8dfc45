"""The embedded demonstrations and their rendering: exact, resumable, replaced when outdated."""

import json

import numpy as np
import pytest

from configs import pretrain_tiny, pusht_tiny
from uva_jax.data.pusht_demos import RenderWorker, load_demos, render_demos
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import UNIT_STEPS
from uva_jax.envs.pusht import PushT
from uva_jax.runtime.errors import UserError

EPISODES = 6  # 1,133 frames: two units


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "demos.zarr"
    return render_demos(path, max_episodes=EPISODES, workers=1)


def test_the_embedded_data_is_what_its_description_says():
    demos = load_demos()
    assert len(demos.initial_state) == len(demos.episode_ends) == 1200
    assert demos.action.shape == (demos.episode_ends[-1], 2)
    assert demos.action.min() >= 0 and demos.action.max() <= 512
    assert np.diff(demos.episode_ends, prepend=0).max() <= 300


def test_frames_show_the_state_before_their_action(rendered):
    demos = load_demos(EPISODES)
    assert rendered.n_steps > UNIT_STEPS
    np.testing.assert_array_equal(rendered.episode_ends, demos.episode_ends)
    np.testing.assert_array_equal(rendered.read("action"), demos.action)
    frames, states = rendered.read("img"), rendered.read("state")
    env = PushT()
    starts = np.concatenate(([0], demos.episode_ends[:-1]))
    for episode in (0, EPISODES - 1):  # the last one crosses the border of two units
        env.reset_to(demos.initial_state[episode])
        for step in range(starts[episode], demos.episode_ends[episode]):
            np.testing.assert_array_equal(states[step], env.state.astype(np.float32))
            if step % 10 == 0 or abs(step - UNIT_STEPS) < 3:
                np.testing.assert_array_equal(frames[step], env.render())
            env.advance(demos.action[step])


def test_fewer_episodes_are_the_beginning_of_more(rendered, tmp_path):
    few = render_demos(tmp_path / "few", max_episodes=1, workers=1)
    assert few.n_episodes == 1
    np.testing.assert_array_equal(few.read("img"), rendered.read("img", 0, few.n_steps))


def test_a_finished_rendering_is_opened_without_work(rendered):
    again = render_demos(rendered.path, max_episodes=EPISODES, progress=pytest.fail)
    assert again.fingerprint() == rendered.fingerprint()


def test_an_interrupted_rendering_resumes_to_the_same_bytes(rendered, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_demos(tmp_path / "d", max_episodes=EPISODES, workers=1, progress=interrupt)
    with pytest.raises(UserError, match="is unfinished"):
        ReplayBuffer.open(tmp_path / "d")
    seen = []
    resumed = render_demos(
        tmp_path / "d", max_episodes=EPISODES, workers=1, progress=lambda *p: seen.append(p)
    )
    assert seen == [(resumed.n_steps, resumed.n_steps)]  # one unit was missing
    for key in resumed.keys:
        np.testing.assert_array_equal(resumed.read(key), rendered.read(key))


def test_a_rendering_of_other_demonstrations_is_replaced(tmp_path):
    render_demos(tmp_path / "d", max_episodes=1, workers=1)
    attributes = json.loads((tmp_path / "d/.zattrs").read_text())
    attributes["uva_jax"]["demos"] = "an older file"
    (tmp_path / "d/.zattrs").write_text(json.dumps(attributes))
    seen = []
    render_demos(tmp_path / "d", max_episodes=1, workers=1, progress=lambda *p: seen.append(p))
    assert seen and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_demonstrations_that_no_longer_succeed_are_counted(tmp_path):
    worker = RenderWorker(str(tmp_path / "d"), 2)
    assert worker.render(0) == (399, 0)
    worker._demos.action[200:] = 0  # spoils the second of the two
    assert worker.render(0) == (399, 1)


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not written by uva_jax"):
        render_demos(tmp_path, max_episodes=1)


@pytest.mark.parametrize("number", [0, -1, 1201])
def test_impossible_numbers_of_episodes_are_refused(tmp_path, number):
    with pytest.raises(UserError, match="can be 1 to 1200"):
        render_demos(tmp_path / "d", max_episodes=number)


def test_the_default_graft_holds_out_the_episodes_that_its_teacher_never_saw():
    graft, teacher = pusht_tiny.get_config().data, pretrain_tiny.get_config().data
    for name in ("path", "max_episodes", "val_ratio", "split_seed"):
        assert graft[name] == teacher[name], name
