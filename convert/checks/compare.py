"""Comparisons of arrays with an error bound, which `verify` collects and prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """One compared output; `error` is its largest absolute error."""

    name: str
    error: float
    bound: float  # at the element with the largest error / bound
    ratio: float  # the largest error / bound; above 1 is a failure
    scale: float  # the largest magnitude of the reference

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound."""
        return self.ratio <= 1.0


class Checks:
    """Collects comparisons and passes a line for each to `show`."""

    def __init__(self, show: Callable[[str], None] = lambda line: None):
        self.results: list[Check] = []
        self.show = show

    def compare(self, name: str, got, want, bound) -> Check:
        """Compares two arrays.

        Args:
          name: of the output.
          got, want: arrays of equal shape.
          bound: largest absolute error, a number or an array (0: must be equal).
        """
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape:
            check = Check(name, np.inf, 0.0, np.inf, float(np.abs(want).max(initial=0.0)))
            line = f"{name:<58} shape {got.shape}, expected {want.shape}  FAIL"
        else:
            error = np.abs(got.astype(np.float64) - want.astype(np.float64))
            error = np.where(np.isnan(error), np.inf, error)
            bound = np.broadcast_to(np.asarray(bound, np.float64), error.shape)
            ratio = np.where(error == 0, 0.0, error / np.maximum(bound, 1e-300))
            worst = np.unravel_index(int(ratio.argmax()), ratio.shape) if ratio.size else ()
            check = Check(
                name,
                float(error.max(initial=0.0)),
                float(bound[worst]) if bound.size else 0.0,
                float(ratio.max(initial=0.0)),
                float(np.abs(want).max(initial=0.0)),
            )
            line = (
                f"{name:<58} {check.error:>10.2e} {check.scale:>10.2e} {check.bound:>10.2e} "
                f"{'ok' if check.ok else 'FAIL'}"
            )
        self.results.append(check)
        self.show(line)
        return check

    @property
    def failed(self) -> list[Check]:
        """The checks that have failed."""
        return [check for check in self.results if not check.ok]

    def summary(self) -> str:
        """Returns a sentence with the number of checks, failures, and the worst error."""
        if not self.results:
            return "nothing was checked"
        worst = max(self.results, key=lambda check: check.ratio)
        return (
            f"{len(self.results)} outputs checked, {len(self.failed)} failed; the worst error is "
            f"{worst.ratio:.2f} of its bound ({worst.name})"
        )


HEADER = f"{'output':<58} {'max error':>10} {'max value':>10} {'bound':>10}"
