"""Learning rates, AdamW and moving averages against recorded runs; clipping, accumulation."""

from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uva_jax.runtime.errors import UserError
from uva_jax.train.optim import (
    OptimOptions,
    carry_optimizer_state,
    decay_mask,
    ema_decay,
    ema_update,
    make_optimizer,
    warmup_cosine,
)

GOLDEN = np.load(Path(__file__).parent / "goldens" / "optim_slim.npz")
PLAIN = {"lr": 0.1, "warmup_steps": 0, "total_steps": 100, "clip_norm": None}


def golden_tree(prefix):
    return {name: jnp.asarray(GOLDEN[prefix + name]) for name in ("weight", "bias", "pos_embed")}


def run(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# ---- the optimizer ----


def test_muon_moves_the_matrices_of_blocks_by_orthogonal_steps_of_adamws_size():
    rng = np.random.default_rng(0)
    params = {
        "mar/encoder_blocks/0/mlp/fc1/kernel": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32),
        "mar/encoder_blocks/0/mlp/fc1/bias": jnp.zeros(64),
        "mar/z_proj/kernel": jnp.asarray(rng.normal(size=(16, 32)), jnp.float32),
    }
    gradient = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in params.items()}
    options = PLAIN | {"weight_decay": 0.0}
    moved = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(OptimOptions(**options, optimizer=name))
        moved[name], _ = optimizer.update(gradient, optimizer.init(params), params)
    matrix, *rest = params
    step = np.asarray(moved["muon"][matrix]) / PLAIN["lr"]
    assert np.sqrt(np.mean(step**2)) == pytest.approx(0.2, rel=0.2)
    singular = np.linalg.svd(step, compute_uv=False)
    assert singular.max() < 2 * singular.min()  # Newton-Schulz, five steps
    for name in rest:
        np.testing.assert_allclose(moved["muon"][name], moved["adamw"][name], rtol=1e-6)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="'adam',"):
        OptimOptions(**PLAIN, optimizer="adam")


@pytest.mark.parametrize(
    ("name", "warmup", "total", "stride"),
    [
        ("cosine_warm5_total23", 5, 23, 1),
        ("cosine_warm1000_total5000_every7", 1000, 5000, 7),
    ],
)
def test_the_learning_rate_is_that_of_diffusers_also_beyond_the_end(name, warmup, total, stride):
    wanted = GOLDEN[f"f64/lr/{name}"]
    found = warmup_cosine(1e-4, warmup, total)(np.arange(len(wanted)) * stride)
    assert found[0] == 0
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-17)


def test_six_adamw_steps_equal_torchs():
    options = OptimOptions(1e-2, warmup_steps=2, total_steps=8, clip_norm=None)
    optimizer, params = make_optimizer(options), golden_tree("adamw/step0/")
    state = optimizer.init(params)
    for i in range(1, 7):
        updates, state = optimizer.update(golden_tree(f"adamw/step{i}/grad_"), state, params)
        params = optax.apply_updates(params, updates)
        for name, value in golden_tree(f"adamw/step{i}/").items():
            np.testing.assert_allclose(params[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_placeholders_and_positions_decay_but_biases_and_norms_do_not():
    tree = {"fake_latent_x": np.zeros((1, 8)), "norm": {"scale": np.zeros(8)}}
    tree["linear"] = {"kernel": np.zeros((8, 8)), "bias": np.zeros(8)}
    wanted = {"fake_latent_x": True, "norm": {"scale": False}}
    wanted["linear"] = {"kernel": True, "bias": False}
    assert decay_mask(tree) == wanted
    stacked = jax.tree.map(lambda x: np.stack([x, x]), tree)
    assert decay_mask(stacked, stacked_axes=1) == wanted


def test_the_gradient_is_clipped_by_the_norm_of_the_whole_tree():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])}  # norm 10
    clipped = make_optimizer(OptimOptions(**{**PLAIN, "clip_norm": 1.0}))
    _, state = clipped.update(gradient, clipped.init(params), params)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moments["a"], [0.06, 0.0], rtol=1e-6)
    np.testing.assert_allclose(moments["b"], [0.08], rtol=1e-6)


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(UserError, match="warmup_steps is 1000 and total_steps 200"):
        OptimOptions(1e-4, 1000, 200)


def test_a_state_carried_over_keeps_what_trained_and_starts_the_rest_at_zero():
    optimizer = make_optimizer(OptimOptions(**PLAIN))
    head = {"head": {"kernel": jnp.ones((2, 2))}}
    params, old = run(optimizer, head, [jax.tree.map(jnp.ones_like, head)] * 3)
    both = {**params, "decoder": {"kernel": jnp.ones((3, 3))}}
    new = carry_optimizer_state(old, optimizer.init(both))
    assert jax.tree.structure(new) == jax.tree.structure(optimizer.init(both))
    kept, now = optax.tree.get(old, "mu"), optax.tree.get(new, "mu")
    np.testing.assert_array_equal(now["head"]["kernel"], kept["head"]["kernel"])
    assert (now["head"]["kernel"] != 0).all() and not now["decoder"]["kernel"].any()
    assert [leaf.item() for leaf in jax.tree.leaves(new) if leaf.ndim == 0].count(3) >= 1
    zeros = jax.tree.map(jnp.zeros_like, both)
    moved, _ = optimizer.update(zeros, new, both)
    alone, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), old, params)
    np.testing.assert_array_equal(moved["head"]["kernel"], alone["head"]["kernel"])


def test_a_state_of_another_model_is_not_carried_over():
    with pytest.raises(ValueError, match=r"head had shape \(2,\) before and now has \(3,\)"):
        carry_optimizer_state({"head": jnp.zeros(2)}, {"head": jnp.zeros(3)})


# ---- the moving average ----


@pytest.mark.parametrize(
    ("power", "after", "name"), [(0.75, 0, "0.7500"), (2 / 3, 0, "0.6667"), (0.75, 10, "0.7500")]
)
def test_the_decay_of_the_average_is_upstreams(power, after, name):
    key = f"ema/decay_power{name}_after{after}"
    for steps, wanted in ((np.arange(40), f"{key}_first40"), (np.array([2000]), f"{key}_last")):
        found = ema_decay(steps, power=power, update_after_step=after)
        np.testing.assert_allclose(found, GOLDEN[wanted], rtol=1e-6)


def test_the_average_never_keeps_more_than_its_maximum():
    assert ema_decay(10**7) == pytest.approx(0.9999)


def test_the_average_follows_the_recorded_run():
    params = jnp.asarray(GOLDEN["ema/step0/model/0.weight"])
    average = jnp.asarray(GOLDEN["ema/step0/ema/0.weight"])
    update = jax.jit(ema_update)
    for i in range(1, 6):
        params = params + 0.1 * i
        average = update(average, params, i - 1)
        np.testing.assert_allclose(average, GOLDEN[f"ema/step{i}/ema/0.weight"], rtol=1e-6)
