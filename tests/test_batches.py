"""Rows computed in batches of one size."""

import numpy as np
import pytest

from uva_jax.runtime.batches import in_batches


@pytest.mark.parametrize("count, calls", [(3, 1), (8, 2), (9, 3)])
def test_rows_come_back_in_order_from_batches_of_one_size(count, calls):
    table, seen = np.random.default_rng(0).normal(size=(count, 2)), []

    def run(rows):
        seen.append(rows)
        return {"sum": table[rows].sum(axis=1), "pair": (rows, table[rows])}

    found = in_batches(run, count, 4)
    assert [len(rows) for rows in seen] == [4] * calls
    np.testing.assert_array_equal(found["sum"], table.sum(axis=1))
    np.testing.assert_array_equal(found["pair"][0], np.arange(count))
    np.testing.assert_array_equal(found["pair"][1], table)
