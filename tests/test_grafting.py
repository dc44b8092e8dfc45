"""The graft: initial copies, the two forms of the head, capture on a mesh, operators."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEAD, make_policy, python

from configs import common
from uva_jax.data import source
from uva_jax.data.augment import mirror_pusht
from uva_jax.data.windows import Strips, plan_strips
from uva_jax.graft import assemble, distill, judge
from uva_jax.graft.capture import capture_strips, head_activations
from uva_jax.models import diffusion, diffusion_head, surgery
from uva_jax.models.operators import aligned_positions, memory_tokens
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.settings import section
from uva_jax.train import fit

OPTIONS = assemble.HeadOptions(
    cross_attention="condition",
    memory="video+aggregate",
    adapter="conv",
    size="large",
    num_heads=2,
    self_attn_heads=4,
    cross_mlp_ratio=2,
    mlp_ratio=4,
    depth=0,
    start="preserve",
    operators=(),
    init_paths={},
)


def grafted(teacher, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    config = assemble.grafted_config(teacher, options)
    return assemble.start_head(teacher.action_head, config, options.start, seed=0)


@pytest.fixture(scope="module")
def activations(teacher):
    """Windows of noise, and the activations of the teacher's blocks on them."""
    keys = jax.random.split(jax.random.key(3), 4)
    z = jax.random.normal(keys[0], (6, 64, HEAD.z_channels))
    actions = jnp.tanh(jax.random.normal(keys[1], (6, 16, 2)))
    t = jax.random.randint(keys[2], (6,), 0, 1000)
    noise = jax.random.normal(keys[3], actions.shape)
    e_c = teacher.action_head.condition(z)
    return {"z": z, "t": t, "condition": e_c, "actions": actions} | head_activations(
        teacher.action_head, e_c, actions, t, noise
    )


def test_mlp_operators_start_as_the_teachers_blocks(teacher, activations):
    head = grafted(teacher)
    y = head.time_embed(activations["t"])[:, None] + activations["condition"]
    for i, block in enumerate(head.blocks):
        h, residual = activations["h"][:, i], activations["residual"][:, i]
        np.testing.assert_allclose(block.mlp(h, y), residual, atol=1e-5)
        np.testing.assert_array_equal(block.self_attn(h, y), 0.0)


def test_given_the_true_condition_a_preserved_head_denoises_as_the_teacher(teacher, activations):
    head = grafted(teacher)
    x, t, e_c = activations["actions"], activations["t"], activations["condition"]
    np.testing.assert_allclose(
        head.denoise(x, t, e_c), teacher.action_head.denoise(x, t, e_c), atol=1e-5
    )


def test_a_random_start_does_not_copy_the_blocks(teacher, activations):
    head = grafted(teacher, start="random")
    y = head.time_embed(activations["t"])[:, None] + activations["condition"]
    residual = head.blocks[0].mlp(activations["h"][:, 0], y)
    assert np.abs(residual - activations["residual"][:, 0]).max() > 1e-3


def test_half_the_heads_start_at_their_own_steps_aggregate_token(teacher):
    config = grafted(teacher).config
    query, key = aligned_positions(config, config.width, __import__("flax").nnx.Rngs(0))
    video, _ = memory_tokens(config)
    d = config.width // config.num_heads
    logits = query[0, :, :d] @ key[0, :, :d].T / d**0.5
    np.testing.assert_array_equal(np.argmax(logits, axis=1), video + np.arange(16))
    assert float(logits[3, video + 3]) == pytest.approx(6.0, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "memory", "adapter"),
    itertools.product(("condition", "residual"), ("video", "video+aggregate"), ("conv", "linear")),
)
def test_every_form_of_the_head_samples_and_learns(teacher, activations, form, memory, adapter):
    head = grafted(teacher, cross_attention=form, memory=memory, adapter=adapter)
    z = activations["z"]
    noise = jax.random.normal(jax.random.key(0), (5, 6, 16, 2))
    first = head.sample(z, noise=noise, sampling_steps="4")
    np.testing.assert_array_equal(first, head.sample(z, noise=noise, sampling_steps="4"))
    assert first.shape == (6, 16, 2) and np.isfinite(first).all()

    arrays = surgery.flatten(head)

    def loss(arrays):
        model = surgery.replace(head, arrays)
        return model.loss(activations["actions"], z, key=jax.random.key(1))["loss"].mean()

    grads = jax.grad(loss)(arrays)
    still = [k for k, g in grads.items() if not np.any(g)]
    # With gates at zero nothing changes at first; only the condition form has a stream.
    silent = ("self_attn", "adaLN", "condition_s") + (("queries",) if form == "residual" else ())
    assert not [k for k in still if not any(name in k for name in silent)]


@pytest.mark.parametrize("form", ["mlp", "condition", "residual"])
@pytest.mark.parametrize("rows", [1, 200, 10_000])  # a step at a time, two, all six
def test_modulations_computed_for_many_steps_give_what_each_step_gives(
    teacher, activations, monkeypatch, form, rows
):
    head = teacher.action_head
    if form != "mlp":
        head = grafted(teacher, cross_attention=form, start="random")
        # Fresh modulations are zero; these differ with timestep and condition.
        fresh = iter(jax.random.split(jax.random.key(7), 100))
        arrays = surgery.flatten(head)
        head = surgery.replace(
            head,
            {
                k: 0.1 * jax.random.normal(next(fresh), v.shape) if "adaLN" in k else v
                for k, v in arrays.items()
            },
        )
    z, noise = activations["z"], jax.random.normal(jax.random.key(0), (7, 6, 16, 2))
    schedule, condition = diffusion.make_schedule("6", 1000), head.condition(z)

    def denoise(x, t):
        return head.denoise(x, jnp.full(6, t), condition)

    wanted = diffusion.sample_loop(schedule, denoise, noise)
    monkeypatch.setattr(diffusion_head, "_ROWS_AT_ONCE", rows)
    np.testing.assert_allclose(head.sample(z, noise=noise, sampling_steps="6"), wanted, atol=2e-5)


def test_the_condition_form_looks_at_the_video_once_per_observation(teacher, activations):
    head = grafted(teacher)
    condition = head.condition(activations["z"])
    assert condition.shape == (6, 16, HEAD.width)
    x = activations["actions"]
    early = head.denoise(x, jnp.zeros(6, jnp.int32), condition)
    late = head.denoise(x, jnp.full(6, 900), condition)
    assert np.abs(early - late).max() > 1e-3


def _options(**changes):
    values = dict(
        operators=("cross_attn", "self_attn", "mlp"), epochs=30, lr=3e-3, batch=6, warmup=2,
        weight_decay=0.0, clip_norm=1.0,
        loss={"cross_attn": "l1", "self_attn": "l1", "mlp": "l2"}, fresh_noise=True,
        block_epochs=0, block_lr=0.0, checkpoint_every=10, log_every=10,
    )  # fmt: skip
    return distill.DistillOptions(**(values | changes))


@pytest.fixture
def writer(tmp_path):
    from uva_jax.runtime.metrics import MetricsWriter

    with MetricsWriter(tmp_path, "distill") as metrics:
        yield metrics


@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_distillation_lowers_the_conditions_loss_and_needs_the_right_video(
    teacher, activations, tmp_path, writer, kind
):
    head = grafted(teacher)
    features = distill.memory_features(head, np.asarray(activations["z"]), batch=6)
    options = _options(epochs=80, loss={"cross_attn": kind, "self_attn": "l1", "mlp": "l2"})
    e_c = activations["condition"]
    trained = distill.distill_condition(
        head, features, e_c, options=options, seed=0, folder=tmp_path, metrics=writer
    )
    scaled = surgery.replace(
        head,
        surgery.flatten(head)
        | {k: surgery.flatten(trained)[k] for k in ("condition_scale", "condition_shift")},
    )
    before = judge.judge_condition(scaled, features, e_c, kind)[-1]
    after = judge.judge_condition(trained, features, e_c, kind)[-1]
    assert after["scaled"] < 0.5 * before["scaled"]
    assert after["shuffled"] > 2 * after["scaled"]


def test_a_resumed_distillation_gives_the_same_parameters(
    teacher, activations, tmp_path, writer, monkeypatch
):
    head = grafted(teacher)
    features = distill.memory_features(head, np.asarray(activations["z"]), batch=6)
    arguments = dict(options=_options(epochs=20), seed=0, metrics=writer)
    whole = distill.distill_condition(
        head, features, activations["condition"], folder=tmp_path / "whole", **arguments
    )

    saved = fit.Checkpoints.save

    def save_and_die(self, step, state):
        saved(self, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit.Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        distill.distill_condition(
            head, features, activations["condition"], folder=tmp_path / "cut", **arguments
        )
    monkeypatch.setattr(fit.Checkpoints, "save", saved)
    resumed = distill.distill_condition(
        head, features, activations["condition"], folder=tmp_path / "cut", **arguments
    )
    for path, x in surgery.flatten(whole).items():
        np.testing.assert_array_equal(x, surgery.flatten(resumed)[path], err_msg=path)


def test_operators_are_saved_and_loaded_one_by_one(teacher, tmp_path):
    source_head = grafted(teacher, start="random")
    target = grafted(teacher)
    assemble.save_operator(tmp_path / "mlp", source_head, "mlp", {})
    loaded = surgery.flatten(assemble.load_operator(tmp_path / "mlp", target, "mlp"))
    for path, x in surgery.flatten(target).items():
        expected = surgery.flatten(source_head)[path] if "/mlp/" in path else x
        np.testing.assert_array_equal(loaded[path], expected, err_msg=path)


def test_operators_that_do_not_fit_are_refused_with_a_sentence(teacher, tmp_path):
    assemble.save_operator(tmp_path / "mlp", grafted(teacher), "mlp", {})
    with pytest.raises(UserError, match="holds 'mlp' operators"):
        assemble.load_operator(tmp_path / "mlp", grafted(teacher), "self_attn")
    with pytest.raises(UserError, match="no operator"):
        assemble.load_operator(tmp_path, grafted(teacher), "mlp")
    with pytest.raises(UserError, match="made for another head"):
        assemble.load_operator(tmp_path / "mlp", grafted(teacher, mlp_ratio=2), "mlp")
    deeper = dataclasses.replace(
        teacher.config, action_head=dataclasses.replace(teacher.config.action_head, depth=3)
    )
    with pytest.raises(UserError, match="2 blocks, but this head has 3"):
        assemble.load_operator(tmp_path / "mlp", grafted(make_policy(deeper)), "mlp")


def test_a_depth_that_the_teacher_has_not_is_refused(teacher):
    with pytest.raises(UserError, match=r"config\.head\.depth is 4, .* has 2 blocks"):
        grafted(teacher, depth=4)


def _data(**changes):
    return dataclasses.replace(section(common.get_config().data, source.DataOptions), **changes)


def _read(buffer, strips, rows, data):
    return source.WindowReader(buffer, data, make_policy()).read(strips, np.array(rows))


def test_strips_give_the_windows_that_single_reads_give(buffer):
    data, mask = _data(), np.ones(buffer.n_episodes, bool)
    plan = dict(stride=4, options=data, seed=0)
    strips = plan_strips(buffer.episode_ends, mask, strip=5, count=3, **plan)
    found = _read(buffer, strips, [0, 1, 2], data)
    for row, k in itertools.product(range(3), range(5)):
        single = Strips(
            strips.episode[row : row + 1], strips.current[row, k].reshape(1, 1), np.zeros(1, bool)
        )
        alone = _read(buffer, single, [0], data)
        np.testing.assert_array_equal(alone["image"][0], found["image"][row, k : k + 4])
        np.testing.assert_array_equal(alone["action"][0, 0], found["action"][row, k])


def test_windows_repeat_the_first_frame_and_the_last_action(buffer):
    last = int(buffer.episode_ends[0]) - 10
    strips = Strips(np.array([0, 0]), np.array([[0], [last]]), np.zeros(2, bool))
    found = _read(buffer, strips, [0, 1], _data())
    np.testing.assert_array_equal(found["image"][0], np.repeat(found["image"][0, -1:], 4, axis=0))
    np.testing.assert_array_equal(
        found["action"][1, 0, 10:], np.repeat(found["action"][1, 0, 9:10], 6, axis=0)
    )


def test_mirrored_strips_are_the_mirror_of_the_plain_ones(buffer):
    episode, current = np.array([1, 2]), np.array([[0, 4], [8, 12]])
    plain = Strips(episode, current, np.zeros(2, bool))
    mixed = Strips(episode, current, np.array([False, True]))
    want, found = (_read(buffer, s, [1, 0], _data(mirror="pusht")) for s in (plain, mixed))
    for name, image in mirror_pusht(want).items():
        np.testing.assert_array_equal(found[name][0], image[0])
        np.testing.assert_array_equal(found[name][1], want[name][1])


@pytest.mark.parametrize("strip", [1, 5, 13])
def test_every_window_is_in_a_strip(buffer, strip):
    lengths = np.diff(buffer.episode_ends, prepend=0)
    strips = plan_strips(
        buffer.episode_ends, np.ones(3, bool), strip=strip, stride=4, options=_data(), seed=0
    )
    for episode, length in enumerate(lengths):
        steps = np.unique(strips.current[strips.episode == episode])
        np.testing.assert_array_equal(steps, np.arange(length - 9))
    assert strips.current.size < 1.6 * sum(lengths - 9)  # few windows are repeated


def test_an_episode_shorter_than_a_window_is_refused_with_a_sentence():
    with pytest.raises(UserError, match="no episode has the 10 steps"):
        plan_strips(np.array([9]), np.ones(1, bool), strip=1, stride=4, options=_data(), seed=0)


def test_captured_samples_do_not_depend_on_their_neighbours(teacher):
    key = jax.random.key(0)
    images = jax.random.randint(key, (4, 5, 96, 96, 3), 0, 256).astype(jnp.uint8)
    actions = jax.random.uniform(key, (4, 2, 16, 2), maxval=512.0)
    samples = jnp.arange(8).reshape(4, 2)
    run = jax.jit(
        lambda i, a, s: capture_strips(teacher, {"image": i, "action": a}, s, key, blocks=True)
    )
    whole, part = run(images, actions, samples), run(images[2:], actions[2:], samples[2:])
    for name, x in whole.items():
        np.testing.assert_allclose(x[4:], part[name], atol=2e-5, err_msg=name)


_CAPTURE = """
import sys
import numpy as np
from conftest import make_policy
from uva_jax.data import source
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.windows import plan_strips
from uva_jax.graft import record
from uva_jax.storage.site import Site
from uva_jax.graft.capture import CaptureOptions
from uva_jax.runtime.metrics import MetricsWriter
from test_grafting import _data

folder, buffer = sys.argv[1:]
buffer = ReplayBuffer.open(buffer)
options = CaptureOptions(21, 1, 2, 1, True, "bfloat16", 0)
strips = plan_strips(
    buffer.episode_ends, np.ones(3, bool), strip=2, stride=4, options=_data(), seed=0, count=11
)
with MetricsWriter(folder, "capture") as metrics:
    cache = record.capture_cache(
        Site(__import__("pathlib").Path(folder) / "cache", metrics), make_policy(), strips,
        source.WindowReader(buffer, _data(), make_policy()), options, seed=0, origin="tiny",
    )
np.savez(folder + "/all.npz", **{k: np.asarray(cache.read(k), np.float32) for k in cache.names})
"""


def test_eight_devices_write_the_same_cache_as_one_to_the_bit(buffer, tmp_path):
    found = {}
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        folder.mkdir()
        process = python(_CAPTURE, folder, buffer.path, devices=devices)
        _, words = process.communicate(timeout=120)
        assert process.returncode == 0, words
        found[devices] = dict(np.load(folder / "all.npz"))
    assert set(found[1]) == {"z", "actions", "condition", "t", "noise", "h", "residual"}
    for name, x in found[1].items():
        np.testing.assert_array_equal(x, found[8][name], err_msg=name)
