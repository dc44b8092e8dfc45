"""Intervals, tests and verdicts, each checked by simulated campaigns of rollouts."""

import numpy as np
import pytest
from scipy.stats import binom

from uva_jax.eval.statistics import (
    LEVEL,
    PLANNED,
    PairedSequence,
    log_wealth,
    mcnemar,
    mean_interval,
    paired_difference,
    verdict,
    wilson,
)

THRESHOLD = np.log(2 / LEVEL)


def gaussian(rng, shape, mean, spread):
    return np.clip(rng.normal(mean, spread, shape), -1, 1)


def score_like(rng, shape, mean, spread):
    """Most differences are zero, some small, a few large: one policy failed where another did not.

    The frequencies of the large ones give the wanted mean and spread.
    """
    small, size = 0.2 * 0.03**2, 0.8 if spread > 0.2 else 0.3
    large = (spread**2 + mean**2 - small) / size**2
    up = (large + mean / size) / 2
    kind = rng.random(shape)
    values = np.where(kind < large, np.where(kind < up, size, -size), 0.0)
    near = (kind >= large) & (kind < large + 0.2)
    return np.where(near, np.clip(rng.normal(0, 0.03, shape), -1, 1), values)


SHAPES = [gaussian, score_like]
SPREADS = [0.12, 0.23]


def refuted(differences, mean, planned=PLANNED):
    """Whether and when the sequence of each campaign refutes that the mean is at most `mean`."""
    return log_wealth(differences, mean, LEVEL, planned) >= THRESHOLD


# ---- intervals ----


def test_the_bootstrap_interval_matches_theory():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    interval = mean_interval(values, seed=0)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=5e-4)
    assert interval.high == pytest.approx(values.mean() + half, abs=5e-4)
    assert mean_interval(values, seed=0) == interval
    with pytest.raises(ValueError, match="non-empty row"):
        mean_interval(np.zeros((2, 2)), seed=0)


def test_the_bootstrap_interval_covers_the_mean_of_scores():
    rng = np.random.default_rng(1)  # nine in ten succeed, the others end anywhere
    scores = np.where(rng.random((500, 200)) < 0.9, 1.0, rng.random((500, 200)))
    intervals = [mean_interval(row, seed=0, resamples=500) for row in scores]
    covered = np.mean([low <= 0.95 <= high for _, low, high in intervals])
    assert 0.92 <= covered <= 0.98


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    b = rng.uniform(0, 1, 50)
    difference = paired_difference(b + 0.05 + rng.normal(0, 0.01, 50), b)
    assert 0.045 < difference.low < difference.mean < difference.high < 0.055
    with pytest.raises(ValueError, match="must have one shape"):
        paired_difference(b, b[:49])


@pytest.mark.parametrize("n", [20, 50, 200])
def test_the_wilson_interval_covers_the_success_rate(n):
    intervals = np.array([wilson(k, n) for k in range(n + 1)])
    rates = np.linspace(0.02, 0.98, 193)[:, None]
    inside = (intervals[:, 1] <= rates) & (rates <= intervals[:, 2])
    coverage = (binom.pmf(np.arange(n + 1), n, rates) * inside).sum(axis=1)
    assert 0.94 < coverage.mean() < 0.97 and coverage.min() > 0.85


def test_the_wilson_interval_of_known_counts():
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == 1
    with pytest.raises(ValueError, match="3 successes in 2 episodes"):
        wilson(3, 2)


def test_mcnemar_is_the_sign_test_on_discordant_seeds():
    a = np.array([1] * 9 + [0] * 1 + [1] * 40 + [0] * 5)
    b = np.array([0] * 9 + [1] * 1 + [1] * 40 + [0] * 5)
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0


def test_mcnemar_keeps_its_level():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 2000, 100)) < 0.8
    assert np.mean([mcnemar(*pair) <= LEVEL for pair in zip(a, b, strict=True)]) <= LEVEL


# ---- the confidence sequence, over all numbers of seeds ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("mean", [0.0, 0.05])
def test_the_sequence_covers_the_mean_at_all_times(shape, spread, mean):
    differences = shape(np.random.default_rng(3), (2000, 500), mean, spread)
    missed = refuted(differences, mean) | refuted(-differences, -mean)
    assert missed.any(axis=1).mean() <= LEVEL


@pytest.mark.parametrize("planned", [50, 1000])
def test_the_sequence_covers_whatever_number_was_planned(planned):
    differences = score_like(np.random.default_rng(4), (2000, 500), 0.0, 0.23)
    missed = refuted(differences, 0.0, planned) | refuted(-differences, 0.0, planned)
    assert missed.any(axis=1).mean() <= LEVEL


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_wrong_verdict_is_rarer_than_its_level(shape, spread):
    """2000 campaigns whose policy is worse by just the margin, and as many that equal it."""
    margin = 0.02
    worse = shape(np.random.default_rng(5), (2000, 500), -margin, spread)
    assert refuted(worse, -margin).any(axis=1).mean() <= LEVEL / 2  # "not worse" or "better"
    assert refuted(-worse, margin).any(axis=1).mean() <= LEVEL / 2  # "worse"
    equal = shape(np.random.default_rng(6), (2000, 500), 0.0, spread)
    assert refuted(equal, 0.0).any(axis=1).mean() <= LEVEL / 2  # "better"


def test_the_test_does_reject_where_a_fixed_interval_looked_at_often_fails():
    """What the sequence is for: a bootstrap interval looked at after each seed is wrong too often.

    The normal interval stands for it, which is the same for many seeds.
    """
    differences = gaussian(np.random.default_rng(7), (2000, 500), 0.0, 0.23)
    count = np.arange(1, 501)
    means = np.cumsum(differences, axis=1) / count
    excluded = np.abs(means) > 1.96 * 0.23 / np.sqrt(count)
    assert excluded[:, 20:].any(axis=1).mean() > 4 * LEVEL


@pytest.mark.parametrize(
    ("spread", "seeds", "most"), [(0.12, 200, 2.0), (0.12, 500, 1.5), (0.23, 200, 1.5)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_is_at_most_so_much_wider_than_a_bootstrap_one(shape, spread, seeds, most):
    rng = np.random.default_rng(8)
    ratios = []
    for _ in range(10):
        differences = shape(rng, seeds, 0.0, spread)
        sequence = PairedSequence(0.02, planned=seeds)
        sequence.update(differences)
        ours, theirs = sequence.interval(), mean_interval(differences, seed=0, resamples=2000)
        ratios.append((ours.high - ours.low) / (theirs.high - theirs.low))
    assert 1.0 < np.mean(ratios) < most


@pytest.mark.parametrize(("spread", "most"), [(0.12, 150), (0.23, 260)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_difference_of_five_hundredths_is_decided_in_few_seeds(shape, spread, most):
    differences = shape(np.random.default_rng(9), (500, 3000), 0.05, spread)
    decided = refuted(differences, -0.02)
    assert decided.any(axis=1).all()
    assert np.argmax(decided, axis=1).mean() + 1 < most


def test_seeds_may_come_in_any_parts_and_the_interval_never_widens():
    differences = score_like(np.random.default_rng(10), 120, 0.03, 0.23)
    whole, parts = PairedSequence(0.02), PairedSequence(0.02)
    whole.update(differences)
    assert parts.interval() == (0.0, -1.0, 1.0)
    low, high = -1.0, 1.0
    for value in differences:
        parts.update([value])
        _, new_low, new_high = parts.interval()
        assert low <= new_low < new_high <= high
        low, high = new_low, new_high
    assert parts.interval() == whole.interval()
    # The bounds are the means at which the capital reaches its threshold.
    assert refuted(differences, low - 1e-9).any() and not refuted(differences, low + 1e-9).any()


def test_what_is_no_difference_of_scores_is_refused():
    sequence = PairedSequence(0.02)
    for wrong in ([0.1, 1.2], [np.nan], [[0.1]]):
        with pytest.raises(ValueError, match="-1..1"):
            sequence.update(wrong)
    assert not sequence.differences.size
    with pytest.raises(ValueError, match="margin of -0.1"):
        PairedSequence(-0.1)


# ---- verdicts ----


def constant(value, n=800):
    """Differences around a value, with a little noise."""
    return np.clip(value + np.random.default_rng(11).normal(0, 0.02, n), -1, 1)


@pytest.mark.parametrize(
    ("mean", "kind", "words"),
    [
        (0.05, "better", "The graft is better than its teacher (difference +0.0"),
        (0.0, "not worse", "The graft is not worse than its teacher by more than 0.02 (diff"),
        (-0.01, "not worse", "The graft is worse than its teacher, but by less than 0.02 (diff"),
        (-0.05, "worse", "The graft is worse than its teacher by more than 0.02 (difference -0.0"),
        (-0.02, "undecided", "The graft is worse than its teacher, but 800 seeds do not tell"),
    ],
)
def test_the_four_verdicts_in_words(mean, kind, words):
    found = verdict(constant(mean), 0.02)
    assert found.kind == kind and found.sentence.startswith(words)
    assert f"95% interval {found.difference.low:+.3f} to" in found.sentence
    assert "800 seeds" in found.sentence
    assert (found.seeds_needed == 0) == (kind != "undecided")
    assert found.as_json()["interval"] == [found.difference.low, found.difference.high]


def test_without_a_margin_only_a_sign_decides():
    assert verdict(constant(0.05), 0.0).kind == "better"
    worse = verdict(constant(-0.05), 0.0)
    assert worse.sentence.startswith("The graft is worse than its teacher (")
    found = verdict(np.zeros(50), 0.0)
    assert found.kind == "undecided" and found.seeds_needed is None
    assert found.sentence.endswith(
        "; the difference is too close to 0 for any practicable number of seeds to decide."
    )


def test_a_difference_on_the_margin_is_not_promised_to_be_decided():
    for mean in (-0.0199, -0.0201):
        differences = np.clip(np.random.default_rng(3).normal(0, 0.2, 50), -1, 1)
        found = verdict(differences - differences.mean() + mean, 0.02)
        low, high = found.difference.low, found.difference.high
        assert found.kind == "undecided" and found.seeds_needed is None
        assert found.sentence.startswith("50 seeds do not tell whether the graft is worse than")
        assert found.sentence.endswith(
            f" (difference -0.020, 95% interval {low:+.3f} to {high:+.3f}); the difference is too "
            "close to -0.02 for any practicable number of seeds to decide."
        )


def test_few_equal_seeds_do_not_show_that_losses_are_rare():
    """A bootstrap interval of equal scores has no width; one loss in 30 seeds would be missed."""
    assert verdict(np.zeros(50), 0.02).kind == "undecided"
    assert verdict(np.zeros(400), 0.02).kind == "not worse"
    assert verdict([1.0], 0.02).kind == "undecided"
    assert verdict([1.0], 0.02).sentence.startswith("1 seed does not tell whether the graft is")
    assert verdict([], 0.02).seeds_needed is None


def test_the_number_of_seeds_that_are_missing_is_about_right():
    rng = np.random.default_rng(12)
    missing, true = [], []
    for _ in range(40):
        differences = gaussian(rng, 3000, 0.03, 0.23)
        missing.append(verdict(differences[:40], 0.02).seeds_needed or 0)
        true.append(np.argmax(refuted(differences, -0.02)) + 1 - 40)
    assert 0.5 < np.median(missing) / np.median(true) < 2


def test_decisions_on_success_rates_agree_with_a_referee():
    """STEP (arXiv 2503.10966) is an exact sequential test of two unpaired success rates."""
    step = pytest.importorskip("sequentialized_barnard_tests")
    rng = np.random.default_rng(13)
    referee = step.MirroredStepTest(step.Hypothesis.P0LessThanP1, 200, LEVEL, random_seed=0)

    def decide(first, second):
        referee.reset()
        theirs = {
            "AcceptAlternative": "better",
            "AcceptNull": "worse",
        }.get(referee.run_on_sequence(first, second).decision.name, "undecided")
        return theirs, verdict(second.astype(float) - first, 0.0).kind

    for rates, kind in (((0.5, 0.9), "better"), ((0.9, 0.5), "worse")):
        decisions = [decide(*(rng.random(200) < rate for rate in rates)) for _ in range(10)]
        assert decisions == [(kind, kind)] * 10
    equal = [decide(*(rng.random((2, 200)) < 0.8)) for _ in range(40)]
    assert sum(ours != "undecided" for _, ours in equal) <= 4
    assert sum(theirs != "undecided" for theirs, _ in equal) <= 4
