"""Stage 2: frozen parameters do not change, adapters merge, phases begin, resuming is exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uva_jax.data import source
from uva_jax.data.readers import open_reader
from uva_jax.graft import assemble, finetune, fixed, held_out, stage2
from uva_jax.graft.capture import CaptureOptions
from uva_jax.graft.energy import energy_scores
from uva_jax.models import diffusion, surgery
from uva_jax.models.lora import init_lora, merge_lora
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter, read_metrics
from uva_jax.runtime.sections import EMAOptions
from uva_jax.runtime.settings import section
from uva_jax.storage.sample_store import SampleStore
from uva_jax.train import best, loop

OPTIONS = finetune.FinetuneOptions(
    steps=4,
    batch=4,
    optimizer="adamw",
    lr=1e-2,
    warmup=1,
    betas=(0.9, 0.95),
    weight_decay=0.02,
    clip_norm=1.0,
    accumulate=1,
    data_fraction=0.5,
    reuse_cache=False,
    freeze_encoder=True,
    freeze=("mar",),
    unfreeze_at={},
    keep_best=False,
    x0_weight=0.0,
    dropout=False,
    noise_draws=2,
    teacher_weight=0.0,
    use_lora=False,
    lora_rank=2,
    lora_targets=("mar/decoder_blocks/*/attn/*",),
    gradient_checkpointing=False,
    ema=EMAOptions(),
    steps_per_call=1,
    checkpoint_every=2,
    log_every=2,
)


@pytest.fixture(scope="module")
def graft(teacher):
    return make_graft(teacher, "video")


@pytest.fixture(scope="module")
def aggregating(teacher):
    return make_graft(teacher, "video+aggregate")


def make_graft(teacher, memory):
    options = assemble.HeadOptions(
        memory=memory,
        num_heads=2,
        self_attn_heads=2,
        cross_mlp_ratio=1,
        mlp_ratio=2,
        init_paths={},
    )
    config = assemble.grafted_config(teacher, options)
    head = assemble.start_head(teacher.action_head, config, "preserve", 0)
    return assemble.assemble(teacher, head)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return {
        "z": rng.normal(size=(12, 64, 32)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (12, 16, 2)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def many(tokens):
    """Each window ten times, with noise of its own, so that small gains exceed the noise."""
    return {k: np.concatenate([x] * 10) for k, x in tokens.items()}


CHECKS = ("step", "errors", "start")  # what a check finds


def train(graft, tokens, folder, teacher=None, held_out=None, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    folder.mkdir(exist_ok=True)
    trainer = finetune.Trainer(graft, options, parallel.make_mesh(), 0, teacher)
    batches = finetune.token_batches(tokens, options, 0)
    with MetricsWriter(folder, "finetune") as metrics:
        tuned, kept = trainer.run(batches, folder=folder, metrics=metrics, held_out=held_out)
    if kept is None:
        return surgery.flatten(tuned)
    return surgery.flatten(tuned) | {k: getattr(kept, k) for k in CHECKS}


def test_frozen_parameters_stay_to_the_bit_and_the_head_moves(graft, tokens, tmp_path):
    before, after = surgery.flatten(graft), train(graft, tokens, tmp_path)
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert moved and all(k.startswith("action_head/") for k in moved)
    assert "action_head/blocks/0/mlp/fc1/kernel" in moved


@pytest.mark.parametrize("keeps", [False, True])
def test_a_resumed_run_gives_the_same_parameters(graft, tokens, tmp_path, monkeypatch, keeps):
    how = {"held_out": tokens, "check_every": 1, "lr": 1e-3} if keeps else {}
    whole = train(graft, tokens, tmp_path / "whole", **how)

    class Killed(BaseException):
        pass

    saved = loop.Checkpoints.save

    def save_and_die(self, step, state):
        saved(self, step, state)
        raise Killed

    monkeypatch.setattr(loop.Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        train(graft, tokens, tmp_path / "cut", **how)
    monkeypatch.setattr(loop.Checkpoints, "save", saved)
    resumed = train(graft, tokens, tmp_path / "cut", **how)
    for path, x in whole.items():
        np.testing.assert_array_equal(x, resumed[path], err_msg=path)


def test_the_state_with_the_smallest_error_is_kept_or_the_start(graft, tokens, many, tmp_path):
    how = {
        "held_out": many,
        "check_every": 2,
        "steps": 5,
        "freeze": ("mar", "action_head/memory"),
    }
    # What trains only from step 3 on is as it was when the best state was found.
    worse = train(
        graft, tokens, tmp_path, lr=0.1, unfreeze_at={"3": ("action_head/memory",)}, **how
    )
    assert worse["step"] == 0
    np.testing.assert_array_equal(worse["errors"], worse["start"])
    for path, x in surgery.flatten(graft).items():
        np.testing.assert_array_equal(x, worse[path], err_msg=path)
    lines = [r for r in read_metrics(tmp_path, "finetune") if "held_out_error" in r]
    checked = {r["step"]: r["held_out_error"] for r in lines}
    assert checked.keys() == {0, 2, 4, 5} and min(checked.values()) == checked[0]
    better = train(graft, tokens, tmp_path / "better", lr=1e-2, **how | {"steps": 40})
    assert better["step"] > 0 and better["errors"].mean() < better["start"].mean()


def test_a_state_that_is_better_by_less_than_the_noise_is_not_kept():
    mesh, noise = parallel.make_mesh(), np.linspace(-1, 1, 50)
    first, later = ({"w": jnp.full(2, x)} for x in (1.0, 2.0))
    start = best.better(
        best.unchecked(first, best.Keep(None, 50, 1), mesh), first, 0, 3 + noise, mesh
    )
    assert start.step == 0
    # The paired differences, not the errors, must be large against their own spread.
    for errors, step in (
        (3 - 0.01 - noise, 0),
        (3 - 0.5 - noise, 4),
        (3 - 0.01 + noise, 4),
        (3 + 0.01 + noise, 0),
        (np.full(50, np.nan), 0),
    ):
        found = best.better(start, later, 4, errors, mesh)
        assert found.step == step
        assert found.params["w"][0] == (2.0 if step else 1.0)
        np.testing.assert_allclose(found.start, 3 + noise, rtol=1e-6)
    broken = best.better(
        best.unchecked(first, best.Keep(None, 1, 1), mesh), first, 0, np.array([np.nan]), mesh
    )
    assert best.better(broken, later, 4, np.array([9.0]), mesh).step == 4


@pytest.mark.parametrize("lora", [False, True])
def test_the_result_can_lie_between_the_start_and_the_tuned_policy(graft, tokens, tmp_path, lora):
    how = {"lr": 1e-2, "steps": 3}
    if lora:
        how |= {"use_lora": True, "lora_targets": ("action_head/blocks/*/mlp/fc*/kernel",)}
    before, after = surgery.flatten(graft), train(graft, tokens, tmp_path / "whole", **how)
    found = train(graft, tokens, tmp_path / "part", interpolation=0.25, **how)
    assert any(np.abs(after[k] - before[k]).max() > 1e-3 for k in before)
    for path, x in before.items():
        np.testing.assert_allclose(
            found[path], x + 0.25 * (after[path] - x), atol=1e-6, err_msg=path
        )


def test_the_checks_judge_the_interpolated_policy(graft, tokens, many, tmp_path):
    how = {"held_out": many, "check_every": 10, "steps": 40, "lr": 1e-2}
    kept = train(graft, tokens, tmp_path, interpolation=0.5, **how)
    policy = surgery.replace(
        surgery.abstract_policy(graft.config),
        {k: v for k, v in kept.items() if k not in CHECKS},
    )
    errors = held_out.errors_of(lambda p: p, many, parallel.make_mesh(), 0)(policy)
    assert kept["step"] > 0
    np.testing.assert_allclose(errors, kept["errors"], rtol=1e-5)


def test_the_energy_score_is_smallest_for_the_true_distribution():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4000, 3, 2))
    scores = {
        spread: float(energy_scores(spread * rng.normal(size=(6, 4000, 3, 2)), truth).mean())
        for spread in (0.0, 0.7, 1.0, 1.3)
    }
    assert min(scores, key=scores.get) == 1.0
    # By hand, for two samples of one window: mean distance to 0 is 2, half of their distance 1.
    found = energy_scores(jnp.array([[[[1.0]]], [[[3.0]]]]), jnp.zeros((1, 1, 1)))
    assert found == 1.0


def test_rounded_factors_change_training_in_its_last_digits(graft, tokens, tmp_path):
    how = {"lr": 1e-3, "steps": 3}
    exact = train(graft, tokens, tmp_path / "exact", **how)
    rounded = train(graft, tokens, tmp_path / "rounded", matmul_precision="bfloat16", **how)
    path = "action_head/final_layer/linear/kernel"
    moved = np.abs(exact[path] - surgery.flatten(graft)[path]).max()
    assert 0 < np.abs(rounded[path] - exact[path]).max() < moved


def test_phases_open_further_parameters_at_their_step(graft):
    options = dataclasses.replace(
        OPTIONS,
        freeze=("mar", "action_head/memory"),
        unfreeze_at={"2": ("action_head/memory",)},
    )
    first, second = finetune.plan_phases(surgery.flatten(graft), options)
    assert (first.start, second.start) == (0, 2)
    opened = set(second.trainable) - set(first.trainable)
    assert opened and all(k.startswith("action_head/memory/") for k in opened)
    assert fixed.trunk_is_frozen((first, second), options)


def test_what_a_phase_opens_trains_from_then_on(graft, tokens, tmp_path):
    frozen = {"freeze": ("mar", "action_head/memory")}
    opened = {**frozen, "unfreeze_at": {"2": ("action_head/memory",)}}
    before = surgery.flatten(graft)
    closed = train(graft, tokens, tmp_path / "closed", **frozen)
    after = train(graft, tokens, tmp_path / "opened", **opened)
    for path, x in before.items():
        if path.startswith("action_head/memory/"):
            np.testing.assert_array_equal(x, closed[path], err_msg=path)
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert any(k.startswith("action_head/memory/") for k in moved)
    lines = [line["step"] for line in read_metrics(tmp_path / "opened", "finetune")]
    assert lines == [2, 4]
    # The second phase is as resumable as the first: a finished run has nothing left to do.
    again = train(graft, tokens, tmp_path / "opened", **opened)
    for path, x in after.items():
        np.testing.assert_array_equal(x, again[path], err_msg=path)


def test_a_batch_of_few_windows_still_divides_into_its_parts(tokens):
    options = dataclasses.replace(OPTIONS, batch=40, accumulate=5)
    assert len(finetune.token_batches(tokens, options, 0)(3)["z"]) == 10
    options = dataclasses.replace(OPTIONS, batch=40, accumulate=20)
    with pytest.raises(UserError, match="12 windows, too few"):
        finetune.token_batches(tokens, options, 0)


def test_cached_tokens_are_refused_while_the_trunk_trains(graft):
    options = dataclasses.replace(OPTIONS, freeze=(), reuse_cache=True)
    phases = finetune.plan_phases(surgery.flatten(graft), options)
    with pytest.raises(UserError, match="reuse_cache"):
        finetune.check_reuse(phases, options)


def test_adapters_change_nothing_at_first_and_merge_exactly(graft):
    arrays = surgery.flatten(graft)
    adapters = init_lora(arrays, OPTIONS.lora_targets, 2, jax.random.key(0))
    for path, x in merge_lora(arrays | adapters).items():
        np.testing.assert_array_equal(x, arrays[path])
    path = "mar/decoder_blocks/0/attn/qkv/kernel"
    adapters[f"lora/{path}/b"] = jnp.ones_like(adapters[f"lora/{path}/b"])
    merged = merge_lora(arrays | adapters)
    x = jax.random.normal(jax.random.key(1), (5, 32))
    a, b = adapters[f"lora/{path}/a"], adapters[f"lora/{path}/b"]
    np.testing.assert_allclose(x @ merged[path], x @ arrays[path] + x @ a @ b, atol=1e-4)


def test_frames_are_encoded_outside_a_loop(graft):
    for changes, calls in (({"freeze": ("mar",)}, 5), ({}, 5), ({"cache_latents": False}, 1)):
        options = dataclasses.replace(OPTIONS, **{"freeze": (), "steps_per_call": 5} | changes)
        trainer = finetune.Trainer(graft, options, parallel.make_mesh(), 0)
        assert trainer.options.steps_per_call == calls


def test_with_adapters_their_targets_stay_frozen(graft):
    options = dataclasses.replace(OPTIONS, freeze=(), use_lora=True)
    trainer = finetune.Trainer(graft, options, parallel.make_mesh(), 0)
    trained = set(trainer.phases[0].trainable)
    assert "lora/mar/decoder_blocks/0/attn/qkv/kernel/a" in trained
    assert "mar/decoder_blocks/0/attn/qkv/kernel" not in trained


def test_gradient_checkpointing_changes_no_gradient(graft):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 4, 32, 32, 3), np.uint8),
        "action": rng.uniform(0, 512, (2, 16, 2)).astype(np.float32),
    }
    graph, state = nnx.split(graft)

    def gradients(remat):
        def loss(state):
            policy = nnx.merge(graph, state)
            policy.mar.remat = remat
            return finetune.loss_on_images(policy, batch, jax.random.key(0), OPTIONS)["loss"]

        return surgery.flatten(jax.jit(jax.grad(loss))(state))

    plain, checkpointed = gradients(False), gradients(True)
    for path, x in plain.items():
        # The gradient of a key's bias is zero but for rounding.
        scale = max(float(np.abs(x).max()), 1e-3)
        np.testing.assert_allclose(x / scale, checkpointed[path] / scale, atol=1e-5, err_msg=path)


def test_the_distance_to_the_teacher_is_that_of_the_heads_on_the_same_noise(graft, teacher, tokens):
    batch = {k: jnp.asarray(v[:3]) for k, v in tokens.items()}
    options = dataclasses.replace(OPTIONS, teacher_weight=3.0)
    key = jax.random.key(0)
    found = finetune.loss_on_tokens(graft, batch, key, options, teacher)
    plain = finetune.loss_on_tokens(graft, batch, key, options)
    assert "distance" not in plain and plain["mse"] == found["mse"]
    np.testing.assert_allclose(found["loss"], plain["loss"] + 3 * found["distance"], rtol=1e-6)
    # Drawn by hand: 2 draws of each sample, one timestep for all of its rows.
    t = jax.random.randint(jax.random.fold_in(key, 0), (6,), 0, 1000)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (6, 16, 2))
    schedule = diffusion.make_schedule("", 1000)
    x_t = diffusion.q_sample(schedule, jnp.tile(batch["actions"], (2, 1, 1)), t, noise)
    ours, theirs = (
        p.action_head.denoise(x_t, t, jnp.tile(p.action_head.condition(batch["z"]), (2, 1, 1)))
        for p in (graft, teacher)
    )
    np.testing.assert_allclose(found["distance"], jnp.mean((ours - theirs) ** 2), rtol=1e-5)
    assert found["distance"] > 0
    # The distance of the teacher to itself is 0.
    same = finetune.loss_on_tokens(teacher, batch, key, options, teacher)
    assert same["distance"] == 0


def test_what_frozen_layers_compute_replaces_tokens(aggregating, teacher, tokens):
    freeze = ("mar", "action_head/memory/conv", "action_head/memory/aggregator")
    options = dataclasses.replace(OPTIONS, freeze=freeze, teacher_weight=100.0)
    phases = finetune.plan_phases(surgery.flatten(aggregating), options)
    known = fixed.known(aggregating, teacher, phases, tokens)
    assert sorted(known) == ["actions", "feature0", "feature1", "reference"]
    alone = fixed.known(aggregating, None, phases, tokens)
    assert sorted(alone) == ["actions", "feature0", "feature1"]
    rows = [11, 3, 3]
    for data, other in ((known, teacher), (alone, None)):
        from_tokens, from_known = (
            finetune.loss_on_tokens(
                aggregating, {k: v[rows] for k, v in x.items()}, jax.random.key(1), options, other
            )
            for x in (tokens, data)
        )
        assert from_known.keys() == from_tokens.keys()
        for name, value in from_tokens.items():
            np.testing.assert_allclose(from_known[name], value, rtol=1e-5, err_msg=name)


def test_tokens_stay_if_a_layer_of_the_features_trains(aggregating, tokens):
    graft = aggregating
    for changes in ({}, {"unfreeze_at": {"3": ("action_head/memory/aggregator",)}}):
        frozen = ("mar", "action_head/memory") if changes else ("mar",)
        options = dataclasses.replace(OPTIONS, freeze=frozen, **changes)
        phases = finetune.plan_phases(surgery.flatten(graft), options)
        assert fixed.known(graft, None, phases, tokens) is tokens


def test_x0_weight_makes_the_error_of_eps_that_of_the_actions(graft, tokens):
    actions, z = jnp.asarray(tokens["actions"][:3]), jnp.asarray(tokens["z"][:3])
    t, noise = jnp.array([5, 400, 999]), jax.random.normal(jax.random.key(0), actions.shape)
    head, schedule = graft.action_head, diffusion.make_schedule("", 1000)
    plain = head.loss(actions, z, t=t, noise=noise)
    found = head.loss(actions, z, t=t, noise=noise, x0_weight=10.0)
    x_t = diffusion.q_sample(schedule, actions, t, noise)
    eps = head.denoise(x_t, t, head.condition(z))[..., :2]
    kept = jnp.asarray(schedule.alphas_cumprod)[t][:, None, None]
    x0 = (x_t - jnp.sqrt(1 - kept) * eps) / jnp.sqrt(kept)
    wanted = jnp.mean((x0 - actions) ** 2, axis=-1) + plain["vb"]
    np.testing.assert_allclose(found["loss"][:2], wanted[:2], rtol=1e-3)
    np.testing.assert_allclose(found["loss"][2], 10 * plain["mse"][2] + plain["vb"][2], rtol=1e-5)
    np.testing.assert_array_equal(found["mse"], plain["mse"])


def test_a_graft_held_to_its_teacher_comes_nearer_to_it(graft, teacher, tokens, tmp_path):
    options = dataclasses.replace(OPTIONS, teacher_weight=100.0)

    def distance(policy):
        batch = {k: jnp.asarray(v) for k, v in tokens.items()}
        return finetune.loss_on_tokens(policy, batch, jax.random.key(7), options, teacher)[
            "distance"
        ]

    arrays = train(
        graft, tokens, tmp_path, teacher, teacher_weight=100.0, steps=40, batch=12, lr=3e-3
    )
    tuned = surgery.replace(surgery.abstract_policy(graft.config), arrays)
    assert distance(tuned) < 0.7 * distance(graft)
    # The teacher's arrays are not part of the graft.
    assert not [k for k in arrays if k.startswith("teacher/")]
    assert {"distance", "loss", "mse"} <= {
        k.removeprefix("finetune/") for k in read_metrics(tmp_path, "finetune")[-1]
    }


@pytest.mark.parametrize("lora", [False, True])
def test_the_teacher_stays_itself_while_the_trunk_trains(graft, teacher, lora):
    options = dataclasses.replace(OPTIONS, freeze=(), use_lora=lora, teacher_weight=1.0)
    trainer = finetune.Trainer(graft, options, parallel.make_mesh(), 0, teacher)
    params = {k: trainer.arrays[k] for k in trainer.phases[0].trainable}
    frozen = {k: v for k, v in trainer.arrays.items() if k not in params} | trainer.held
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 4, 32, 32, 3), np.uint8),
        "action": rng.uniform(0, 512, (2, 16, 2)).astype(np.float32),
    }
    seen = []

    def loss(policy, batch, key, options, teacher):
        seen.append(surgery.flatten(teacher))
        return finetune.loss_on_images(policy, batch, key, options, teacher)

    objective = finetune.graft_loss(graft, loss, options, teacher)
    moved = {k: v + 0.1 for k, v in params.items()}
    _, scalars = objective(moved, frozen, batch, jax.random.key(0), 0)
    assert np.isfinite(scalars["distance"]) and scalars["distance"] > 0
    for path, x in surgery.flatten(teacher).items():
        np.testing.assert_array_equal(x, seen[0][path], err_msg=path)
    # The frozen encoder is shared, not held twice.
    held = {k.removeprefix("teacher/") for k in trainer.held}
    assert "mar/decoder_blocks/0/attn/qkv/kernel" in held
    assert not any(k.startswith(("mar/encoder_", "vae/")) for k in held)


def test_training_on_stored_latents_is_training_on_frames(
    graft, teacher, make_config, tmp_path, monkeypatch
):
    config = section(make_config().data, source.DataOptions)

    arrays = SampleStore.arrays

    def tuned(name, held=2**30, **changes):
        monkeypatch.setattr(SampleStore, "arrays", lambda store, names: arrays(store, names, held))
        how = dict(freeze=(), steps=2, lr=1e-3, keep_best=True, check_windows=4, check_every=1)
        folder = tmp_path / name
        folder.mkdir()
        with MetricsWriter(folder, "finetune") as metrics:
            policy, found = stage2.fine_tune(
                stage2.Inputs(
                    graft, lambda: teacher, lambda: open_reader(config, graft), None, "teacher"
                ),
                dataclasses.replace(OPTIONS, **how | changes),
                folder,
                metrics,
                capture=CaptureOptions(strip=2, batch=4),
                mesh=parallel.make_mesh(),
                seed=0,
            )
        return surgery.flatten(policy), found, folder

    stored, found, folder = tuned("stored")
    assert (folder / "latents").is_dir() and (folder / "latents_held_out").is_dir()
    from_disk, again, _ = tuned("from_disk", held=0)
    assert again == found
    for path, x in stored.items():
        np.testing.assert_array_equal(from_disk[path], x, err_msg=path)
    # Strips are shuffled in place of windows, so only the checks see the same windows.
    _, on_frames, folder = tuned("frames", cache_latents=False)
    assert not (folder / "latents").exists()
    before = "held_out_error_before"
    assert abs(on_frames[before] - found[before]) < 1e-3 * found[before]
    moved = {k for k, x in surgery.flatten(graft).items() if not np.array_equal(x, stored[k])}
    assert any(k.startswith("mar/decoder_blocks/") for k in moved)
    assert not any(k.startswith(("vae/", "mar/encoder_blocks/")) for k in moved)
