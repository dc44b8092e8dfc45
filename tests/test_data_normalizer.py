"""Normalisation against upstream's fits (golden), and its inverse as a property."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from uva_jax.data.normalizer import fit, fit_field, image_field, normalize, unnormalize
from uva_jax.runtime.errors import UserError

FITS = [(mode, offset) for mode in ("limits", "gaussian") for offset in (True, False)]


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "goldens" / "data_path_slim.npz") as arrays:
        return dict(arrays)


def assert_field(field, golden, prefix):
    stats = field["input_stats"]
    for name, value in (("scale", field["scale"]), ("offset", field["offset"])):
        assert value.dtype == np.float32
        wanted = golden[f"{prefix}.{name}"]
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
    for name in ("min", "max", "mean", "std"):
        wanted = golden[f"{prefix}.input_stats.{name}"]
        np.testing.assert_allclose(stats[name], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mode", "offset"), FITS)
def test_fits_and_results_equal_upstreams(golden, mode, offset):
    case = f"norm/{mode}_offset{int(offset)}"
    field = fit_field(golden["norm/data"], mode=mode, fit_offset=offset)
    assert_field(field, golden, f"{case}/params_dict")
    query, data = golden["norm/query"], golden["norm/data"]
    close = dict(rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(normalize(data, field), golden[f"{case}/normalized_data"], **close)
    np.testing.assert_allclose(normalize(query, field), golden[f"{case}/normalized_query"], **close)
    inverse = unnormalize(query, field)
    np.testing.assert_allclose(inverse, golden[f"{case}/unnormalized_query"], **close)


def test_the_image_entry_equals_upstreams(golden):
    assert_field(image_field(), golden, "norm/pusht_like/params_dict.image")


def test_limits_reach_both_ends_and_constant_columns_go_to_zero():
    data = np.array([[0.0, 7.0], [512.0, 7.0], [100.0, 7.0]])
    scaled = normalize(data, fit({"action": data})["action"])
    assert scaled[0, 0] == -1 and scaled[1, 0] == 1
    np.testing.assert_array_equal(scaled[:, 1], 0)


@settings(max_examples=40, deadline=None)
@given(
    data=hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 9), st.just(3)),
        elements=st.floats(-600, 600, width=32),
    ),
    case=st.sampled_from(FITS),
)
def test_unnormalize_undoes_normalize(data, case):
    field = fit_field(data, mode=case[0], fit_offset=case[1])
    back = unnormalize(normalize(data, field), field)
    tolerance = 1e-5 * np.maximum(np.abs(data).max(), 1)
    np.testing.assert_allclose(back, data, atol=tolerance)


def test_any_leading_axes_and_jit_give_the_same(golden):
    field = fit_field(golden["norm/data"])
    query = golden["norm/query"]
    plain = normalize(query, field)
    for row in range(len(query)):
        np.testing.assert_array_equal(normalize(query[row], field), plain[row])
    traced = jax.jit(normalize)(jnp.asarray(query), field)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, plain, rtol=1e-6, atol=1e-6)


def test_integers_are_normalised_as_floats():
    data = np.arange(10, dtype=np.int64)[:, None]
    assert normalize(data, fit_field(data)).dtype == np.float32


def test_unusable_input_is_explained():
    with pytest.raises(UserError, match="not finite"):
        fit_field(np.array([[1.0], [np.nan]]))
    with pytest.raises(UserError, match="at least two rows"):
        fit_field(np.ones((1, 2)))
    with pytest.raises(ValueError, match="mode must be"):
        fit_field(np.ones((3, 2)), mode="minmax")
    with pytest.raises(ValueError, match="has 2 columns"):
        normalize(np.ones((4, 3)), fit_field(np.ones((3, 2))))
