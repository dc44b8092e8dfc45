"""Training that diverges stops with a sentence, and nothing that is not finite is written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_policy

from convert.to_torch import export_policy
from uva_jax.models import policy_folder, surgery
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections_graft import DistillOptions, FinetuneOptions
from uva_jax.storage.checkpoint import Checkpoints
from uva_jax.storage.finite import is_finite
from uva_jax.train import loop
from uva_jax.train.fit import fit

OPTIONS = dataclasses.replace(
    FinetuneOptions(), steps=12, batch=4, warmup=1, checkpoint_every=4, log_every=2
)


def squared_error(params, frozen, batch, key, step):
    loss = jnp.mean((batch["x"] @ params["w"] - 1.0) ** 2)
    return loss, {"loss": loss, "absent": jnp.nan}


def run(folder, values, **changes):
    """Trains on batches of ones, except those of `values` (step -> value)."""
    options = dataclasses.replace(OPTIONS, **changes)
    folder.mkdir(exist_ok=True)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    state = loop.start_state({"w": jnp.full((3, 1), 0.1)}, options, mesh)

    def batches(step):
        return {"x": np.full((4, 3), values.get(step, 1.0), np.float32)}

    with MetricsWriter(folder, "finetune") as metrics:
        return loop.run_loop(
            squared_error,
            state,
            {},
            batches,
            options=options,
            mesh=mesh,
            seed=0,
            folder=folder / "states",
            metrics=metrics,
            desc="head",
        )


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_loop_at_its_step(tmp_path, steps_per_call):
    with pytest.raises(UserError, match="head stops: the loss of step 6 is not finite") as error:
        run(tmp_path, {6: np.nan}, steps_per_call=steps_per_call)
    assert "lower config.finetune.lr" in str(error.value)
    with Checkpoints(tmp_path / "states") as checkpoints:
        assert checkpoints.latest_step() == 4


def test_mended_data_let_the_run_go_on_from_the_last_good_state(tmp_path):
    with pytest.raises(UserError, match="step 6"):
        run(tmp_path / "killed", {6: np.inf})
    resumed = run(tmp_path / "killed", {})
    whole = run(tmp_path / "whole", {})
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])


def train(folder, loss, options=OPTIONS, start=1.0):
    """Trains three parameters on a loss of (w, step)."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    state = loop.start_state({"w": jnp.full(3, start)}, options, mesh)

    def with_scalars(params, frozen, batch, key, step):
        value = loss(params["w"], step)
        return value, {"loss": value}

    with MetricsWriter(folder, "vae") as metrics:
        loop.run_loop(
            with_scalars,
            state,
            {},
            lambda step: {"x": np.ones((4, 1), np.float32)},
            options=options,
            mesh=mesh,
            seed=0,
            folder=folder / "states",
            metrics=metrics,
        )


@pytest.mark.parametrize("steps_per_call, step", [(1, 5), (4, 5), (1, 3)])
@pytest.mark.parametrize("root", [0.5, 0.49])  # of 0: its slope times 0 is NaN; is infinite
def test_a_gradient_that_is_not_finite_stops_the_loop_at_its_step(
    tmp_path, root, steps_per_call, step
):
    def loss(w, at):
        bad = jnp.abs(jnp.where(at == step, 0.0, 1.0) * w) ** root
        return jnp.where(at <= step, bad, 1.0).sum()  # finite everywhere, the later ones too

    options = dataclasses.replace(OPTIONS, steps_per_call=steps_per_call)
    with pytest.raises(UserError, match=f"the gradient's norm of step {step} is not finite"):
        train(tmp_path, loss, options)
    kept = [int(p.name) for p in (tmp_path / "states").glob("[0-9]*")]
    assert kept == ([4] if step > 4 else [])


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    # Loss and gradient of the steps before the save are finite, the sum of the updates is not.
    options = dataclasses.replace(OPTIONS, lr=1.25e38, weight_decay=0.0)
    with pytest.raises(UserError, match="after 4 steps w is not finite"):
        train(tmp_path, lambda w, step: -(1e-6 * w).sum(), options)
    assert not list((tmp_path / "states").glob("[0-9]*"))


def test_distillation_stops_at_the_step_whose_loss_is_not_finite(tmp_path):
    data = {"x": jnp.ones((40, 3)).at[17].set(jnp.nan)}
    options = dataclasses.replace(DistillOptions(), batch=4, log_every=5, checkpoint_every=5)

    def loss(params, batch, key):
        value = jnp.mean((batch["x"] @ params["w"]) ** 2)
        return value, {"loss": value}

    with (
        MetricsWriter(tmp_path, "distill") as metrics,
        pytest.raises(
            UserError,
            match=r"cross_attn stops: the loss of step \d is not finite.*config.distill.lr",
        ),
    ):
        fit(
            loss,
            {"w": jnp.ones(3)},
            data,
            epochs=1,
            lr=1e-3,
            options=options,
            seed=0,
            folder=tmp_path / "states",
            metrics=metrics,
            name="cross_attn",
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_is_found(bad):
    values = np.ones((5, 4), np.float32)
    assert is_finite(values) and is_finite(jnp.asarray(values, jnp.bfloat16))
    values[3, 2] = bad
    assert not is_finite(values) and not is_finite(jnp.asarray(values, jnp.bfloat16))
    assert is_finite(np.full(8, 3e38, np.float32))  # whose sum is finite in double precision


def test_a_policy_that_is_not_finite_is_neither_saved_nor_exported(tmp_path):
    policy = make_policy()
    arrays = surgery.flatten(policy)
    name = "action_head/net/input_proj/kernel"
    arrays[name] = arrays[name].at[0, 0].set(jnp.nan)
    broken = surgery.replace(policy, arrays)
    with pytest.raises(UserError, match=f"not finite, in {name}"):
        policy_folder.save_policy(tmp_path / "policy", broken, source={})
    with pytest.raises(UserError, match="not finite"):
        export_policy(broken, tmp_path / "policy.ckpt")
    assert not list(tmp_path.iterdir())
