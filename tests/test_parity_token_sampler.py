"""The token sampler: the tokens of each round, and guidance, for which upstream crashes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import MARConfig, MLPHeadConfig, PolicyConfig, VAEConfig
from uva_jax.models.token_sampler import masked_counts, sample_tokens
from uva_jax.runtime.errors import UserError

KEY = jax.random.key(3)
HEAD = {"z_channels": 32, "width": 32, "depth": 1, "grid": (4, 4), "sampling_steps": "3"}
CONFIG = PolicyConfig(
    image_size=4,
    vae=VAEConfig(ch=32, ch_mult=(1,), num_res_blocks=1, attn_levels=(), z_channels=4),
    mar=MARConfig(
        encoder_embed_dim=32,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
        grid=(4, 4),
        token_dim=4,
    ),
    video_head=MLPHeadConfig(channels=4, clip=False, **HEAD),
    action_head=MLPHeadConfig(channels=2, aggregator="conv_fc", **HEAD),
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return _random_policy(CONFIG)


def _random_policy(config):
    """Returns a policy with all parameters random, as zero gates would hide earlier layers."""
    policy, random = surgery.abstract_policy(config), np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype)
        for path, leaf in surgery.shapes(policy).items()
    }
    return surgery.replace(policy, arrays)


def run(policy, *, noises=None, target=None, nactions=None, key=KEY, streams=None, **settings):
    cond = jax.random.normal(jax.random.key(2), policy.latent_shape(2))
    settings = {"task_mode": "full_dynamic_model"} | settings
    arrays = {"noises": noises, "target": target, "nactions": nactions, "key": key}

    def sample(policy, cond, arrays, streams):
        return sample_tokens(policy, cond, **arrays, streams=streams, **settings)

    return jax.jit(sample)(policy, cond, arrays, streams)


def test_rounds_follow_the_cosine_and_the_last_one_fills_everything():
    assert masked_counts(256, 4) == [256, 236, 181, 97, 0]
    assert masked_counts(256, 1) == [256, 0]
    assert masked_counts(4, 4) == [4, 3, 2, 1, 0]


def test_more_rounds_than_tokens_are_refused():
    with pytest.raises(UserError, match="num_iter is 5; it can be 1 to 4"):
        masked_counts(4, 5)


def test_every_round_draws_for_the_tokens_it_fills(policy):
    counts = masked_counts(16, 3)
    noises = []
    for masked, left in zip(counts[:-1], counts[1:], strict=True):
        noises.append(jnp.zeros((4, 2, 16, 2)))
        noises.append(jnp.zeros((4, 2, 4 * (masked - left), 4)))
    result = run(policy, num_iter=3, noises=noises)
    assert result["actions"].shape == (2, 16, 2)
    assert result["latents"].shape == (2, 4, 4, 4, 4)
    assert np.isfinite(result["latents"]).all()


@pytest.mark.parametrize("mode", ["policy_model", "inverse_model"])
def test_modes_without_video_give_actions_alone(policy, mode):
    target = jax.random.normal(jax.random.key(4), policy.latent_shape(2))
    assert set(run(policy, task_mode=mode, target=target)) == {"actions"}


def test_dynamic_model_depends_on_the_actions_it_is_given(policy):
    still, moving = (
        run(policy, task_mode="dynamic_model", nactions=jnp.full((2, 16, 2), value))["latents"]
        for value in (0.0, 1.0)
    )
    assert np.abs(still - moving).max() > 1e-3


def test_guidance_changes_the_video_and_not_the_actions(policy):
    plain, guided = (run(policy, cfg=cfg) for cfg in (1.0, 3.0))
    np.testing.assert_allclose(plain["actions"], guided["actions"], atol=1e-5)
    assert np.abs(plain["latents"] - guided["latents"]).max() > 1e-3
    assert np.isfinite(guided["latents"]).all()


def test_the_unconditional_pass_sees_no_history():
    policy = _random_policy(CONFIG)
    histories = jax.random.normal(jax.random.key(5), (2, 1, 4, 16, 4))
    one, other = (_unconditional(policy, history) for history in histories)
    np.testing.assert_array_equal(one, other)


def test_the_unconditional_pass_of_a_language_policy_sees_no_text():
    mar = dataclasses.replace(CONFIG.mar, text_dim=8, text_tokens=4)
    policy = _random_policy(dataclasses.replace(CONFIG, mar=mar))
    history, texts = jnp.ones((1, 4, 16, 4)), jax.random.normal(KEY, (2, 1, 8))
    one, other = (_unconditional(policy, history, text_latents=text) for text in texts)
    np.testing.assert_array_equal(one, other)


def _unconditional(policy, history, **streams):
    return policy.mar.embed(
        jnp.zeros_like(history),
        jnp.ones(history.shape[:3]),
        history,
        task_mode="video_model",
        drop_condition=True,
        **streams,
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task_mode": "inverse_model"}, "inverse_model infers actions from the future video"),
        ({"task_mode": "dynamic_model"}, "dynamic_model predicts video from actions"),
        ({"cfg": 2.0, "cfg_schedule": "cosine"}, "cfg_schedule is 'cosine'"),
        ({"key": None}, "sampling needs a key"),
    ],
)
def test_missing_inputs_and_unknown_settings_are_named(policy, options, sentence):
    with pytest.raises(UserError, match=sentence):
        run(policy, **options)
