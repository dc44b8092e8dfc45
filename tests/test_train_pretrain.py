"""Training a policy: losses fall, every bit resumes, devices and accumulation change nothing."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, make_policy, python, silently
from variants import ROBOT_STATE, TASKS, write_recording

from configs import common
from convert.formats import torch_file
from convert.from_torch import convert_checkpoint
from convert.partial import start_from
from convert.to_torch import torch_arrays
from uva_jax.data import source
from uva_jax.data.augment import mirror_pusht
from uva_jax.data.windows import WindowSpec, plan_strips
from uva_jax.models import policy_folder, surgery
from uva_jax.pretrain import joint, latents, stages
from uva_jax.pretrain.progress import advantages
from uva_jax.pretrain.windows import StateScale, Windows, past_choices
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter, read_metrics
from uva_jax.runtime.sections import EMAOptions
from uva_jax.runtime.settings import section
from uva_jax.storage.site import Site
from uva_jax.train import loop

OPTIONS = dataclasses.replace(
    section(common.get_config().pretrain, joint.PretrainOptions),
    steps=24,
    batch=8,
    lr=3e-3,
    warmup=1,
    ema=EMAOptions(max_value=0.9),
    steps_per_call=2,
    checkpoint_every=12,
    log_every=2,
    modes={"policy_model": 1.0},
    noise_draws=2,
    readout_weight=0.1,
    judge_windows=8,
)
DATA = source.DataOptions(val_ratio=0.3, split_seed=0, mirror="pusht", max_episodes=3)


pytestmark = pytest.mark.usefixtures("quick_compilation")


MIRRORED = latents.Copies(mirror=True)


class Killed(BaseException):
    """Simulates a kill."""


def encode(folder, policy, buffer, copies=MIRRORED):
    with MetricsWriter(folder.parent, "pretrain") as metrics:
        site = Site(folder, metrics)
        return latents.encode_frames(site, policy, buffer, "img", copies)


@pytest.fixture(scope="module")
def cache(shared, teacher, buffer):
    return encode(shared / "latents", teacher, buffer)


def windows(buffer, policy, **more):
    train, held_out = source.split(buffer, DATA)
    return [Windows(buffer, m, policy, DATA, 0, **more) for m in (train, held_out)]


def train(folder, teacher, buffer, cache, **changes):
    folder.mkdir(exist_ok=True)
    scale = StateScale.fit(buffer.read("state"), (4,))
    with MetricsWriter(folder, "pretrain") as metrics:
        return joint.pretrain(
            teacher,
            latents.Latents.open(cache, 2**30),
            *windows(buffer, teacher, state_key="state"),
            options=dataclasses.replace(OPTIONS, **changes),
            mesh=parallel.make_mesh(),
            seed=0,
            folder=folder / "states",
            metrics=metrics,
            state_scale=scale,
        )


@pytest.fixture(scope="module")
def trained(shared, teacher, buffer, cache):
    return train(shared / "pretrained", teacher, buffer, cache)


def test_the_loss_falls_and_held_out_losses_are_logged(shared, trained):
    lines = read_metrics(shared / "pretrained", "pretrain")
    assert lines[-1]["policy/loss"] < 0.8 * lines[0]["policy/loss"]
    name = "policy/held_out/policy_model/act_loss"
    first, last = (line[name] for line in lines if name in line)
    assert last < first


def test_a_resumed_run_gives_the_same_parameters_to_the_bit(
    tmp_path, teacher, buffer, cache, trained, monkeypatch
):
    saved = loop.Checkpoints.save

    def save_and_die(self, step, state):
        saved(self, step, state)
        raise Killed

    monkeypatch.setattr(loop.Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        train(tmp_path, teacher, buffer, cache)
    monkeypatch.setattr(loop.Checkpoints, "save", saved)
    resumed = surgery.flatten(train(tmp_path, teacher, buffer, cache))
    for path, x in surgery.flatten(trained).items():
        np.testing.assert_array_equal(x, resumed[path], err_msg=path)


def test_the_vae_and_the_normaliser_stay_and_the_rest_moves(teacher, trained):
    before, after = surgery.flatten(teacher), surgery.flatten(trained)
    assert before.keys() == after.keys()
    moved = {k for k in before if not np.array_equal(before[k], after[k])}
    assert {k.split("/")[0] for k in moved} == {"mar", "action_head"}


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    def loss(params, frozen, batch, key, step):
        error = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        return error, {"loss": error}

    rng = np.random.default_rng(0)
    group = {"x": rng.normal(size=(3, 8, 4)), "y": rng.normal(size=(3, 8, 2))}
    group = {k: v.astype(np.float32) for k, v in group.items()}
    mesh, found = parallel.make_mesh(), []
    for parts in (1, 4):
        options = dataclasses.replace(OPTIONS, accumulate=parts)
        state = loop.start_state({"w": jnp.ones((4, 2))}, options, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        run = loop.make_steps(loss, options, mesh, shardings)
        state, scalars, _ = run(state, {}, group, jnp.int32(0), jax.random.key(0))
        found.append((np.asarray(state.params["w"]), float(scalars["loss"])))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


_ON_DEVICES = """
import json, jax, numpy as np
from conftest import make_policy
from test_train_pretrain import OPTIONS
from uva_jax.runtime import parallel
from uva_jax.models import policy_folder, surgery
from uva_jax.pretrain import joint
jax.config.update("jax_disable_most_optimizations", True)
policy, rng = make_policy(), np.random.default_rng(0)
shape = (8, 8, *policy.latent_shape(1)[2:])
batch = {"mean": rng.normal(size=shape), "logvar": np.full(shape, -2.0)}
batch["action"] = rng.uniform(0, 512, (8, 16, 2))
batch = {k: v.astype(np.float32) for k, v in batch.items()}
arrays, losses = surgery.flatten(policy), []
loss = joint.pretrain_loss(policy, OPTIONS, ("full_dynamic_model",))
for mesh in (parallel.make_mesh(devices=jax.devices()[:1]), parallel.make_mesh(data=4, fsdp=2)):
    shardings = parallel.shardings_for(arrays, mesh)
    placed = {k: jax.device_put(v, shardings[k]) for k, v in arrays.items()}
    dealt = parallel.shard_batch(mesh, batch)
    found = jax.jit(lambda p, b: loss(p, {}, b, jax.random.key(0), 0)[1])(placed, dealt)
    losses.append({k: float(v) for k, v in found.items()})
print(json.dumps(losses))
"""


def test_the_loss_is_the_same_on_one_device_and_on_eight():
    process = python(_ON_DEVICES, devices=8)
    out, err = process.communicate()
    assert process.returncode == 0, err
    one, eight = json.loads(out.splitlines()[-1])
    assert one["video_loss"] > 0 and one["act_loss"] > 0
    assert eight == pytest.approx(one, rel=1e-5)


def test_rounded_factors_change_the_loss_in_its_last_digits():
    policy, rng = make_policy(), np.random.default_rng(0)
    shape = (4, 8, *policy.latent_shape(1)[2:])
    batch = {"mean": rng.normal(size=shape), "logvar": np.full(shape, -2.0)}
    batch["action"] = rng.uniform(0, 512, (4, 16, 2))
    batch = {k: v.astype(np.float32) for k, v in batch.items()}
    found = []
    for precision in ("default", "bfloat16"):
        options = dataclasses.replace(OPTIONS, matmul_precision=precision)
        loss = joint.pretrain_loss(policy, options, ("full_dynamic_model",))
        run = jax.jit(lambda p, b, loss=loss: loss(p, {}, b, jax.random.key(0), 0)[0])
        found.append(float(run(surgery.flatten(policy), batch)))
    assert found[0] != found[1] == pytest.approx(found[0], rel=2e-2)


def test_modes_come_with_their_shares_after_the_video_phase():
    options = dataclasses.replace(OPTIONS, video_steps=10)
    names, mode = joint.task_modes({"policy_model": 0.8, "inverse_model": 0.2}, options, 0)
    drawn = [names[mode(step)] for step in range(1010)]
    assert set(drawn[:10]) == {"video_model"}
    assert drawn[10:].count("policy_model") / 1000 == pytest.approx(0.8, abs=0.04)
    assert drawn == [names[mode(step)] for step in range(1010)]
    given = dataclasses.replace(OPTIONS, modes={"policy_model": 3.0, "inverse_model": 1.0})
    assert given.shares(("a",)) == {"policy_model": 0.75, "inverse_model": 0.25}
    plain = dataclasses.replace(OPTIONS, modes={})
    assert plain.shares(("a", "b", "c", "d")) == dict.fromkeys("abcd", 0.25)


def test_windows_are_those_of_the_policy_and_go_on_into_the_future(teacher, buffer):
    train_windows, _ = windows(buffer, teacher)
    mask, _ = source.split(buffer, DATA)
    strips = plan_strips(buffer.episode_ends, mask, strip=1, stride=4, options=DATA, seed=0)
    rows = np.arange(len(train_windows))[:64]
    assert len(train_windows) == len(strips)
    found = train_windows.read(rows)
    wanted = source.single_windows(source.WindowReader(buffer, DATA, teacher).read(strips, rows))
    np.testing.assert_array_equal(found["action"], wanted["action"])
    numbers, n = found["frames"], buffer.n_steps
    mirrored = strips.mirror[rows]
    assert ((numbers >= n) == mirrored[:, None]).all()
    plain = np.flatnonzero(~mirrored)
    seen = buffer.read_rows({"img": numbers[plain][:, :4]})["img"]
    np.testing.assert_array_equal(seen, wanted["image"][plain])
    steps = np.diff(numbers, axis=1)
    assert steps.max() == 4 and steps.min() >= 0


def test_the_best_windows_make_the_most_progress(teacher, buffer):
    all_windows, _ = windows(buffer, teacher, state_key="state")
    states = buffer.read("state")
    scale = StateScale.fit(states, (4,))
    best = all_windows.best(0.25, 32, scale)
    assert len(best) == round(len(all_windows) / 4)

    def current(found):
        batch = found.read(np.arange(len(found)))
        return np.stack([batch["frames"][:, 3] % buffer.n_steps, batch["frames"][:, 3]])

    (steps, _), (chosen, frames) = current(all_windows), current(best)
    train, _ = source.split(buffer, DATA)
    lengths = np.diff(buffer.episode_ends, prepend=0)
    used = np.repeat(train, lengths)
    mirrored = scale(mirror_pusht({"state": states[used]})["state"])
    gains = np.full(len(used), np.nan)
    gains[used] = advantages(scale(states[used]), np.cumsum(lengths[train]), mirrored, steps=32)
    assert gains[chosen].min() >= np.quantile(gains[steps], 0.74)
    # A window and its mirror image make the same progress.
    assert len(set(frames)) == len(frames) >= 2 * len(set(chosen)) - 1


def test_training_reads_the_best_windows_from_their_step_on(
    tmp_path, teacher, buffer, cache, monkeypatch
):
    all_windows, held_out = windows(buffer, teacher, state_key="state")
    best = all_windows.best(0.5, 32, StateScale.fit(buffer.read("state"), (4,)))
    read, sources = Windows.read, []

    def spied(self, *args, **how):
        sources.append(len(self))
        return read(self, *args, **how)

    monkeypatch.setattr(Windows, "read", spied)
    with MetricsWriter(tmp_path, "pretrain") as metrics:
        joint.pretrain(
            teacher,
            latents.Latents.open(cache, 2**30),
            all_windows,
            held_out,
            best=best,
            options=dataclasses.replace(OPTIONS, steps=5, warmup=1, progress_start=0.4),
            mesh=parallel.make_mesh(),
            seed=0,
            folder=tmp_path / "states",
            metrics=metrics,
        )
    trained = [n for n in sources if n != len(held_out)]
    assert trained == [len(all_windows)] * 2 + [len(best)] * 3


def test_progress_needs_states():
    with pytest.raises(UserError, match="progress_share is 0.5, but config.pretrain.readout names"):
        joint.PretrainOptions(progress_share=0.5)


def test_views_are_copies_with_one_crop_and_blur_an_episode(teacher, buffer):
    copies = latents.Copies(mirror=True, views=2, seed=3)
    n, start = buffer.n_steps, int(buffer.episode_ends[0])
    assert copies.count == 6
    steps = np.arange(start, start + 3)
    frames = buffer.read_rows({"img": steps})["img"]
    np.testing.assert_array_equal(copies.read(buffer, "img", steps), frames)
    changed = 0
    for view in (1, 2):
        copy = copies.number(view, 0)
        found = copies.read(buffer, "img", steps + copy * n)
        rng = np.random.default_rng((3, copy, 1))
        np.testing.assert_array_equal(found, copies.change(frames, rng))
        changed += not np.array_equal(found, frames)
    assert changed
    train_windows, _ = windows(buffer, teacher, copies=copies)
    rows = np.arange(8)
    plain, seen = (train_windows.read(rows, views=v)["frames"] for v in (0, np.full(8, 2)))
    np.testing.assert_array_equal(seen - plain, 4 * n)


def test_random_spacing_picks_upstreams_past_frames(teacher, buffer):
    train_windows, _ = windows(buffer, teacher)
    choices = past_choices(teacher)
    assert choices.shape == (816, 4) and choices.min() == -15 and (choices[:, -1] == 0).all()
    plain, spaced = (
        train_windows.read(np.arange(64), past=past)["frames"] for past in (None, choices[0])
    )
    np.testing.assert_array_equal(plain[:, 3:], spaced[:, 3:])
    assert (np.diff(spaced[:, :3], axis=1) == 0).all() and (spaced[:, 0] <= plain[:, 0]).all()


def test_encoding_resumes_and_gives_the_mirror_image_too(
    tmp_path, teacher, buffer, cache, monkeypatch
):
    write, written = latents.SampleStore.write_chunk, []

    def write_and_die(self, index, values):
        write(self, index, values).result()
        written.append(index)
        if len(written) == 1:
            raise Killed

    monkeypatch.setattr(latents.SampleStore, "write_chunk", write_and_die)
    with pytest.raises(Killed):
        encode(tmp_path / "latents", teacher, buffer)
    again = encode(tmp_path / "latents", teacher, buffer)
    assert sorted(written) == list(range(again.num_chunks))  # none twice
    np.testing.assert_array_equal(again.read("mean"), cache.read("mean"))
    frame = MIRRORED.read(buffer, "img", np.array([buffer.n_steps + 5]))
    mean, _ = teacher.vae.encode(teacher.preprocess(jnp.asarray(frame)))
    stored = cache.read("mean", buffer.n_steps + 5, buffer.n_steps + 6)
    np.testing.assert_allclose(stored, mean, atol=5e-3 * float(jnp.abs(mean).max()))


def test_latents_of_another_vae_are_refused(cache, teacher, buffer):
    arrays = surgery.flatten(teacher)
    arrays["vae/quant_conv/bias"] = arrays["vae/quant_conv/bias"] + 1
    other = surgery.replace(teacher, arrays)
    with pytest.raises(UserError, match="vae"):
        encode(cache.folder, other, buffer)


def test_latents_serve_every_decoder(cache, teacher, buffer):
    arrays = surgery.flatten(teacher)
    arrays["vae/decoder/conv_out/bias"] = arrays["vae/decoder/conv_out/bias"] + 1
    same = encode(cache.folder, surgery.replace(teacher, arrays), buffer)
    assert same.samples_done() == cache.num_samples


def test_latents_on_the_disk_are_those_in_memory(cache):
    rows = np.array([[3, 700], [0, 3]])
    held, lazy = latents.Latents.open(cache, 2**30), latents.Latents.open(cache, 0)
    assert lazy.held is None
    for name, x in held.read(rows).items():
        np.testing.assert_array_equal(x, lazy.read(rows)[name])


@pytest.mark.parametrize(
    ("kind", "key", "prefix"),
    [("mar", "model_ema", "model."), ("vae", "state_dict", "vae_model.")],
)
def test_a_published_start_fills_what_fits_and_says_what_did_not(
    tmp_path, teacher, kind, key, prefix
):
    named = {
        k.removeprefix(prefix): v
        for k, v in torch_arrays(surgery.flatten(teacher)).items()
        if k.startswith(prefix)
    }
    left = sorted(named)[0]
    del named[left]
    named["loss.logvar"] = np.zeros(1, np.float32)
    torch_file.write(tmp_path / "start.pth", {key: named})
    fresh = make_policy(dataclasses.replace(CONFIG, task="other"))
    zeros = {k: jnp.zeros_like(v) for k, v in surgery.flatten(fresh).items()}
    filled, said = start_from(zeros, tmp_path / "start.pth", kind)
    assert "loss.logvar" in said and "1 of the policy start from random values" in said
    got = torch_arrays(filled)
    for name, value in named.items():
        if name != "loss.logvar":
            np.testing.assert_array_equal(got[prefix + name].load(), value.load())
    # Arrays that are not trained afterwards must be in the file.
    with pytest.raises(UserError, match="the other 1 .*are not trained and would stay random"):
        start_from(zeros, tmp_path / "start.pth", kind, trained=("other/",))
    # An earlier UVA works too; its normaliser, which belongs to its data, is not taken.
    whole = torch_arrays(surgery.flatten(teacher))
    torch_file.write(tmp_path / "uva.ckpt", {"cfg": {}, "state_dicts": {"ema_model": whole}})
    got, _ = start_from(zeros, tmp_path / "uva.ckpt", kind)
    wanted = surgery.flatten(teacher)
    for path, x in got.items():
        comes = path.startswith("vae/") == (kind == "vae") and not path.startswith("normalizer/")
        np.testing.assert_array_equal(x, wanted[path] if comes else zeros[path], err_msg=path)
    with pytest.raises(UserError, match="no 'model_ema'|no 'state_dict'"):
        torch_file.write(tmp_path / "no.pth", {"other": {}})
        start_from(zeros, tmp_path / "no.pth", kind)


@pytest.fixture(scope="module")
def stage_config(make_config):
    config = make_config(data__mirror="pusht")
    p = config.pretrain
    p.model.update(image_size=16, vae_width=32, vae_multipliers=(1, 1, 1), width=32, depth=1)
    p.model.update(heads=2, dropout=0.0, video_head=(32, 1), action_head=(32, 1))
    p.vae_training.update(steps=2, batch=8, warmup=1, frames=64, decode_every=2)
    p.update(steps=2, batch=8, warmup=1, readout="state", readout_angles=(4,), judge_windows=8)
    p.checkpoint_every, p.score.every = 2, 2
    p.score.update(num_seeds=2, max_steps=8, sampling_steps="2")
    p.save_dtype, p.modes = "bfloat16", {"policy_model": 1.0}
    return config


def test_the_stage_makes_a_policy_that_can_be_a_teacher(stage_config, tmp_path):
    from uva_jax.main import run

    stage_config.pretrain.from_scratch = True
    silently(run, stage_config, str(tmp_path), ["pretrain"])
    folder = tmp_path / "pretrain"
    policy = policy_folder.load_policy(folder / "policy")
    again, _ = convert_checkpoint(folder / "policy.ckpt")
    for path, x in surgery.flatten(policy).items():
        np.testing.assert_array_equal(x, surgery.flatten(again)[path], err_msg=path)
    assert policy.config == again.config
    scored = [line for line in read_metrics(tmp_path, "pretrain") if "policy/score" in line]
    assert [line["step"] for line in scored] == [2] and 0 <= scored[0]["policy/score"] <= 1
    page = (folder / "report.html").read_text()
    assert "Score in rollouts" in page and "Action loss" in page and "after step 2" in page
    done = json.loads((folder / "done.json").read_text())
    assert done["metrics"]["bytes"] < 3 * done["metrics"]["parameters"]
    # Another setting of the policy's training does not rerun the VAE and its latents.
    stage_config = stage_config.copy_and_resolve_references()
    stage_config.pretrain.update(lr=5e-4, progress_share=0.5, progress_start=0.5)
    _, told = silently(run, stage_config, str(tmp_path), ["pretrain"])
    assert "vae: skipped" in told and "encode: skipped" in told
    count = int(re.search(r"(\d+) windows, \d+ held out", told)[1])
    assert f"from step 1 on, training uses the {count // 2} windows" in told
    assert "pretrain: was finished with other settings" in told and "pretrain.lr" in told
    # Another run may start from the VAE's file.
    stage_config.pretrain.vae = str(tmp_path / "vae" / "vae.ckpt")
    stage_config.pretrain.vae_training.steps = 0
    _, told = silently(run, stage_config, str(tmp_path / "other"), ["vae"])
    assert "0 of the policy start from random values" in told
    files = [folder / "vae" / "vae.ckpt" for folder in (tmp_path / "other", tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # A VAE of another architecture without training would leave arrays random.
    stage_config.pretrain.model.update(image_size=32, vae_multipliers=(1, 1, 1, 1))
    with pytest.raises(
        UserError, match=r"vae\.ckpt .* the other .* are not trained and would stay random"
    ):
        silently(run, stage_config, str(tmp_path / "third"), ["vae"])
    assert not (tmp_path / "third" / "vae" / "vae.ckpt").exists()


def test_a_policy_with_every_input_trains_from_nothing(
    make_config, stage_config, tmp_path, monkeypatch
):
    from uva_jax.main import run

    data, vectors = write_recording(tmp_path)
    config = make_config(data__path=str(data), data__image_key="view", data__wrist_key="wrist")
    config.data.language, config.data.max_episodes = str(vectors), 0
    config.pretrain.update(stage_config.pretrain, from_scratch=True, readout="")
    config.pretrain.modes = {"full_dynamic_model": 1.0}
    config.pretrain.save_dtype, config.pretrain.score.every = "float32", 0
    inputs = {"text_dim": 12, "past_actions": True, "states": tuple(ROBOT_STATE), "wrist": True}
    config.pretrain.model.update(task="everything", **inputs)
    read, seen = Windows.read, []

    def reading(self, *args, **how):
        seen.append(read(self, *args, **how))
        return seen[-1]

    monkeypatch.setattr(Windows, "read", reading)
    silently(run, config, str(tmp_path / "run"), ["pretrain"])
    with np.load(vectors) as given:
        told = {tuple(given[task]) for task in TASKS}
    assert {tuple(row) for batch in seen for row in batch["text_latents"]} == told
    (line,) = [x for x in read_metrics(tmp_path / "run", "pretrain") if "policy/loss" in x]
    parts = [line[f"policy/{name}_loss"] for name in ("video", "act", "prop")]
    assert line["policy/loss"] == pytest.approx(sum(parts), rel=1e-5) and min(parts) > 0
    policy, _ = convert_checkpoint(tmp_path / "run" / "pretrain" / "policy.ckpt")
    assert (
        policy.config == policy_folder.load_policy(tmp_path / "run" / "pretrain" / "policy").config
    )
    assert policy.config.proprio_keys == tuple(ROBOT_STATE) and policy.wrist_head is not None
    obs = WindowSpec.of(policy.config)
    assert (obs.text, obs.past_actions, obs.wrist, obs.state_steps) == (True, 16, True, 16)
    # The last layers start at zero, so after two steps an input shows in the tokens alone.
    rng = np.random.default_rng(0)
    obs = {name: rng.uniform(-1, 1, (1, 16, k)) for name, k in ROBOT_STATE.items()}
    obs |= {"past_action": rng.uniform(-1, 1, (1, 16, 10)), "text_latents": np.zeros((1, 12))}
    obs = {name: value.astype(np.float32) for name, value in obs.items()}
    cond = jax.random.normal(jax.random.key(0), policy.latent_shape(1))
    plain = policy.video_tokens(cond, policy.streams(obs, cond))
    for name in obs:
        changed = policy.streams(obs | {name: obs[name] + 1}, cond)
        assert float(jnp.abs(policy.video_tokens(cond, changed) - plain).max()) > 1e-4, name
    other = policy.video_tokens(cond, policy.streams(obs, -cond))
    assert float(jnp.abs(other - plain).max()) > 1e-4


def test_windows_of_more_than_images_are_those_that_the_policy_acts_on(buffer):
    """Past actions and states equal the reader's; targets are the states that follow."""
    mar = dataclasses.replace(CONFIG.mar, history_action=True, proprio_dim=5)
    policy = make_policy(dataclasses.replace(CONFIG, mar=mar, proprio_keys=("state",)))
    data = dataclasses.replace(DATA, mirror="")
    mask, _ = source.split(buffer, data)
    rows = np.arange(32)
    found = Windows(buffer, mask, policy, data, 0).read(rows)
    strips = plan_strips(buffer.episode_ends, mask, strip=1, stride=4, options=data, seed=0)
    wanted = source.single_windows(source.WindowReader(buffer, data, policy).read(strips, rows))
    for name in ("past_action", "action", "state"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    ends, current = buffer.episode_ends, strips.current[rows, 0]
    first, last = np.append(0, ends[:-1])[strips.episode[rows]], ends[strips.episode[rows]] - 1
    following = np.minimum((first + current)[:, None] + np.arange(1, 17), last[:, None])
    np.testing.assert_array_equal(found["state_next"], buffer.read("state")[following])


def test_missing_weights_are_an_error_unless_from_scratch(stage_config, tmp_path):
    from uva_jax.main import run

    stage_config.pretrain.from_scratch = False
    with pytest.raises(UserError, match="from_scratch"):
        run(stage_config, str(tmp_path), ["pretrain"])


def test_without_steps_the_decoder_alone_trains_on(stage_config, checkpoint, tmp_path):
    from uva_jax.main import run

    config = stage_config.copy_and_resolve_references()
    config.pretrain.update(mar=str(checkpoint), steps=0)
    with pytest.raises(UserError, match="decoder_steps"):
        run(config, str(tmp_path / "refused"), ["pretrain"])
    config.pretrain.vae_training.update(steps=0, decoder_steps=2)
    silently(run, config, str(tmp_path), ["pretrain"])
    given = surgery.flatten(stages.rounded(convert_checkpoint(checkpoint)[0])[0])
    found = surgery.flatten(policy_folder.load_policy(tmp_path / "pretrain" / "policy"))
    moved = [path for path, x in found.items() if not np.array_equal(x, given[path])]
    assert moved and all(p.startswith(("vae/decoder/", "vae/post_quant_conv/")) for p in moved)
