"""Export to .safetensors with a json loses nothing, and other programs read the file."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert import from_torch
from convert.__main__ import main
from convert.formats import safetensors_file, torch_file
from uva_jax.models import policy_folder, surgery

torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors.torch")
TEACHER = Path(__file__).parent.parent / "uva_jax" / "assets" / "uva_pusht_tiny.ckpt"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The teacher as a policy folder, and that as teacher.safetensors and teacher.json."""
    folder = tmp_path_factory.mktemp("pair")
    assert main(["from_torch", str(TEACHER), str(folder / "policy")]) == 0
    assert main(["to_torch", str(folder / "policy"), str(folder / "teacher.safetensors")]) == 0
    return folder


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the pair that may be damaged."""
    for name in ("teacher.safetensors", "teacher.json"):
        (tmp_path / name).write_bytes((pair / name).read_bytes())
    return tmp_path / "teacher.safetensors"


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def test_the_library_reads_every_tensor_to_the_bit(pair):
    found = library.load_file(pair / "teacher.safetensors")
    wanted = torch.load(TEACHER, weights_only=False)["state_dicts"]["ema_model"]
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_pair_reads_back_to_the_bit(pair, tmp_path):
    assert main(["from_torch", str(pair / "teacher.safetensors"), str(tmp_path / "policy")]) == 0
    again, first = (
        policy_folder.load_policy(tmp_path / "policy"),
        policy_folder.load_policy(pair / "policy"),
    )
    assert again.config == first.config
    found, wanted = surgery.flatten(again), surgery.flatten(first)
    assert list(found) == list(wanted)
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    assert main(["to_torch", str(tmp_path / "policy"), str(tmp_path / "again.safetensors")]) == 0
    for ending in ("safetensors", "json"):
        again, first = tmp_path / f"again.{ending}", pair / f"teacher.{ending}"
        if ending == "json":  # the origin of the weights differs
            policies = [json.loads(file.read_text())["policy"] for file in (again, first)]
            assert policies[0] == policies[1]
        else:
            assert again.read_bytes() == first.read_bytes()


def test_a_checkpoint_made_from_the_pair_has_a_cfg_that_says_the_same(pair, tmp_path):
    main(["from_torch", str(pair / "teacher.safetensors"), str(tmp_path / "policy")])
    assert main(["to_torch", str(tmp_path / "policy"), str(tmp_path / "a.ckpt")]) == 0
    assert torch_file.read(tmp_path / "a.ckpt").cfg["task"]["name"] == "pusht"


def test_a_file_that_the_library_wrote_is_read(copy, pair):
    tensors = library.load_file(copy)
    library.save_file(tensors, copy)
    described = json.loads(copy.with_suffix(".json").read_text())
    del described["sha256"]
    copy.with_suffix(".json").write_text(json.dumps(described))
    policy, info = from_torch.convert_checkpoint(copy)
    wanted = surgery.flatten(policy_folder.load_policy(pair / "policy"))
    found = surgery.flatten(policy)
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    assert info["dtypes"] == {"float32": 3, "bfloat16": 492}


def test_a_changed_tensor_is_refused_until_the_json_no_longer_states_the_hash(copy, capsys):
    data = bytearray(copy.read_bytes())
    data[-5] ^= 1
    copy.write_bytes(data)
    assert "states another sha256" in refused(capsys, "from_torch", copy, copy.parent / "policy")
    assert not (copy.parent / "policy").exists()
    described = json.loads(copy.with_suffix(".json").read_text())
    del described["sha256"]
    copy.with_suffix(".json").write_text(json.dumps(described))
    assert main(["from_torch", str(copy), str(copy.parent / "policy")]) == 0


def test_a_file_without_its_json_is_refused(copy, capsys):
    copy.with_suffix(".json").unlink()
    assert "lacks teacher.json" in refused(capsys, "inspect", copy)


def test_the_format_and_the_name_must_agree(pair, tmp_path, capsys):
    command = ["to_torch", pair / "policy", tmp_path / "a.ckpt", "--format", "safetensors"]
    assert "end in .safetensors" in refused(capsys, *command)
    command = ["to_torch", pair / "policy", tmp_path / "a.safetensors", "--format", "ckpt"]
    assert "end in .ckpt" in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_a_foreign_json_is_not_replaced(pair, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"mine": 1}')
    said = refused(capsys, "to_torch", pair / "policy", tmp_path / "a.safetensors")
    assert "give" in said and "another name" in said
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_tensors_are_aligned_in_the_file(pair):
    length = int.from_bytes((pair / "teacher.safetensors").read_bytes()[:8], "little")
    assert (8 + length) % 8 == 0
    _, payload = safetensors_file.read(pair / "teacher.safetensors")
    tensors = payload["state_dicts"]["ema_model"].values()
    assert all(t.file_offset % t.dtype.itemsize == 0 for t in tensors)
