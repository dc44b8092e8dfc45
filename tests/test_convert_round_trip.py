"""Conversion of checkpoints to policies and back loses nothing; errors name what does not fit."""

import dataclasses
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from convert import from_torch, infer, rules, to_torch
from convert.__main__ import main
from convert.formats import torch_file
from uva_jax.models import description, policy_folder, surgery
from uva_jax.runtime.errors import UserError

TEACHER = Path(__file__).parent.parent / "uva_jax" / "assets" / "uva_pusht_tiny.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy") / "teacher"
    from_torch.from_torch(TEACHER, out)
    return out


@pytest.fixture(scope="module")
def policy(folder):
    return policy_folder.load_policy(folder)


def bits(tensor):
    return np.ascontiguousarray(tensor.numpy()).tobytes()


def assert_same_tensors(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def rewrite(tmp_path, change, **payload_changes):
    """Writes the teacher with `change` applied to its tensors (a dict of arrays) to a new file.

    The entry with the architecture is left out, so that it is inferred as for an original.
    """
    source = torch_file.read(TEACHER)
    state = OrderedDict((k, v.numpy()) for k, v in source.state_dict("ema_model").items())
    change(state)
    path = tmp_path / "changed.ckpt"
    kept = {k: v for k, v in source.payload.items() if k != "uva_jax"}
    payload = {**kept, "state_dicts": {"ema_model": state}, **payload_changes}
    torch_file.write(path, payload)
    return path


def test_the_teacher_comes_back_to_the_bit(folder, tmp_path):
    to_torch.export_policy(folder, tmp_path / "back.ckpt")
    source, back = torch_file.read(TEACHER), torch_file.read(tmp_path / "back.ckpt")
    assert_same_tensors(back.state_dict("ema_model"), source.state_dict("ema_model"))
    assert back.cfg == source.cfg
    assert back.payload["pickles"] == source.payload["pickles"]


def test_a_policy_in_memory_comes_back_to_the_bit_with_a_base(policy, tmp_path):
    to_torch.export_policy(policy, tmp_path / "back.ckpt", base=TEACHER)
    back, source = torch_file.read(tmp_path / "back.ckpt"), torch_file.read(TEACHER)
    assert_same_tensors(back.state_dict("ema_model"), source.state_dict("ema_model"))


def test_an_export_reads_back_as_the_same_policy(folder, policy, tmp_path):
    to_torch.export_policy(folder, tmp_path / "back.ckpt")
    again, info = from_torch.convert_checkpoint(tmp_path / "back.ckpt")
    assert again.config == policy.config
    assert info["dtypes"] == {"float32": 3, "bfloat16": 492}
    found, wanted = surgery.flatten(again), surgery.flatten(policy)
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


def test_without_a_source_the_cfg_says_the_same_architecture(policy, tmp_path):
    to_torch.export_policy(policy, tmp_path / "plain.ckpt")
    back = torch_file.read(tmp_path / "plain.ckpt")
    shapes = {name: t.shape for name, t in back.state_dict("ema_model").items()}
    assert infer.infer_config(shapes, back.cfg, "plain.ckpt") == policy.config


def test_a_trained_tensor_is_not_rounded_to_the_sources_bfloat16(folder, policy, tmp_path):
    path = "mar/z_proj/bias"
    flat = surgery.flatten(policy)
    flat[path] = flat[path] + 1e-4
    changed = surgery.replace(policy, flat)
    to_torch.export_policy(changed, tmp_path / "a.ckpt", records=policy_folder.read_records(folder))
    state = torch_file.read(tmp_path / "a.ckpt").state_dict("ema_model")
    np.testing.assert_array_equal(state["model.z_proj.bias"].numpy(), flat[path])
    assert state["model.z_proj.weight"].dtype == ml_dtypes.bfloat16


def test_keys_with_a_module_prefix_and_half_precision_are_read(policy, tmp_path):
    def change(state):
        for name in list(state):
            value = state.pop(name)
            half = np.float16 if name.startswith("vae_model.") else value.dtype
            state[f"module.{name}"] = value.astype(half)

    again, info = from_torch.convert_checkpoint(rewrite(tmp_path, change))
    assert again.config == policy.config
    assert info["wrappers"] == ["module"] and info["dtypes"]["float16"] == 308
    found, wanted = (surgery.flatten(p)["mar/z_proj/kernel"] for p in (again, policy))
    np.testing.assert_array_equal(found, wanted)


def test_all_problems_are_reported_together(tmp_path):
    def change(state):
        state["model.unheard_of.weight"] = np.zeros((2, 2), np.float32)
        del state["model.encoder_norm.bias"]
        state["model.encoder_norm.weight"] = np.zeros(3, np.float32)
        state["model.z_proj_ln.bias"] = np.full(128, np.nan, np.float32)
        state["model.z_proj_ln.weight"] = np.zeros(128, np.int64)

    with pytest.raises(UserError) as error:
        from_torch.convert_checkpoint(rewrite(tmp_path, change))
    message = str(error.value)
    assert "5 problem(s)" in message
    for part in (
        "no rule for model.unheard_of.weight",
        "model.encoder_norm.bias is missing",
        "model.encoder_norm.weight has shape (3,), but mar/encoder_norm/scale takes (128,)",
        "model.z_proj_ln.bias has 128 of 128 values that are not finite",
        "model.z_proj_ln.weight has dtype int64",
    ):
        assert part in message


def without(prefixes):
    def change(state):
        for name in [n for n in state if n.startswith(prefixes)]:
            del state[name]

    return change


def test_a_checkpoint_of_video_alone_is_read_but_not_grafted(tmp_path, capsys):
    path = rewrite(tmp_path, without("model.diffactloss."))
    policy, _ = from_torch.convert_checkpoint(path)
    assert policy.action_head is None and policy.video_head is not None
    assert main(["inspect", str(path)]) == 0
    assert "video-only UVA policy for pusht" in capsys.readouterr().out
    with pytest.raises(UserError, match="no MLP action head to graft from, but no action head"):
        from_torch.from_torch(path, tmp_path / "policy", to_graft=True)
    assert not (tmp_path / "policy").exists()
    # And back: a file without the source's cfg says the same.
    to_torch.export_policy(policy, tmp_path / "again.ckpt")
    again, _ = from_torch.convert_checkpoint(tmp_path / "again.ckpt")
    assert again.config == policy.config


def test_a_checkpoint_without_any_head_is_refused(tmp_path):
    path = rewrite(tmp_path, without(("model.diffactloss.", "model.diffloss.")))
    with pytest.raises(UserError, match="neither an action head nor a video head"):
        from_torch.convert_checkpoint(path)


def test_absent_weights_are_an_error_that_says_what_is_there():
    with pytest.raises(UserError, match="no model weights .* ema_model; try --weights ema"):
        from_torch.convert_checkpoint(TEACHER, weights="model")


def test_ignored_tensors_need_the_base_to_come_back(tmp_path):
    def change(state):
        state["text_model.visual_projection.weight"] = np.ones((3, 2), np.float32)

    source = rewrite(tmp_path, change)
    _, info = from_torch.from_torch(source, tmp_path / "policy")
    assert "text_model.visual_projection.weight" in info["ignored"]
    with pytest.raises(UserError, match="give the source as --base"):
        to_torch.export_policy(tmp_path / "policy", tmp_path / "out.ckpt")
    to_torch.export_policy(tmp_path / "policy", tmp_path / "out.ckpt", base=source)
    back = torch_file.read(tmp_path / "out.ckpt").state_dict("ema_model")
    assert_same_tensors(back, torch_file.read(source).state_dict("ema_model"))


# ---- the rule table ----


def test_every_rule_goes_both_ways():
    fill = {"i": "3", "j": "1", "f": "action", "n": "norm_ff", "l": "fc1"}
    for torch_name, flax_path, kind in rules.TABLE:
        for torch_end, flax_end, layout in rules.KINDS[kind]:
            name = (torch_name + torch_end).format(**fill)
            path = (flax_path + flax_end).format(**fill)
            assert rules.to_flax(name) == (path, layout)
            assert rules.to_torch(path) == (name, layout)


SHAPES = {
    "linear": st.tuples(*[st.integers(1, 5)] * 2),
    "conv": st.tuples(*[st.integers(1, 4)] * 4),
    "time_conv": st.tuples(*[st.integers(1, 4)] * 3).map(lambda s: (*s, 1, 1)),
}


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(sorted(SHAPES)), data=st.data())
def test_layouts_are_undone_exactly(kind, data):
    layout = rules.KINDS[kind][0][2]
    array = data.draw(hnp.arrays(np.float32, SHAPES[kind]))
    np.testing.assert_array_equal(layout.inverse(layout.forward(array)), array)


# ---- policy folders ----


def test_a_policy_folder_describes_its_source(folder):
    described = json.loads((folder / "policy.json").read_text())
    assert described["format"] == description.FORMAT
    assert described["source"]["checkpoint"] == TEACHER.name
    assert described["source"]["weights"] == "ema"


def test_a_folder_whose_arrays_do_not_fit_names_them(policy, tmp_path):
    mar = dataclasses.replace(policy.config.mar, encoder_depth=4, action_dim=3)
    policy_folder.save_policy(tmp_path / "p", policy, source={})
    described = json.loads((tmp_path / "p" / "policy.json").read_text())
    described["policy"]["mar"] = dataclasses.asdict(mar)
    (tmp_path / "p" / "policy.json").write_text(json.dumps(described))
    with pytest.raises(UserError) as error:
        policy_folder.load_policy(tmp_path / "p")
    message = str(error.value)
    assert str(tmp_path / "p") in message
    assert "mar/encoder_blocks/3/attn/qkv/kernel is missing" in message
    assert "mar/action_proj_cond/kernel has shape (2, 128), not (3, 128)" in message


def test_replace_refuses_another_dtype_and_unknown_paths(policy):
    flat = surgery.flatten(policy)
    flat["mar/z_proj/bias"] = flat["mar/z_proj/bias"].astype(jnp.bfloat16)
    flat["mar/nonsense"] = jnp.zeros(1)
    with pytest.raises(UserError, match="mar/nonsense is unknown.*has dtype bfloat16"):
        surgery.replace(policy, flat)


def test_saving_does_not_replace_foreign_files(policy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a policy"):
        policy_folder.save_policy(tmp_path, policy, source={})
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---- the command line ----


def test_commands_convert_and_export(tmp_path, capsys):
    policy, out = str(tmp_path / "policy"), str(tmp_path / "out.ckpt")
    assert main(["from_torch", str(TEACHER), policy]) == 0
    assert main(["to_torch", policy, out]) == 0
    assert capsys.readouterr().out.count("495 tensors") == 2


def test_inspect_says_what_a_checkpoint_is(tmp_path, capsys):
    path = rewrite(tmp_path, lambda state: None, pickles={"global_step": pickle.dumps(10065)})
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("for pusht", "configs/pusht_tiny.py", "conv_fc: 3 blocks x 256", "0 .. 512"):
        assert part in text
    assert main(["inspect", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["VAE"]["parameters"] == 1_234_227
    assert found["progress"]["global_step"] == 10065
    assert list(found["state_dicts"]) == ["ema_model"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "nowhere.ckpt"], "does not exist"),
        (["from_torch", "nowhere.ckpt", "out"], "does not exist"),
        (["from_torch", str(TEACHER), "out", "--weights", "model"], "no model weights"),
        (["to_torch", "nowhere", "out.ckpt"], "is not a policy folder"),
        (["verify", "--fixtures", "nowhere"], "holds no .npz file"),
        (["verify"], "give verify either a checkpoint or --fixtures"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
