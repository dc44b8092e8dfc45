"""Checkpoints of training programs: wrapped keys, sharded and compressed tensors.

torch itself makes the unusual tensors, so that a new way of pickling them fails a test.
"""

import json
import warnings

import numpy as np
import pytest
from hostile_torch import CONFIG, WEIGHT, sound, sound_state

from convert import from_torch, state_dicts
from convert.__main__ import main
from convert.formats import torch_file
from convert.to_torch import plain_cfg
from uva_jax.models import description, surgery
from uva_jax.runtime.errors import UserError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The valid checkpoint, and the arrays of its policy."""
    path = sound(tmp_path_factory.mktemp("plain") / "plain.ckpt")
    return path, surgery.flatten(from_torch.convert_checkpoint(path)[0])


def same(path, wanted, **options) -> dict:
    """Checks that a file holds the same policy; returns the values on its source."""
    policy, info = from_torch.convert_checkpoint(path, **options)
    found = surgery.flatten(policy)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    return info


def saved(path, change, **payload):
    """Saves the valid checkpoint by torch with changed tensors (name -> tensor)."""
    tensors = {name: torch.from_numpy(x) for name, x in sound_state().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of prototypes
        tensors.update(change(tensors))
        payload = {"cfg": plain_cfg(CONFIG), "state_dicts": {"ema_model": tensors}} | payload
        torch.save({k: v for k, v in payload.items() if v is not None}, path)
    return path


# ---- keys ----


def in_the_middle(name: str) -> str:
    """Returns the name that activation checkpointing in FSDP in torch.compile gives a weight."""
    wrapped = "_fsdp_wrapped_module._checkpoint_wrapped_module"
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), 0) + 1
    return ".".join(["_orig_mod", *parts[:at], wrapped, *parts[at:]])


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.module._orig_mod.{name}",
        lambda name: (
            f"model._orig_mod.{name.removeprefix('model.')}" if name.startswith("model.") else name
        ),
        in_the_middle,
        lambda name: f"_forward_module.{name}",
    ],
)
def test_what_wrappers_add_to_keys_is_taken_off(renamed, plain, tmp_path):
    state = {renamed(name): x for name, x in sound_state().items()}
    info = same(sound(tmp_path / "a.ckpt", state), plain[1])
    assert info["wrappers"] and set(info["wrappers"]) <= state_dicts.WRAPPERS


def test_a_compiled_module_gives_such_keys():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    compiled = torch.compile(torch.nn.DataParallel(module)).state_dict()
    assert list(compiled) != list(module.state_dict())
    assert [state_dicts.plain_name(n) for n in compiled] == list(module.state_dict())


def test_names_that_collide_without_wrappers_are_refused(tmp_path):
    state = sound_state()
    state[f"_orig_mod.{WEIGHT}"] = state[WEIGHT]
    with pytest.raises(UserError, match=rf"{WEIGHT} twice, as '{WEIGHT}' and as '_orig_mod"):
        from_torch.convert_checkpoint(sound(tmp_path / "a.ckpt", state))


# ---- tensors ----


def placeholder(shape) -> torch.nn.Parameter:
    """Returns the placeholder of ZeRO-3: an empty parameter with the shape as an attribute."""
    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_shape, parameter.ds_status = shape, 1
    return parameter


@pytest.mark.parametrize(
    ("make", "what", "remedy"),
    [
        (lambda x: x.to_sparse(), "is a sparse tensor", "to_dense()"),
        (lambda x: x.to_sparse_csr(), "is a sparse tensor", "to_dense()"),
        (lambda x: torch.nested.nested_tensor([x, x]), "is a nested tensor", "to_padded_tensor"),
        (lambda x: x.to("meta"), "meta device, without data", "load the weights first"),
        (lambda x: placeholder(x.shape), "ZeRO-3", "zero_to_fp32.py"),
        (lambda x: torch.zeros(0), "ZeRO-3", "zero_to_fp32.py"),
        (lambda x: x.to(torch.float8_e4m3fn), "has dtype float8_e4m3fn", "save as float32"),
        (lambda x: (x * 9).to(torch.int8), "has dtype int8", "dequantise it"),
        (lambda x: x.double() / 3, "is float64 with values that float32 cannot", "tensor.float()"),
        (lambda x: x.to(torch.complex64).conj(), "is made by torch._utils._rebuild", ".clone()"),
    ],
)
def test_a_tensor_that_is_none_is_named_with_the_remedy(make, what, remedy, tmp_path):
    path = saved(tmp_path / "a.ckpt", lambda tensors: {WEIGHT: make(tensors[WEIGHT])})
    with pytest.raises(UserError) as error:
        from_torch.from_torch(path, tmp_path / "policy")
    said = str(error.value)
    assert all(part in said for part in ("a.ckpt", WEIGHT, what, remedy)), said
    assert not (tmp_path / "policy").exists()


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: torch.quantize_per_channel(x, torch.ones(8), torch.zeros(8), 0, torch.quint8),
    ],
)
def test_quantised_tensors_are_named_and_not_called_damage(make, tmp_path):
    path = saved(tmp_path / "a.ckpt", lambda tensors: {WEIGHT: make(tensors[WEIGHT])})
    with pytest.raises(UserError, match=r"holds quantised tensors .*dequantize\(\)"):
        from_torch.convert_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
def test_a_dtensor_is_named(tmp_path):
    tensor = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = tensor.init_device_mesh("cpu", (1,))
        path = saved(
            tmp_path / "a.ckpt",
            lambda t: {WEIGHT: tensor.distribute_tensor(t[WEIGHT], mesh, [tensor.Shard(0)])},
        )
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(UserError, match=r"is a DTensor, sharded .*full_tensor\(\)"):
        from_torch.convert_checkpoint(path)


def test_fsdps_flat_shard_is_named(tmp_path):
    state = sound_state() | {"_fsdp_wrapped_module._flat_param": np.ones(5, np.float32)}
    with pytest.raises(UserError, match="FSDP's shard of many weights in one.*FULL_STATE_DICT"):
        from_torch.convert_checkpoint(sound(tmp_path / "a.ckpt", state))


def test_buffers_parameters_and_tensors_with_attributes_are_tensors(plain, tmp_path):
    def change(tensors):
        names = list(tensors)
        marked = torch.nn.Parameter(tensors[names[1]])
        marked.note = "mine"
        return {names[0]: torch.nn.Buffer(tensors[names[0]]), names[1]: marked}

    same(saved(tmp_path / "a.ckpt", change), plain[1])


def test_float64_that_float32_holds_is_cast(plain, tmp_path):
    def change(tensors):
        return {name: x.double() for name, x in tensors.items()}

    info = same(saved(tmp_path / "a.ckpt", change), plain[1])
    assert set(info["dtypes"]) == {"float64"}


# ---- files without cfg, and contradictions ----


def test_a_state_dict_alone_is_read_with_its_architecture(plain, tmp_path, capsys):
    state = {name: torch.from_numpy(x) for name, x in sound_state().items()}
    (tmp_path / "policy.json").write_text(json.dumps(description.describe(CONFIG, {})))
    (tmp_path / "bare.json").write_text(json.dumps(description.describe(CONFIG, {})["policy"]))
    for number, payload in enumerate((state, {"state_dict": state}, {"module": state, "lr": 1})):
        path = tmp_path / f"{number}.pt"
        torch.save(payload, path)
        same(path, plain[1], weights="model", architecture=CONFIG)
    command = ["from_torch", str(path), str(tmp_path / "policy"), "--weights", "model"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "holds no configuration (cfg)" in said and "--like pusht" in said
    assert main([*command, "--like", "pusht"]) == 2
    assert "cannot be converted" in capsys.readouterr().err  # it is not like that one
    assert main([*command, "--like", "libero"]) == 2
    assert "it can be pusht, pusht_multitask, libero10" in capsys.readouterr().err
    # With it, and then as a checkpoint that says all.
    for name in ("policy.json", "bare.json"):
        assert main([*command, "--architecture", str(tmp_path / name)]) == 0
    assert main(["to_torch", str(tmp_path / "policy"), str(tmp_path / "whole.ckpt")]) == 0
    same(tmp_path / "whole.ckpt", plain[1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not json"),
        ("[1]", "holds no architecture"),
        ('{"mar": {"evil": 1}}', "has no field 'evil'"),
        ('{"n_action_steps": 99}', "n_action_steps is 99, but it must be 1 to 16"),
    ],
)
def test_an_architecture_that_is_none_is_named(content, said, plain, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert main(["inspect", str(plain[0]), "--architecture", str(tmp_path / "a.json")]) == 2
    error = capsys.readouterr().err
    assert said in error and "a.json" in error and error.count("\n") == 1


def test_what_the_cfg_says_otherwise_than_the_tensors_is_told(plain, tmp_path, capsys):
    cfg = plain_cfg(CONFIG)
    policy = cfg["model"]["policy"]
    policy |= {"use_history_action": True, "predict_wrist_img": True, "use_proprioception": None}
    policy["action_model_params"]["predict_action"] = False
    policy["autoregressive_model_params"] |= {"diffloss_act_d": 6, "vae_embed_dim": 16}
    cfg["task"]["dataset"]["language_emb_model"] = "clip"
    cfg["task"]["shape_meta"] = {"action": {"shape": [7]}}
    path = sound(tmp_path / "a.ckpt", cfg=torch_file.records_from_dict(cfg))
    info = same(path, plain[1])
    told = " ".join(info["contradictions"])
    for part in (
        "use_history_action is True, but its tensors hold none",
        "predict_wrist_img is True, but its tensors hold none",
        "predict_action is False, but its tensors hold one",
        "diffloss_act_d is 6, but its tensors say 1",
        "vae_embed_dim is 16, but its tensors say 2",
        "language_emb_model is 'clip', but its tensors take no language",
        "shape_meta.action.shape is [7], but its tensors say [2]",
    ):
        assert part in told
    assert len(info["contradictions"]) == 7
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.count("the tensors are used") == 7
    assert from_torch.convert_checkpoint(plain[0])[1]["contradictions"] == []


def test_arithmetic_of_the_cfg_is_worked_out(plain, tmp_path):
    cfg = plain_cfg(CONFIG)
    cfg["half"] = 4
    cfg["model"]["policy"]["n_action_steps"] = "${eval:'${half} * 2 - 1'}"
    cfg["task"]["latency"] = "${eval:'open(1)'}"  # read by nothing
    path = sound(tmp_path / "a.ckpt", cfg=torch_file.records_from_dict(cfg))
    assert from_torch.convert_checkpoint(path)[0].config.n_action_steps == 7
