"""Intervals, tests and verdicts on the scores of policies that ran on the same seeds.

Verdicts rest on a confidence sequence: an interval on the mean paired difference that holds at
every number of seeds at once, so that a comparison may stop whenever it is decided, or go on after
it was looked at. It needs no assumption but independent seeds and scores in 0..1, which matters
because most differences are zero and a few are large; there, a bootstrap interval of few seeds is
too narrow. It is the hedged betting sequence of Waudby-Smith and Ramdas (arXiv 2010.09686).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

LEVEL = 0.05  # probability that an interval misses the mean
PLANNED = 400  # seeds for which a sequence is tuned, unless its caller knows better
PRACTICABLE = 5_000  # further seeds that one may still want to run

_THRESHOLD = float(np.log(2 / LEVEL))  # of the log wealth that refutes a mean
_LARGEST_BET = 0.9  # share of the capital that one seed may cost
_PRIOR_VARIANCE = 0.2  # of one difference before the first seed; affects the width, not validity

Kind = Literal["better", "not worse", "worse", "undecided"]


class Interval(NamedTuple):
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: np.ndarray, seed: int, resamples: int = 10_000) -> Interval:
    """Returns the mean of `values` (n,) and its percentile bootstrap interval.

    Args:
      values: independent values.
      seed: of the resampling.
      resamples: number of resamples.

    Raises:
      ValueError: there are no values.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"expected a non-empty row of values, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, values.size, (resamples, values.size))].mean(axis=1)
    low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Interval:
    """Returns the mean of a - b, over the same seeds in the same order, and its interval.

    The interval is a bootstrap interval for one look at a number of seeds chosen beforehand.

    Args:
      a: (n,) scores of one policy.
      b: (n,) scores of another.
      seed: of the resampling.

    Raises:
      ValueError: there are no scores, or not as many of both.
    """
    return mean_interval(_paired(a, b), seed)


def wilson(successes: int, n: int) -> Interval:
    """Returns the success rate of n independent episodes and its Wilson score interval.

    Raises:
      ValueError: n is not positive, or `successes` is not in 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes are not a success rate")
    rate, z2 = successes / n, float(norm.ppf(1 - LEVEL / 2)) ** 2
    center = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return Interval(rate, float(max(center - half, 0.0)), float(min(center + half, 1.0)))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the exact two-sided p-value of McNemar's test on discordant successes.

    Args:
      a: (n,) booleans, the successes of one policy by seed.
      b: those of another on the same seeds.

    Raises:
      ValueError: there are not as many of both.
    """
    difference = _paired(np.asarray(a, bool), np.asarray(b, bool))
    discordant = int(np.count_nonzero(difference))
    return float(binomtest(int((difference > 0).sum()), discordant).pvalue) if discordant else 1.0


def log_wealth(differences: np.ndarray, mean: float, level: float, planned: int) -> np.ndarray:
    """Returns the logarithm of the capital of a gambler who bets that the mean is above `mean`.

    If it is not, the capital is expected to shrink, and the probability that it ever reaches 2 /
    level times its start is at most level / 2. It decreases with `mean` for given differences.

    Args:
      differences: (..., n), in -1..1.
      mean: in -1..1.
      level: of the sequence that the bets are tuned for.
      planned: number of seeds that they are tuned for.

    Returns:
      (..., n), after each difference.
    """
    count = np.arange(1, differences.shape[-1] + 1)
    running = np.cumsum(differences, axis=-1) / (count + 1)
    spread = np.cumsum((differences - running) ** 2, axis=-1)
    # A bet may depend on earlier differences alone.
    before = np.concatenate([np.zeros_like(spread[..., :1]), spread[..., :-1]], axis=-1)
    variance = (_PRIOR_VARIANCE + before) / count
    bet = np.sqrt(2 * np.log(2 / level) / (variance * np.maximum(planned, count)))
    bet = np.minimum(bet, _LARGEST_BET / (1 + mean))  # the least possible difference is -1
    return np.cumsum(np.log1p(bet * (differences - mean)), axis=-1)


class PairedSequence:
    """A confidence sequence on the mean of paired differences, that is, of a policy's gain.

    Give it the differences in the order of the seeds, not in the order in which episodes end:
    short episodes are the good ones, so that the first to end are no random choice. The probability
    that any of its intervals, over all numbers of seeds together, misses the mean is at most LEVEL.
    """

    def __init__(self, margin: float, planned: int = PLANNED):
        """Starts without seeds.

        Args:
          margin: loss of score that is still accepted, at least 0.
          planned: number of seeds at which the interval is to be narrowest; it holds at all.

        Raises:
          ValueError: an argument is out of range.
        """
        if not 0 <= margin < 1 or planned < 1:
            raise ValueError(
                f"a margin of {margin} and {planned} planned seeds are not in 0..1 and 1 or more"
            )
        self.margin, self.planned = margin, planned
        self._differences = np.zeros(0)

    @property
    def differences(self) -> np.ndarray:
        """(n,) The differences so far."""
        return self._differences

    def update(self, differences: Iterable[float]) -> None:
        """Adds the differences of further seeds, each in -1..1.

        Raises:
          ValueError: a difference is out of range; nothing was added.
        """
        new = np.atleast_1d(np.asarray(differences, np.float64))
        if new.ndim != 1 or not (np.abs(new) <= 1).all():
            raise ValueError("differences of scores must be a row of numbers in -1..1")
        self._differences = np.concatenate([self._differences, new])

    def interval(self) -> Interval:
        """Returns the mean so far and the interval; -1..1 before the first seed.

        It is the intersection of the intervals after each seed, and so never widens.
        """
        if not self._differences.size:
            return Interval(0.0, -1.0, 1.0)
        low, high = self._bound(self._differences), -self._bound(-self._differences)
        return Interval(float(self._differences.mean()), low, high)

    def kind(self) -> Kind:
        """Returns what the interval says of the policy.

        better: the gain is above 0. not worse: it is above -margin, though perhaps below 0. worse:
        it is below -margin. undecided: the interval contains -margin, and seeds are missing.
        A wrong "better", a wrong "not worse" and a wrong "worse" have at most a probability of
        LEVEL / 2 each, however often one looks.
        """
        _, low, high = self.interval()
        if low > 0:
            return "better"
        if low > -self.margin:
            return "not worse"
        return "worse" if high < -self.margin else "undecided"

    def seeds_needed(self) -> int | None:
        """Returns how many more seeds would decide if they were like those so far.

        Returns:
          0 if it is decided; None if more than PRACTICABLE would be needed, or without seeds.
        """
        if self.kind() != "undecided":
            return 0
        n = self._differences.size
        if not n:
            return None
        future = np.resize(self._differences, n + PRACTICABLE)
        later = PairedSequence(self.margin, max(self.planned, PLANNED))
        reached = np.maximum(
            later._wealth(future, -self.margin), later._wealth(-future, self.margin)
        )
        crossed = np.flatnonzero(reached >= _THRESHOLD)
        return max(int(crossed[0]) + 1 - n, 1) if crossed.size else None

    def _wealth(self, differences, mean):
        return log_wealth(differences, mean, LEVEL, self.planned)

    def _bound(self, differences: np.ndarray) -> float:
        """Returns the largest mean below which, at some time, every mean was refuted."""
        low, high = -1.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if self._wealth(differences, middle).max() >= _THRESHOLD:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Verdict:
    """What a comparison says."""

    kind: Kind
    sentence: str
    difference: Interval  # of the confidence sequence
    margin: float
    seeds: int
    seeds_needed: int | None  # see `PairedSequence.seeds_needed`

    def as_json(self) -> dict:
        """Returns the verdict as it is stored in metrics.json."""
        mean, low, high = self.difference
        return {
            "kind": self.kind,
            "sentence": self.sentence,
            "difference": mean,
            "interval": [low, high],
            "margin": self.margin,
            "seeds": self.seeds,
            "seeds_needed": self.seeds_needed,
        }


def verdict(
    differences: Iterable[float],
    margin: float,
    *,
    policy: str = "the graft",
    reference: str = "its teacher",
    planned: int = PLANNED,
) -> Verdict:
    """Compares a policy with another by their paired differences; see `PairedSequence.kind`.

    Args:
      differences: score of the policy - score of the reference, in the order of the seeds.
      margin: loss of score that is still accepted.
      policy: its name in the sentence.
      reference: the other's.
      planned: see `PairedSequence`; the number of seeds, if it was chosen beforehand.

    Raises:
      ValueError: the margin, a difference or `planned` is out of range.
    """
    sequence = PairedSequence(margin, planned)
    sequence.update(differences)
    kind, difference, needed = sequence.kind(), sequence.interval(), sequence.seeds_needed()
    return Verdict(
        kind,
        _sentence(sequence, kind, difference, needed, policy, reference),
        difference,
        margin,
        sequence.differences.size,
        needed,
    )


def _sentence(sequence, kind, difference, needed, policy, reference) -> str:
    margin, n = sequence.margin, sequence.differences.size
    by_more = f" by more than {margin:g}" if margin else ""
    seeds = f"{n} seed{'' if n == 1 else 's'}"
    tell = "does not tell" if n == 1 else "do not tell"
    lost = difference.high < 0
    if kind == "better":
        said = f"{policy} is better than {reference}"
    elif kind == "not worse":
        said = f"{policy} is not worse than {reference}{by_more}"
        if lost:
            said = f"{policy} is worse than {reference}, but by less than {margin:g}"
    elif kind == "worse":
        said = f"{policy} is worse than {reference}{by_more}"
    elif not n:
        return f"Without seeds, nothing is known of {policy} and {reference}."
    elif lost:
        said = f"{policy} is worse than {reference}, but {seeds} {tell} whether{by_more}"
    else:
        said = f"{seeds} {tell} whether {policy} is worse than {reference}{by_more}"
    numbers = [f"{round(value, 3) + 0.0:+.3f}" for value in difference]
    said += (
        f" (difference {numbers[0]}, {100 * (1 - LEVEL):g}% interval {numbers[1]} to "
        f"{numbers[2]}{f', {seeds}' if kind != 'undecided' else ''})"
    )
    if kind == "undecided":
        said += (
            f"; about {_rounded(needed)} more would"
            if needed
            else f"; the difference is too close to {-margin or 0:g} for any practicable number of "
            "seeds to decide"
        )
    return said[0].upper() + said[1:] + "."


def _rounded(count: int) -> int:
    """Returns a count with two significant digits."""
    return int(float(f"{count:.1e}"))


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have one shape, got {a.shape} and {b.shape}")
    return a - b
