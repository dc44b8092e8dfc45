"""The graft works on every variant of policy: language, states, wrist camera, past actions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_policy, silently
from variants import ROBOT_STATE, TASKS, VARIANTS, write_recording

from convert.checks.verify import verify_checkpoint
from convert.describe import as_text, config_file, describe
from convert.formats import torch_file
from convert.from_torch import convert_checkpoint
from convert.state_dicts import state_tensors
from convert.to_torch import export_policy
from uva_jax.data import batch_shapes, source
from uva_jax.data.readers import open_reader
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import write_replay_buffer
from uva_jax.data.umi import absolute_poses
from uva_jax.data.windows import Strips
from uva_jax.graft.capture import capture_strips, latent_arrays, latent_strips
from uva_jax.main import run
from uva_jax.models import policy_folder, surgery
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.settings import section


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Fewer optimisations, because every variant compiles programs that run once or twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("recording"))


@pytest.fixture(scope="module")
def settings(make_config, recorded):
    """f(name=value, ...) -> a configuration for the recording."""
    data, latents = recorded

    def make(**changes):
        wanted = dict(
            data__path=str(data),
            data__image_key="view",
            data__wrist_key="wrist",
            data__language=str(latents),
            data__val_ratio=0.4,
            evaluate__simulator="",
        )
        return make_config(**(wanted | changes))

    return make


def reader_of(policy, config):
    options = section(config.data, source.DataOptions)
    return open_reader(options, policy)


def strips_of(current, episode=0):
    current = np.atleast_2d(current)
    n = len(current)
    return Strips(np.full(n, episode), current, np.zeros(n, bool))


@pytest.mark.parametrize("name", ["libero10", "umi", "toolhang"])
def test_captured_tokens_are_those_of_the_policy_on_each_window(name, settings):
    policy = make_policy(VARIANTS[name])
    reader = reader_of(policy, settings())
    strips = strips_of([[3, 7], [20, 24]])
    batch = reader.read(strips, np.arange(2))
    samples, key = jnp.arange(4).reshape(2, 2), jax.random.key(0)
    found = jax.jit(lambda b: capture_strips(policy, b, samples, key, blocks=False))(dict(batch))
    singles = strips_of([[3], [7], [20], [24]])
    obs = source.single_windows(reader.read(singles, np.arange(4)))
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    eps = {
        name: jnp.stack(
            [
                jax.random.normal(jax.random.fold_in(k, stream), policy.latent_shape(1)[1:])
                for k in keys
            ]
        )
        for name, stream in (("vae_eps", 0), ("wrist_eps", 3))
    }
    z = policy.video_tokens(*policy.condition(obs, **eps))
    np.testing.assert_allclose(found["z"], z, atol=2e-4)
    assert found["actions"].shape == (4, 16, 10)
    np.testing.assert_allclose(found["condition"], policy.action_head.condition(z), atol=2e-4)


@pytest.mark.parametrize("name", ["libero10", "umi", "toolhang"])
def test_a_policy_sees_the_same_in_stored_latents_as_in_frames(name, settings):
    policy = make_policy(VARIANTS[name])
    reader = reader_of(policy, settings())
    batch = reader.read(strips_of([[3, 7], [20, 24]]), np.arange(2))
    singles = source.single_windows(reader.read(strips_of([[3], [7], [20], [24]]), np.arange(4)))
    found = jax.jit(lambda b: latent_strips(policy, b, encode_frames=3))(dict(batch))
    arrays = latent_arrays(policy, batch)
    assert {k: x.shape[1:] for k, x in found.items()} == {k: v[0] for k, v in arrays.items()}
    stored = {k: np.asarray(x).astype(arrays[k][1]) for k, x in found.items()}
    assert not {"image", "wrist_image"} & stored.keys()
    for key in singles.keys() & stored.keys():
        np.testing.assert_array_equal(stored[key], singles[key], err_msg=key)
    condition = jax.jit(lambda obs: policy.condition(obs, key=jax.random.key(2)))
    (latents, streams), (wanted, others) = condition(stored), condition(singles)
    np.testing.assert_allclose(latents, wanted, atol=0.01)  # stored in float16
    assert streams.keys() == others.keys()
    for key, x in others.items():
        np.testing.assert_allclose(streams[key], x, atol=0.01, err_msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_plan_knows_the_shapes_of_what_a_reader_gives(name, settings):
    reader = reader_of(make_policy(VARIANTS[name]), settings())
    strips, states = strips_of([[3, 7], [20, 24]]), VARIANTS[name].proprio_keys

    def facts(batch):
        # A plan knows only the total width of all states.
        return {k: (v.shape[: -1 if k in states else None], v.dtype) for k, v in batch.items()}

    found = reader.read(strips, np.arange(2))
    size = found["image"].shape[2:4]
    planned = batch_shapes.strip_shapes(VARIANTS[name], 2, 2, size)
    assert facts(planned) == facts(found)
    assert sum(planned[k].shape[-1] for k in states) == sum(found[k].shape[-1] for k in states)
    single = source.single_windows(reader.read(strips_of([[3], [7]]), np.arange(2)))
    assert facts(batch_shapes.single_shapes(VARIANTS[name], 2, size)) == facts(single)


def test_every_input_changes_the_tokens(settings):
    policy = make_policy(VARIANTS["everything"])
    reader = reader_of(policy, settings())
    strips = Strips(np.array([0, 1]), np.array([[20], [9]]), np.zeros(2, bool))
    obs = source.single_windows(reader.read(strips, np.arange(2)))
    run_policy = jax.jit(
        lambda obs: policy.video_tokens(*policy.condition(obs, key=jax.random.key(0)))
    )
    z = run_policy(obs)
    assert set(obs) - {"image", "action"} == {
        "wrist_image", "past_action", "text_latents", *VARIANTS["everything"].proprio_keys
    }  # fmt: skip
    for name in set(obs) - {"action"}:
        changed = run_policy(obs | {name: obs[name][::-1]})
        assert np.abs(changed - z).max() > 1e-4, name


def test_windows_hold_the_steps_before_and_after_the_current_one(settings, recorded):
    buffer = ReplayBuffer.open(recorded[0])
    actions, states = buffer.read("action"), buffer.read("robot0_eef_pos")
    strips = strips_of([[20]], episode=1)  # the episode starts at step 40
    for name, offset in (("toolhang", 0), ("umi", 1)):
        reader = reader_of(make_policy(VARIANTS[name]), settings())
        found = reader.read(strips, np.arange(1))
        first = 60 + offset
        want = actions[np.minimum(np.arange(first, first + 16), 74)]
        np.testing.assert_array_equal(found["action"][0, 0], want)
        np.testing.assert_array_equal(found["robot0_eef_pos"][0, 0], states[45:61])
    reader = reader_of(make_policy(VARIANTS["toolhang"]), settings())
    found = reader.read(strips_of([[5]], episode=1), np.arange(1))
    want = actions[np.maximum(np.arange(45 - 16, 45), 40)]
    np.testing.assert_array_equal(found["past_action"][0, 0], want)


def test_umi_recordings_give_poses_relative_to_the_current_one(settings, tmp_path):
    rng = np.random.default_rng(0)
    widths = {
        "robot0_eef_pos": 3,
        "robot0_eef_rot_axis_angle": 3,
        "robot0_gripper_width": 1,
        "robot0_demo_start_pose": 6,
    }
    arrays = {name: rng.uniform(-1, 1, (200, width)) for name, width in widths.items()}
    arrays["view"] = rng.integers(0, 256, (200, 32, 32, 3), np.uint8)
    write_replay_buffer(tmp_path / "umi.zarr", arrays, np.array([200]), tasks=TASKS[:1])
    # The same windows for a policy that does not observe its state.
    blind = dataclasses.replace(
        VARIANTS["umi"], mar=dataclasses.replace(VARIANTS["umi"].mar, proprio_dim=0)
    )
    policy = make_policy(VARIANTS["umi"])
    reader = reader_of(policy, settings(data__path=str(tmp_path / "umi.zarr"), data__layout="umi"))
    assert reader.stride == 12
    found = reader.read(strips_of([[90, 102]]), np.arange(1))
    unseen = type(reader)(reader.buffer, reader.options, make_policy(blind))
    same = unseen.read(strips_of([[90, 102]]), np.arange(1))
    np.testing.assert_array_equal(same["action"], found["action"])
    assert set(same) == {"image", "action", "text_latents"}
    np.testing.assert_array_equal(found["image"][0], arrays["view"][[54, 66, 78, 90, 102]])
    identity = np.array([1, 0, 0, 0, 1, 0], np.float32)
    for k, now in enumerate((90, 102)):
        np.testing.assert_allclose(found["robot0_eef_pos"][0, k, -1], 0, atol=1e-6)
        np.testing.assert_allclose(
            found["robot0_eef_rot_axis_angle"][0, k, -1], identity, atol=1e-6
        )
        pose = np.concatenate([arrays[n][now] for n in list(widths)[:2]])
        back = absolute_poses(found["action"][0, k], pose)
        want = arrays["robot0_eef_pos"][now + 3 * np.arange(1, 17)]  # not shifted: from the next
        np.testing.assert_allclose(back[:, :3, 3], want, atol=1e-5)
        np.testing.assert_allclose(
            found["robot0_gripper_width"][0, k, :, 0],
            arrays["robot0_gripper_width"][now + 3 * np.arange(-15, 1), 0],
            atol=1e-6,
        )


def test_episodes_are_told_their_own_task(settings, recorded):
    reader = reader_of(make_policy(VARIANTS["libero10"]), settings())
    latents = np.load(recorded[1])
    for episode, task in enumerate((TASKS[0], TASKS[1], TASKS[0])):
        found = reader.read(strips_of([[9, 13]], episode), np.arange(1))["text_latents"]
        np.testing.assert_array_equal(found, np.broadcast_to(latents[task], (1, 2, 12)))


def test_the_whole_graft_runs_on_a_policy_with_every_input(settings, tmp_path):
    policy = make_policy(VARIANTS["everything"])
    export_policy(policy, tmp_path / "plain.ckpt")
    # A checkpoint with a language tower and CLIP's vision tower, which no policy keeps.
    payload = dict(torch_file.read(tmp_path / "plain.ckpt").payload)
    vision = np.ones(3, np.float32)
    payload["state_dicts"] = {
        name: {**state, "text_model.vision_model.post_layernorm.weight": vision}
        for name, state in payload["state_dicts"].items()
    }
    torch_file.write(tmp_path / "teacher.ckpt", payload)
    config = settings(
        teacher__checkpoint=str(tmp_path / "teacher.ckpt"),
        finetune__reuse_cache=False,
        finetune__freeze=(),
        finetune__data_fraction=1.0,
        finetune__steps=2,
        finetune__keep_best=False,  # Stage 1's state would not be evaluated again
        distill__epochs=1,
        evaluate__windows=4,
    )
    _, printed = silently(run, config, str(tmp_path / "run"), None)
    assert "graft: on 4 held-out windows" in printed
    graft = policy_folder.load_policy(tmp_path / "run" / "finetune" / "policy")
    assert graft.config.action_head.kind == "grafted" and graft.config.action_head.channels == 10
    before, after = surgery.flatten(policy), surgery.flatten(graft)
    for path in before:
        if path.startswith(("vae/", "mar/encoder_blocks/", "normalizer/", "proprio_head/")):
            np.testing.assert_array_equal(before[path], after[path], err_msg=path)
    exported = tmp_path / "run" / "export" / "grafted.ckpt"
    again = state_tensors(torch_file.read(exported), "ema")
    kept = again["text_model.vision_model.post_layernorm.weight"]
    np.testing.assert_array_equal(kept.numpy(), vision)
    checks = verify_checkpoint(exported, show=lambda line: None)
    assert len(checks) > 60 and all(check.ok for check in checks)
    report = (tmp_path / "run" / "eval" / "report.html").read_text()
    assert "Actions on held-out windows" in report and "Rollouts" not in report


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("toolhang", {"data__wrist_key": ""}, r"config\.data\.wrist_key"),
        ("toolhang", {"data__path": "embedded"}, "robot0_eef_pos.* embedded demonstrations"),
        ("umi", {"data__mirror": "pusht"}, r"config\.data\.mirror"),
        ("toolhang", {"data__mirror": "pusht"}, r"config\.data\.mirror"),
        ("toolhang", {"data__wrist_key": "nope"}, "data/nope"),
    ],
)
def test_data_that_lack_an_input_are_refused(name, changes, words, settings):
    with pytest.raises(UserError, match=words):
        reader_of(make_policy(VARIANTS[name]), settings(**changes))


@pytest.mark.parametrize("field", ["action", *ROBOT_STATE])
def test_a_checkpoint_whose_normalisers_do_not_serve_the_policy_is_refused(field, tmp_path):
    export_policy(make_policy(VARIANTS["toolhang"]), tmp_path / "sound.ckpt")
    payload = dict(torch_file.read(tmp_path / "sound.ckpt").payload)
    # As UVA's training writes it, without this project's description.
    del payload["uva_jax"]
    prefix = f"normalizer.params_dict.{field}."

    def refused(change, words, **more):
        states = {k: change(dict(v)) for k, v in payload["state_dicts"].items()}
        torch_file.write(tmp_path / "bad.ckpt", payload | more | {"state_dicts": states})
        with pytest.raises(UserError, match=words):
            convert_checkpoint(tmp_path / "bad.ckpt")

    def without(state, start=prefix):
        return {k: v for k, v in state.items() if not k.startswith(start)}

    def scaled(values):
        return lambda state: (
            state
            | {
                k: np.full(values.shape, values, np.float32)
                if k.endswith("scale")
                else np.resize(v.numpy(), values.shape)
                for k, v in state.items()
                if k.startswith(prefix)
            }
        )

    width = dict(VARIANTS["toolhang"].normalizer_fields)[field]
    refused(without, f"no normaliser of '{field}'")
    refused(lambda state: without(state, "normalizer."), "no normaliser of 'action'")
    refused(scaled(np.zeros(width)), f"normaliser of '{field}' has scale 0")
    refused(scaled(np.ones(width + 1)), f"{field}.* {width + 1}")
    # What the policy does not read may be anything.
    unread = {
        f"normalizer.params_dict.unread.{k}": np.zeros(3, np.float32)
        for k in (
            "scale",
            "offset",
            *(f"input_stats.{stat}" for stat in ("min", "max", "mean", "std")),
        )
    }
    states = {k: v | unread for k, v in payload["state_dicts"].items()}
    torch_file.write(tmp_path / "good.ckpt", payload | {"state_dicts": states})
    assert convert_checkpoint(tmp_path / "good.ckpt")[0].config.proprio_keys == tuple(ROBOT_STATE)


def test_an_observation_that_lacks_an_input_is_refused():
    policy = make_policy(VARIANTS["libero10"])
    with pytest.raises(UserError, match="also takes text_latents"):
        policy.condition({"image": jnp.zeros((1, 4, 32, 32, 3))}, key=jax.random.key(0))
    with pytest.raises(UserError, match="no image"):
        policy.condition({"text_latents": jnp.zeros((1, 12))}, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "file", "inputs"),
    [
        ("libero10", "libero10", ("language (12)",)),
        ("umi", "umi_multi", ("language (12)", "proprioception (16)")),
        ("toolhang", "toolhang", ("past actions", "proprioception (9)", "wrist camera")),
    ],
)
def test_inspect_names_the_inputs_and_the_configuration(name, file, inputs, tmp_path):
    export_policy(make_policy(VARIANTS[name]), tmp_path / "policy.ckpt")
    found = describe(tmp_path / "policy.ckpt")
    assert found["config_file"] == f"configs/{file}.py" == config_file(VARIANTS[name])
    assert [words for words in inputs if words not in as_text(found)] == []
