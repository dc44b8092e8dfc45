"""Stage 3: a head that gives in few evaluations what diffusion gives in many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import HEAD
from test_grafting import grafted

from uva_jax.graft import assemble, own_samples, shorten
from uva_jax.models import diffusion, surgery
from uva_jax.models.policy_config import steps_of
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections_graft import ShortenOptions
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site

OPTIONS = ShortenOptions(
    evaluations=1,
    sampling_steps="8",
    samples=4,
    epochs=100,
    lr=3e-3,
    batch=8,
    warmup=5,
    log_every=50,
    checkpoint_every=400,
)


def test_evaluations_go_down_by_thirds():
    np.testing.assert_array_equal(diffusion.few_step_times(1), [450])
    np.testing.assert_array_equal(diffusion.few_step_times(4), [450, 150, 50, 16])


def test_a_further_evaluation_takes_the_last_actions_diffused_again():
    noise = jax.random.normal(jax.random.key(0), (3, 2, 4, 2))
    signals = diffusion.make_schedule().alphas_cumprod
    seen = []

    def denoise(x, t):  # eps that implies actions of 0.5
        seen.append((np.asarray(x), t))
        return (x - signals[t] ** 0.5 * 0.5) / (1 - signals[t]) ** 0.5

    found = diffusion.few_step_loop(denoise, noise, temperature=0.9)
    np.testing.assert_allclose(found, np.full((2, 4, 2), 0.5), atol=1e-6)
    assert [t for _, t in seen] == [450, 150]
    np.testing.assert_allclose(seen[0][0], (1 - signals[450]) ** 0.5 * noise[0], rtol=1e-5)
    again = signals[150] ** 0.5 * 0.5 + (1 - signals[150]) ** 0.5 * 0.9 * noise[1]
    np.testing.assert_allclose(seen[1][0], again, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def policy(teacher, windows):
    """A graft that was trained a little, so that its samples are not those of random weights."""
    policy = assemble.assemble(teacher, grafted(teacher))
    head, z = policy.action_head, jnp.asarray(windows["z"])
    actions, optimizer = jnp.asarray(windows["actions"]), optax.adam(3e-3)

    def step(state, number):
        params, moments = state

        def loss(params):
            head = surgery.replace(policy.action_head, params)
            return head.loss(actions, z, key=jax.random.key(number), draws=4)["mse"].mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    params = surgery.flatten(head)
    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(300))[0])
    params, _ = run((params, optimizer.init(params)))
    return assemble.assemble(policy, surgery.replace(head, params))


@pytest.fixture(scope="module")
def windows():
    keys = jax.random.split(jax.random.key(5), 2)
    z = np.asarray(jax.random.normal(keys[0], (16, 64, HEAD.z_channels)))
    actions = np.asarray(jnp.tanh(jax.random.normal(keys[1], (16, 16, 2))))
    return {"z": z, "actions": actions}


def shortened(policy, windows, folder, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    folder.mkdir(exist_ok=True)
    with MetricsWriter(folder, "shorten") as metrics:
        return shorten.shorten_head(
            policy, windows, windows, options, seed=0, site=Site(folder, metrics)
        )


@pytest.mark.parametrize("evaluations", [1, 2])
def test_it_learns_the_distribution_of_the_samples(policy, windows, tmp_path, evaluations):
    how = dict(evaluations=evaluations)
    _, before = shortened(policy, windows, tmp_path / "start", **how, epochs=1)
    short, after = shortened(policy, windows, tmp_path / "end", **how)
    config = short.action_head.config
    assert config.prediction == "x0_from_eps" and config.sampling_steps == str(evaluations)
    assert after["energy_distance"] < 0.3 * before["energy_distance"]
    assert after["graft_spread"] == before["graft_spread"]
    assert 0.4 < after["shortened_spread"] / after["graft_spread"] < 2.0


def test_rounded_factors_change_a_fit_in_its_last_digits(policy, windows, tmp_path):
    exact, _ = shortened(policy, windows, tmp_path / "exact", epochs=2)
    rounded, _ = shortened(policy, windows, tmp_path / "b", epochs=2, matmul_precision="bfloat16")
    path = "action_head/final_layer/linear/kernel"
    found, other, before = (surgery.flatten(p)[path] for p in (rounded, exact, policy))
    assert 0 < np.abs(found - other).max() < np.abs(other - before).max()


def test_what_comes_before_the_diffusion_stays(policy, windows, tmp_path):
    short, _ = shortened(policy, windows, tmp_path, epochs=2)
    before, after = surgery.flatten(policy), surgery.flatten(short)
    assert before.keys() == after.keys()
    changed = {path for path in before if np.any(before[path] != after[path])}
    assert changed and all(
        path.startswith("action_head/")
        and not path.startswith(("action_head/memory", "action_head/queries"))
        and "cross_attn" not in path
        for path in changed
    )


def test_an_interrupted_training_goes_on_to_the_same_parameters(
    policy, windows, tmp_path, monkeypatch
):
    from uva_jax.train import fit

    how = dict(epochs=6, checkpoint_every=4, log_every=2)
    whole, _ = shortened(policy, windows, tmp_path / "whole", **how)
    saved = fit.Checkpoints.save

    def save_and_die(self, step, state):
        saved(self, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit.Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        shortened(policy, windows, tmp_path / "cut", **how)
    monkeypatch.setattr(fit.Checkpoints, "save", saved)
    resumed, _ = shortened(policy, windows, tmp_path / "cut", **how)
    for path, x in surgery.flatten(whole).items():
        np.testing.assert_array_equal(x, surgery.flatten(resumed)[path], err_msg=path)


def test_samples_are_drawn_once_and_by_chunks(policy, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(own_samples, "_CHUNK", 6)
    how = dict(samples=3, sampling_steps="4", seed=2)

    def draw(folder):
        with MetricsWriter(tmp_path, "shorten") as metrics:
            return own_samples.draw_samples(Site(folder, metrics), policy, windows["z"], **how)

    whole, written = draw(tmp_path / "whole"), []
    write = SampleStore.write_chunk

    def write_and_count(self, index, values):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(index)
        return write(self, index, values)

    monkeypatch.setattr(SampleStore, "write_chunk", write_and_count)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "cut")
    written.clear()
    resumed = draw(tmp_path / "cut")
    assert written == [2]  # of three chunks, the last with 4 of 16 windows
    assert resumed["samples"].shape == (16, 3, 16, 2)
    for name, x in whole.items():
        np.testing.assert_array_equal(x, resumed[name], err_msg=name)
    written.clear()
    draw(tmp_path / "cut")
    assert written == []
    # A window's noise does not depend on the others.
    monkeypatch.setattr(own_samples, "_CHUNK", 16)
    np.testing.assert_allclose(draw(tmp_path / "one")["samples"], whole["samples"], atol=1e-5)
    head = policy.action_head
    np.testing.assert_allclose(
        whole["condition"].astype(np.float32), head.condition(windows["z"]), atol=0.02, rtol=0.01
    )
    how["seed"] = 3
    with pytest.raises(UserError, match="seed"):
        draw(tmp_path / "cut")


def test_a_shortened_head_keeps_its_own_number_of_evaluations(policy, windows, tmp_path):
    short, _ = shortened(policy, windows, tmp_path, epochs=2)
    assert steps_of(short.config.action_head, "10") == "1"
    assert steps_of(policy.config.action_head, "10") == "10"
    with pytest.raises(ValueError, match="neither eta"):
        short.action_head.sample(windows["z"], key=jax.random.key(0), eta=0.5)
