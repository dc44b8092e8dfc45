"""Action metrics on held-out windows: error, accuracy and average precision."""

import dataclasses

import numpy as np
import pytest

from uva_jax.data import source
from uva_jax.data.windows import plan_strips
from uva_jax.eval.actions import action_figures, average_precision, sample_actions
from uva_jax.models import surgery
from uva_jax.runtime.settings import section


def test_average_precision_is_the_mean_precision_at_the_hits():
    # Ranked: hit, miss, hit, miss -> (1/1 + 2/3) / 2.
    correct, confidence = [False, True, False, True], [0.1, 0.3, 0.5, 0.9]
    assert average_precision(correct, confidence) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([True] * 3, [1, 2, 3]) == 1.0
    assert average_precision([False] * 3, [1, 2, 3]) == 0.0


def test_steps_within_a_tolerance_count_as_right():
    truth = np.zeros((2, 2, 2))
    samples = np.zeros((3, 2, 2, 2))
    samples[0, 0, 0] = 0.06  # root mean square distance 0.06
    samples[0, 1, 1] = 0.5
    found = action_figures(samples, truth)
    assert found["accuracy"] == {"0.02": 0.5, "0.05": 0.5, "0.1": 0.75, "0.2": 0.75}
    assert found["mse"] == pytest.approx((0.06**2 + 0.5**2) / 4)


def test_a_policy_that_knows_where_it_is_wrong_ranks_higher():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 16, 2))
    wrong = rng.random((50, 16, 1)) < 0.5
    first = truth + np.where(wrong, 0.5, 0.01)
    aware = np.stack([first, first + np.where(wrong, 0.3, 0.0)])
    unaware = np.stack([first, first + np.where(wrong, 0.0, 0.3)])
    assert action_figures(aware, truth)["map"] > 0.99
    assert action_figures(unaware, truth)["map"] < 0.5


def test_samples_do_not_depend_on_the_batch_and_repeat(teacher, buffer, make_config):
    options = section(make_config().data, source.DataOptions)
    reader = source.WindowReader(buffer, options, teacher)
    strips = plan_strips(
        buffer.episode_ends, np.ones(3, bool), strip=1, stride=4, options=options, seed=0, count=5
    )
    found = [
        sample_actions(teacher, reader, strips, draws=2, sampling_steps="3", seed=0, batch=batch)
        for batch in (5, 2, 5)
    ]
    assert found[0][0].shape == (2, 5, 16, 2) and found[0][1].shape == (5, 16, 2)
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    np.testing.assert_array_equal(found[0][0], found[2][0])
    assert np.abs(found[0][0][0] - found[0][0][1]).max() > 1e-3  # draws differ
    rows = source.single_windows(reader.read(strips, np.arange(5)))
    np.testing.assert_allclose(found[0][1], rows["action"] / 256 - 1, atol=1e-6)


def test_sampling_steps_do_not_depend_on_the_steps_that_a_head_learned(
    teacher, buffer, make_config
):
    """As in the original, a head that learned 2 timesteps can be sampled in 3 of 1000."""
    options = section(make_config().data, source.DataOptions)
    reader = source.WindowReader(buffer, options, teacher)
    strips = plan_strips(
        buffer.episode_ends, np.ones(3, bool), strip=1, stride=4, options=options, seed=0, count=2
    )
    config = teacher.config
    head = dataclasses.replace(config.action_head, train_steps=2)
    few = surgery.replace(
        surgery.abstract_policy(dataclasses.replace(config, action_head=head)),
        surgery.flatten(teacher),
    )
    found, wanted = (
        sample_actions(policy, reader, strips, draws=2, sampling_steps="3", seed=0)[0]
        for policy in (few, teacher)
    )
    np.testing.assert_array_equal(found, wanted)
