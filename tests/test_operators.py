"""Operators by name: the alternatives of each family, kept blocks, and a user's own operator."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD
from flax import nnx
from test_grafting import _options, grafted

from uva_jax.graft import assemble, distill, distill_blocks, judge
from uva_jax.graft.assemble import HeadOptions, grafted_config
from uva_jax.graft.capture import head_activations
from uva_jax.models import operators, policy_folder, surgery
from uva_jax.models.architectures import ARCHITECTURES
from uva_jax.models.layers import layer_norm, linear
from uva_jax.models.operators import register
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter

MIXED = ("pooled_cross_attn,windowed_self_attn,swiglu", "keep")


class Shift(nnx.Module):
    """A user's operator: each action step adds a trained multiple of the step before."""

    def __init__(self, config, width, *, dtype=None, rngs):
        self.norm = layer_norm(width, rngs=rngs)
        self.mix = linear(width, width, rngs=rngs, dtype=dtype)
        self.gain = nnx.Param(jnp.zeros(width))

    def __call__(self, h, y):
        before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return self.gain[...] * self.mix(self.norm(before) + y)


@pytest.fixture(scope="module")
def samples(teacher):
    """Tokens, actions and the activations of the teacher's blocks on them."""
    keys = jax.random.split(jax.random.key(3), 4)
    z = jax.random.normal(keys[0], (6, 64, HEAD.z_channels))
    actions = jnp.tanh(jax.random.normal(keys[1], (6, 16, 2)))
    t = jax.random.randint(keys[2], (6,), 0, 1000)
    noise = jax.random.normal(keys[3], actions.shape)
    head = teacher.action_head
    e_c = head.condition(z)
    blocks = head_activations(head, e_c, actions, t, noise)
    return {"z": z, "t": t, "actions": actions, "condition": e_c} | blocks


def distilled(teacher, samples, folder, names):
    """Returns a head after a short Stage 1, its rows of `judge`, and the head before."""
    start = grafted(teacher, operators=names)
    options = _options(epochs=40)
    features = distill.memory_features(start, np.asarray(samples["z"]), batch=6)
    data = {k: samples[k] for k in ("actions", "condition")}
    with MetricsWriter(folder, "distill") as metrics:
        common = dict(options=options, seed=0, folder=folder, metrics=metrics)
        head = distill.distill_condition(start, features, samples["condition"], **common)
        predicted = distill.predict_condition(head, features)
        head = distill_blocks.distill_blocks(head, teacher.action_head, data, predicted, **common)
    rows = judge.judge_condition(head, features, samples["condition"], "l1")
    rows += judge.judge_blocks(
        head, teacher.action_head, data, predicted, options=options, key=jax.random.key(0)
    )
    return head, rows, start


def test_a_mixed_head_is_distilled_and_its_kept_block_stays(teacher, samples, tmp_path):
    head, rows, start = distilled(teacher, samples, tmp_path, MIXED)
    names = {(row["operator"], row["block"]) for row in rows}
    assert names == {("cross_attn", 0), ("self_attn", 0), ("mlp", 0)}
    before, after = surgery.flatten(start), surgery.flatten(head)
    source = surgery.flatten(teacher.action_head)
    kept = [path for path in after if path.startswith("blocks/1/")]
    assert len(kept) == 8
    for path in kept:
        origin = path.replace("blocks/1/mlp/", "net/res_blocks/1/")
        np.testing.assert_array_equal(after[path], source[origin], err_msg=path)
    trained = [path for path in after if path.startswith("blocks/0/")]
    assert all(np.any(before[path] != after[path]) for path in trained)
    row = next(row for row in rows if row["operator"] == "cross_attn")
    assert row["shuffled"] > 1.5 * row["scaled"]


def test_operators_of_unlike_blocks_are_saved_and_loaded(teacher, tmp_path):
    source, target = (grafted(teacher, operators=MIXED, start=s) for s in ("random", "preserve"))
    for family in ("cross_attn", "self_attn", "mlp"):
        assemble.save_operator(tmp_path / family, source, family, {})
        target = assemble.load_operator(tmp_path / family, target, family)
    for path, x in surgery.flatten(source).items():
        np.testing.assert_array_equal(surgery.flatten(target)[path], x, err_msg=path)
    plain = grafted(teacher)
    with pytest.raises(UserError, match="made for another head"):
        assemble.load_operator(tmp_path / "mlp", plain, "mlp")


def test_one_entry_stands_for_all_blocks(teacher):
    head = grafted(teacher, operators=("cross_attn,none,swiglu",))
    assert [type(block.mlp) for block in head.blocks] == [operators.SwiGLU] * 2
    assert not assemble.family_arrays(head, "self_attn")


def test_a_small_head_starts_as_the_teachers_blocks(teacher, samples):
    head = grafted(teacher, size="small", mlp_ratio=0)
    kinds = [type(block.self_attn).__name__ for block in head.blocks]
    assert kinds == ["Nothing", "LightSelfAttention"]
    y = head.time_embed(samples["t"])[:, None] + samples["condition"]
    for i, block in enumerate(head.blocks):
        h, residual = samples["h"][:, i], samples["residual"][:, i]
        added = block.step(h, block.modulations(y, ("self_attn", "mlp"))) - h
        np.testing.assert_allclose(added, residual, atol=1e-5)


def test_the_published_policy_grows_by_at_most_a_fifth():
    policy = surgery.abstract_policy(ARCHITECTURES["pusht"])
    head = grafted_config(policy, HeadOptions())
    graft = surgery.abstract_policy(dataclasses.replace(policy.config, action_head=head))
    before, after = (
        sum(math.prod(x.shape) for x in surgery.shapes(p).values()) for p in (policy, graft)
    )
    assert before < after < 1.2 * before


def test_a_gated_mlp_starts_as_the_teachers_block(teacher, samples):
    head = grafted(teacher, operators=("cross_attn,self_attn,swiglu",))
    y = head.time_embed(samples["t"])[:, None] + samples["condition"]
    for i, block in enumerate(head.blocks):
        h, residual = samples["h"][:, i], samples["residual"][:, i]
        np.testing.assert_allclose(block.mlp(h, y), residual, atol=1e-5)


def _opened(operator, seed=0):
    arrays = surgery.flatten(operator)
    keys = jax.random.split(jax.random.key(seed), len(arrays))
    return surgery.replace(
        operator,
        {p: 0.3 * jax.random.normal(k, x.shape) for k, (p, x) in zip(keys, arrays.items())},  # noqa: B905
    )


def test_windowed_attention_looks_no_further_than_its_window(teacher):
    config = dataclasses.replace(grafted(teacher).config, self_attn_window=2)
    make = operators.make_operator
    windowed = make("self_attn", "windowed_self_attn", config, 32, rngs=nnx.Rngs(0))
    windowed = _opened(windowed)
    h, y = jax.random.normal(jax.random.key(1), (2, 1, 16, 32))
    changed = jnp.any(windowed(h, y) != windowed(h.at[:, 8].add(1.0), y), axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(changed), [6, 7, 8, 9, 10])


def test_pooled_attention_sees_means_of_neighbouring_tokens(teacher):
    config = grafted(teacher).config
    pooled = operators.make_operator(
        "cross_attn", "pooled_cross_attn", config, 32, rngs=nnx.Rngs(0)
    )
    pooled = _opened(pooled)
    assert pooled.key_position[...].shape == (1, 4 * 4 + 16, 32)
    s = jax.random.normal(jax.random.key(1), (1, 16, 32))
    memory = jax.random.normal(jax.random.key(2), (1, 4 * 16 + 16, config.memory_width))
    # Frame 1, rows 0 and 1, columns 2 and 3 are one mean: moving weight within it changes nothing.
    moved = memory.at[:, 16 + 2].add(1.0).at[:, 16 + 7].add(-1.0)
    across = memory.at[:, 16 + 2].add(1.0).at[:, 16 + 8].add(-1.0)
    np.testing.assert_allclose(pooled(s, moved), pooled(s, memory), atol=1e-5)
    assert np.abs(pooled(s, across) - pooled(s, memory)).max() > 1e-3


def test_a_users_own_operator_is_one_class(teacher, samples, tmp_path):
    head, rows, start = distilled(
        teacher, samples, tmp_path, ("cross_attn,test_operators:Shift,mlp",)
    )
    assert {row["block"] for row in rows if row["operator"] == "self_attn"} == {0, 1}
    path = "blocks/0/self_attn/gain"
    assert np.any(surgery.flatten(head)[path] != surgery.flatten(start)[path])
    policy_folder.save_policy(tmp_path / "policy", assemble.assemble(teacher, head), source={})
    loaded = policy_folder.load_policy(tmp_path / "policy").action_head
    for path, x in surgery.flatten(head).items():
        np.testing.assert_array_equal(surgery.flatten(loaded)[path], x, err_msg=path)
    assert isinstance(loaded.blocks[1].self_attn, Shift)


def test_one_line_registers_an_operator(teacher, monkeypatch):
    known = dict(operators._REGISTRY["self_attn"])
    monkeypatch.setitem(operators._REGISTRY, "self_attn", known)
    register("self_attn", "shift", Shift)
    head = grafted(teacher, operators=("cross_attn,shift,mlp",))
    assert isinstance(head.blocks[0].self_attn, Shift)


@pytest.mark.parametrize(
    ("names", "changes", "sentence"),
    [
        (("cross_attn,self_attn,mlp,mlp",), {}, "as 'cross,self,mlp' or 'keep'"),
        (("keep",) * 3, {}, "should name 2 blocks"),
        (("keep",), {}, "no cross-attention in any block"),
        (("keep", MIXED[0]), {"cross_attention": "residual"}, "keeps a block of the teacher"),
        (("cross_attn,convolution,mlp",), {}, "'convolution' is not a self_attn: use one of"),
        (("cross_attn,no.such:Thing,mlp",), {}, "cannot be imported.*PYTHONPATH"),
        (("cross_attn,json:loads,mlp",), {}, "is not a class of flax.nnx.Module"),
    ],
)
def test_operators_that_make_no_head_are_refused_with_a_sentence(teacher, names, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        grafted(teacher, operators=names, **changes)
