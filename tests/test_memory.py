"""The peak memory that a stage records."""

import sys

import jax
import numpy as np
import pytest

from uva_jax.runtime import memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can restart the measurement")
def test_the_peak_is_that_since_the_measurement_was_started():
    memory.restart_peak()
    before = memory.peak(jax.local_devices())
    np.ones(60_000_000).sum()  # 480 MB, freed at once
    with_array = memory.peak(jax.local_devices())
    assert 440e6 < with_array - before < 560e6
    memory.restart_peak()
    assert memory.peak(jax.local_devices()) < with_array - 400e6
