"""Freezing, phases and patterns: exactly the intended parameters train; errors name mistakes."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uva_jax.models.losses import latent_loss
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import (
    TASK_MODES,
    MARConfig,
    MLPHeadConfig,
    PolicyConfig,
    TextTowerConfig,
    VAEConfig,
)
from uva_jax.runtime.errors import UserError
from uva_jax.train.optim import OptimOptions, make_optimizer
from uva_jax.train.trainable import (
    combine,
    matching,
    partition,
    phase_at,
    training_phases,
    tree_paths,
)

PLAIN = OptimOptions(lr=0.1, warmup_steps=0, total_steps=100)

PATHS = ("mar/decoder_norm/scale", "mar/decoder_norm/bias", "mar/z_proj/kernel", "vae/conv/kernel")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("mar", PATHS[:3]),
        ("mar/decoder_norm", PATHS[:2]),
        ("mar/*/kernel", PATHS[2:3]),
        ("mar/decoder_*", PATHS[:2]),
        ("*/kernel", PATHS[2:]),
        ("vae/conv/kernel", PATHS[3:]),
    ],
)
def test_a_pattern_matches_paths_and_all_below_them(pattern, found):
    assert matching(PATHS, [pattern]) == set(found)


@pytest.mark.parametrize("pattern", ["mar/decoder", "mar/decoder_nrm", "ar", "head/*"])
def test_a_pattern_that_matches_nothing_is_named(pattern):
    with pytest.raises(UserError, match=f"'{pattern.replace('*', '.')}' matches no parameter"):
        matching(PATHS, ["mar", pattern])


def module():
    rngs = nnx.Rngs(0)
    return nnx.Dict(
        body=nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)]),
        head=nnx.Linear(2, 1, rngs=rngs),
    )


@pytest.mark.parametrize("kind", ["state", "nested", "flat"])
def test_trees_of_every_kind_come_apart_and_together_again(kind):
    state = nnx.state(module())
    flat = {"/".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(state)}
    tree = {"state": state, "nested": nnx.to_pure_dict(state), "flat": flat}[kind]
    head, body = partition(tree, ["head"])
    assert set(tree_paths(head)) == {"head/bias", "head/kernel"}
    assert set(tree_paths(head) + tree_paths(body)) == set(flat)
    whole = combine(head, body)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, whole, tree)


def test_frozen_leaves_stay_bit_identical_without_gradient_or_optimizer_state():
    graph, state = nnx.split(module())
    trainable, frozen = partition(state, ["head"])
    optimizer = make_optimizer(PLAIN)
    opt_state = optimizer.init(trainable)
    assert not [path for path in tree_paths(opt_state) if "body" in path]

    @jax.jit
    def step(trainable, frozen, opt_state):
        def loss(trainable):
            parts = nnx.merge(graph, trainable, frozen)
            return jnp.mean(parts.head(parts.body[1](parts.body[0](jnp.ones((3, 2))))) ** 2)

        gradient = jax.grad(loss)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    moved = trainable
    for _ in range(3):
        moved, opt_state = step(moved, frozen, opt_state)
    whole = combine(moved, frozen)
    jax.tree.map(np.testing.assert_array_equal, whole.body, state.body)
    assert (whole["head"]["kernel"][...] != state["head"]["kernel"][...]).all()


# ---- phases ----


def policy_config():
    """A policy with every input and head at the smallest size."""
    width, grid = 32, (4, 4)
    head = {"z_channels": width, "width": 8, "depth": 1, "n_actions": 4, "n_frames": 2}
    mar_config = MARConfig(
        encoder_embed_dim=width,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=width,
        decoder_depth=1,
        decoder_num_heads=2,
        n_frames=2,
        grid=grid,
        token_dim=4,
        n_actions=4,
        history_action=True,
        proprio_dim=3,
        proprio_steps=4,
        proprio_image=True,
        wrist=True,
        text_dim=5,
        text_tokens=2,
        label_drop_prob=0.5,
    )
    video = MLPHeadConfig(channels=4, grid=grid, **head)
    action = MLPHeadConfig(channels=2, grid=grid, aggregator="conv_fc", **head)
    return PolicyConfig(
        image_size=8,
        vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_levels=(), z_channels=4),
        mar=mar_config,
        video_head=video,
        wrist_head=video,
        action_head=action,
        proprio_head=MLPHeadConfig(channels=3, grid=grid, aggregator="conv_fc", **head),
        normalizer_fields=(("action", 2),),
        text_tower=TextTowerConfig(8, 8, 1, 2, 4, 5, 8),
    )


def reached_by_the_loss(mode):
    """Returns the paths of the parameters on which the traced loss of a mode depends."""

    def some(*shape):
        return np.zeros(shape, np.float32)

    policy = nnx.eval_shape(lambda: Policy(policy_config(), rngs=nnx.Rngs(0)))
    graph, params = nnx.split(policy)
    streams = {
        "text_latents": some(2, 5),
        "history_nactions": some(2, 4, 2),
        "proprio": some(2, 4, 3),
        "proprio_tokens": some(2, 2, 16, 4),
    }

    def loss(params):
        return latent_loss(
            nnx.merge(graph, params),
            some(2, 2, 4, 4, 4),
            some(2, 2, 4, 4, 4),
            some(2, 4, 2),
            task_mode=mode,
            key=jax.random.key(0),
            streams=streams,
            wrist_target=some(2, 2, 4, 4, 4),
            proprio_target=some(2, 4, 3),
        )[0]

    program = jax.make_jaxpr(loss)(params).jaxpr
    needed = set(program.outvars)
    for equation in reversed(program.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed.update(v for v in equation.invars if isinstance(v, jax.extend.core.Var))
    leaves = zip(tree_paths(params), program.invars, strict=True)
    return {path for path, variable in leaves if variable in needed}


@pytest.fixture(scope="module")
def policy_paths():
    return tree_paths(nnx.state(nnx.eval_shape(lambda: Policy(policy_config(), rngs=nnx.Rngs(0)))))


@pytest.mark.parametrize("mode", TASK_MODES)
def test_exactly_what_the_loss_reaches_trains(policy_paths, mode):
    (phase,) = training_phases(policy_paths, task_modes=[mode])
    assert set(phase.trainable) == reached_by_the_loss(mode)


def test_several_modes_train_what_any_of_them_reaches(policy_paths):
    (phase,) = training_phases(policy_paths, task_modes=["policy_model", "video_model"])
    wanted = reached_by_the_loss("policy_model") | reached_by_the_loss("video_model")
    assert set(phase.trainable) == wanted


def test_the_encoder_is_everything_before_the_decoder(policy_paths):
    (phase,) = training_phases(policy_paths, task_modes=TASK_MODES, freeze_encoder=True)
    kept = {"/".join(path.split("/")[:2]) for path in phase.trainable if path.startswith("mar/")}
    decoder = ("embed", "blocks", "norm", "temporal_pos_embed", "spatial_pos_embed")
    wanted = {f"mar/decoder_{name}" for name in (*decoder, "text_pos_embed")}
    assert kept == wanted | {"mar/diffusion_temporal_embed", "mar/diffusion_spatial_embed"}
    heads = {path.split("/")[0] for path in phase.trainable} - {"mar"}
    assert heads == {"video_head", "wrist_head", "action_head", "proprio_head"}


def test_the_head_trains_first_and_more_follows(policy_paths):
    phases = training_phases(
        policy_paths,
        task_modes=["policy_model"],
        freeze_encoder=True,
        freeze=["mar", "proprio_head"],
        unfreeze_at={10: ["mar/decoder_*", "mar/diffusion_*"], "5": ["mar/decoder_norm"]},
    )
    assert [phase.start for phase in phases] == [0, 5, 10]
    tops = [{path.split("/")[0] for path in phase.trainable} for phase in phases]
    assert tops == [{"action_head"}, {"action_head", "mar"}, {"action_head", "mar"}]
    assert set(phases[1].trainable) - set(phases[0].trainable) == {
        "mar/decoder_norm/bias",
        "mar/decoder_norm/scale",
    }
    assert not [path for path in phases[2].trainable if path.startswith("mar/encoder")]
    assert [phase_at(phases, step).start for step in (0, 4, 5, 9, 10, 99)] == [0, 0, 5, 5, 10, 10]


def test_releasing_at_step_0_makes_exceptions_to_freezing(policy_paths):
    (phase,) = training_phases(
        policy_paths,
        task_modes=["policy_model"],
        freeze=["*"],
        unfreeze_at={0: ["*/z_proj_cond/bias"]},
    )
    assert phase.trainable == ("mar/z_proj_cond/bias",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["mar/decoder"]}, "'mar/decoder' matches no parameter"),
        ({"unfreeze_at": {7: ["mar/nothing"]}}, "'mar/nothing' matches no parameter"),
        ({"unfreeze_at": {7: ["vae"]}}, r"unfreeze_at\[7\] names 'vae', which .* does not reach"),
        ({"unfreeze_at": {7: ["text_model"]}}, "names 'text_model', which .* does not reach"),
        ({"unfreeze_at": {7: ["video_head"]}}, "names 'video_head'"),
        ({"unfreeze_at": {-1: ["mar"]}}, "step -1"),
        ({"freeze": ["*"]}, "no parameter that trains at step 0"),
    ],
)
def test_impossible_phases_are_explained(policy_paths, options, message):
    with pytest.raises(UserError, match=message):
        training_phases(policy_paths, task_modes=["policy_model"], **options)
