"""Checkpoints are read without torch, bit for bit, and written so that torch reads them back."""

import argparse
import errno
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from importlib import resources
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.formats import arithmetic, torch_file
from convert.formats.omegaconf_records import to_plain
from convert.formats.torch_file import LazyTensor, Record
from uva_jax.runtime.errors import UserError

torch = pytest.importorskip("torch")

TINY = Path(str(resources.files("uva_jax.assets") / "uva_pusht_tiny.ckpt"))
DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 "
    "uint16 uint32 uint64 float8_e4m3fn float8_e5m2"
).split()


def tensor_bytes(tensor) -> bytes:
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(ours: object, theirs: object, where: str = "payload") -> int:
    """Compares a payload that was read here with torch's; returns the number of tensors."""
    if isinstance(ours, LazyTensor):
        array = ours.numpy()
        assert array.shape == tuple(theirs.shape) == ours.shape, where
        assert str(theirs.dtype) == f"torch.{array.dtype.name}", where
        assert array.tobytes() == tensor_bytes(theirs), where
        return 1
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        return sum(assert_same(ours[k], theirs[k], f"{where}.{k}") for k in ours)
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        return sum(assert_same(a, b, where) for a, b in zip(ours, theirs, strict=True))
    if not isinstance(ours, Record):
        assert type(ours) is type(theirs) and ours == theirs, where
    return 0


def torch_load(path: Path) -> object:
    return torch.load(path, weights_only=False)


def typed(value: object) -> object:
    """Returns `value` with the type of every leaf, because 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {k: typed(v) for k, v in value.items()}
    return [typed(v) for v in value] if isinstance(value, list) else (type(value), value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The embedded weights, saved as upstream's workspace does and read here and by torch.

    The file has interpolations in the configuration and values pickled by dill.
    """
    omegaconf, dill = pytest.importorskip("omegaconf"), pytest.importorskip("dill")
    payload = torch_load(TINY)
    del payload["uva_jax"]
    cfg = omegaconf.OmegaConf.to_container(payload["cfg"])
    cfg["task"]["shape_meta"] = {"action": {"shape": [2]}, "obs": {"image": {"shape": [3, 96, 96]}}}
    cfg["model"]["policy"]["shape_meta"] = "${task.shape_meta}"
    payload["cfg"] = omegaconf.OmegaConf.create(cfg)
    payload["pickles"] = {"global_step": dill.dumps(11000), "epoch": dill.dumps(3)}
    path = tmp_path_factory.mktemp("upstream") / "latest.ckpt"
    torch.save(payload, path, pickle_module=dill)
    return torch_file.read(path), torch_load(path)


def test_the_shipped_teacher_is_read_as_torch_reads_it():
    pytest.importorskip("omegaconf")
    assert assert_same(torch_file.read(TINY).payload, torch_load(TINY)) == 495


def test_upstreams_file_reads_bit_for_bit_as_torch_reads_it(tiny):
    ours, theirs = tiny
    assert assert_same(ours.payload, theirs) == 495
    assert ours.state_dict("ema_model") is ours.payload["state_dicts"]["ema_model"]
    assert ours.state_dict_names == ("ema_model",)


def test_upstreams_file_survives_writing(tiny, tmp_path):
    ours, theirs = tiny
    path = tmp_path / "again.ckpt"
    torch_file.write(path, ours.payload)
    back = torch_load(path)
    assert assert_same(ours.payload, back) == 495
    assert assert_same(torch_file.read(path).payload, theirs) == 495
    assert back["cfg"] == theirs["cfg"] and back["pickles"] == theirs["pickles"]
    assert os.listdir(tmp_path) == ["again.ckpt"]


def test_the_teachers_configuration_resolves_as_omegaconf_resolves_it(tiny):
    ours, theirs = tiny
    from omegaconf import OmegaConf

    assert typed(ours.cfg) == typed(OmegaConf.to_container(theirs["cfg"], resolve=True))


def test_configuration_and_pickles_can_be_kept_without_their_source(tiny, tmp_path):
    ours, theirs = tiny
    kept = torch_file.dump_records({k: ours.payload[k] for k in ("cfg", "pickles")})
    torch_file.write(tmp_path / "a.ckpt", torch_file.load_records(kept))
    back = torch_load(tmp_path / "a.ckpt")
    assert back == {k: theirs[k] for k in ("cfg", "pickles")}
    dill = pytest.importorskip("dill")
    assert dill.loads(back["pickles"]["global_step"]) == 11000


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_goes_both_ways(dtype, tmp_path):
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 48, np.uint8)
    tensor = torch.from_numpy(raw).view(getattr(torch, dtype))
    path, again = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"x": tensor}, path)
    ours = torch_file.read(path).payload
    assert assert_same(ours, {"x": tensor}) == 1
    torch_file.write(again, {"x": ours["x"], "y": ours["x"].numpy()})
    assert assert_same({"x": ours["x"], "y": ours["x"]}, torch_load(again)) == 2


@pytest.mark.parametrize("module", ["pickle", "dill"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_and_views_are_read_and_written(module, protocol, tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    payload = {
        "views": [base, base[1:], base.transpose(0, 2), base[:, ::2, 1::3], base[0, 0, 3]],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[2].clone()),
        "model": model.state_dict(),
        "plain": [1, -1, 300, 70000, -(2**40), 2**600, 1.5, float("inf"), True, None, "é", ()],
        "bytes": [b"", b"\x00\xff", bytearray(b"ab"), 1 + 2j, {1, 2}, frozenset("a")],
        "keys": {(1, "a"): 1, 2: {"x": (1, 2, 3, 4)}},
        "size": base.shape,
    }
    pickle_module = pytest.importorskip(module)
    path, again = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(payload, path, pickle_module=pickle_module, pickle_protocol=protocol)
    ours = torch_file.read(path).payload
    torch_file.write(again, ours)
    back = torch_load(again)
    for theirs in (payload, back):
        size = theirs.pop("size")
        assert type(size) is torch.Size and ours["size"] == tuple(size)
        assert assert_same({k: v for k, v in ours.items() if k != "size"}, theirs) == 16
        assert isinstance(theirs["parameter"], torch.nn.Parameter)
        assert theirs["model"]._metadata == model.state_dict()._metadata
    assert all(t.is_contiguous() for t in back["views"])


def test_tensors_that_share_memory_still_share_it(tmp_path):
    weight = torch.randn(100, 100)
    torch.save({"a": weight, "b": weight, "c": weight[:50]}, tmp_path / "a.pt")
    ours = torch_file.read(tmp_path / "a.pt").payload
    assert ours["a"].storage is ours["b"].storage is ours["c"].storage
    torch_file.write(tmp_path / "b.pt", ours)
    back = torch_load(tmp_path / "b.pt")
    assert back["a"].data_ptr() == back["b"].data_ptr()
    assert (tmp_path / "b.pt").stat().st_size < 70_000


def test_cycles_and_shared_values_come_back_as_such():
    value = {"list": [1]}
    value["same"], value["self"] = value["list"], value
    pair = ([],)
    pair[0].append(pair)
    value["pair"] = pair
    for back in (
        torch_file.load_records(torch_file.dump_records(value)),
        pickle.loads(torch_file.dump_records(value)),
    ):
        assert back["same"] is back["list"] and back["self"] is back
        assert back["pair"][0][0] is back["pair"]


def test_numpy_arrays_become_tensors(tmp_path):
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = OrderedDict(
        plain=grid,
        transposed=grid.T[::2],
        big_endian=grid.astype(">f4"),
        scalar=np.float32(2) * np.ones(()),
        half=grid.astype(ml_dtypes.bfloat16),
    )
    arrays["scalar"] = np.asarray(arrays["scalar"], np.float64)
    torch_file.write(tmp_path / "a.pt", arrays)
    back = torch_load(tmp_path / "a.pt")
    assert type(back) is OrderedDict
    for name, array in arrays.items():
        assert np.array_equal(back[name].float().numpy(), array.astype(np.float32)), name
    assert back["half"].dtype == torch.bfloat16
    assert torch.load(tmp_path / "a.pt", weights_only=True, mmap=True).keys() == back.keys()


def test_namespaces_and_other_layouts_are_plain_payload_access(tmp_path):
    payload = {"model_ema": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.5, name="mar")}
    torch.save(payload, tmp_path / "a.pth")
    checkpoint = torch_file.read(tmp_path / "a.pth")
    assert checkpoint.payload["args"].state == {"lr": 0.5, "name": "mar"}
    assert checkpoint.payload["args"].name == "Namespace"
    assert checkpoint.payload["model_ema"]["w"].numpy().tolist() == [1, 1]
    with pytest.raises(UserError, match=r"a\.pth has no state dict 'model'"):
        checkpoint.state_dict("model")
    with pytest.raises(UserError, match=r"a\.pth holds no configuration"):
        _ = checkpoint.cfg


def test_the_written_layout_is_torchs(tmp_path):
    arrays = {"a": np.ones(3), "b": np.ones((5, 7), np.int8)}
    torch_file.write(tmp_path / "a.pt", arrays)
    content = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        names = {n.removeprefix("archive/"): archive.read(n) for n in archive.namelist()}
    assert (names["version"], names["byteorder"]) == (b"3\n", b"little")
    assert len(names[".data/serialization_id"]) == 40
    for entry in torch_file.read(tmp_path / "a.pt").archive.entries.values():
        assert entry.offset % 64 == 0
    torch_file.write(tmp_path / "b.pt", arrays)
    assert (tmp_path / "b.pt").read_bytes() == content


def test_a_file_can_be_written_over_the_one_it_is_read_from(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"x": torch.arange(5), "y": torch.arange(9.0)}, path)
    ours = torch_file.read(path)
    before = ours.sha256()
    torch_file.write(path, {"y": ours.payload["y"]})
    assert torch_load(path)["y"].tolist() == list(range(9))
    assert ours.payload["x"].numpy().tolist() == list(range(5)) and ours.sha256() == before


def test_a_full_disk_or_no_folder_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.pt was not written: the disk is full"):
        torch_file.write(path, {"x": np.ones(3)})
    assert os.listdir(tmp_path) == ["a.pt"] and path.read_bytes() == b"old"
    for nowhere in (tmp_path / "no" / "b.pt", path / "b.pt"):
        with pytest.raises(UserError, match=r"b\.pt was not written: the file cannot be written"):
            torch_file.write(nowhere, {})


@pytest.mark.parametrize(
    ("value", "named"), [(object(), "object"), (np.float32(1), "float32"), (np.array("a"), "<U1")]
)
def test_what_cannot_be_written_is_named(value, named, tmp_path):
    with pytest.raises(UserError, match=rf"a\.pt cannot be written.*{named}"):
        torch_file.write(tmp_path / "a.pt", {"x": value})
    assert not os.listdir(tmp_path)


def test_reading_imports_neither_torch_nor_omegaconf():
    code = (
        "import sys\nfrom convert.formats import torch_file\n"
        f"c = torch_file.read({str(TINY)!r})\nc.cfg\n"
        "next(iter(c.state_dict('ema_model').values())).numpy()\n"
        "assert not {'torch', 'omegaconf', 'dill', 'jax'} & set(sys.modules), sys.modules"
    )
    root = Path(torch_file.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


CONFIG = {
    "task": {"name": "pusht", "horizon": 16, "obs": {"shape": [3, 96, "${.0}"]}},
    "lr": 1e-4,
    "ema": True,
    "none": None,
    "key": "horizon",
    "policy": {
        "horizon": "${task.horizon}",
        "steps": "${.horizon}",
        "shape": "${task.obs}",
        "last": "${.shape.shape[2]}",
        "inner": {"lr": "${...lr}", "up": "${..steps}"},
        "name": "train_${task.name}_${..ema}_${lr}_${none}",
        "by_key": "${task.${key}}",
    },
    "again": "${policy}",
    "digits": "007",
    "format": "epoch={epoch:04d}.ckpt",
}


def test_a_plain_configuration_becomes_one_that_omegaconf_loads():
    omegaconf = pytest.importorskip("omegaconf")
    data = torch_file.dump_records(torch_file.records_from_dict(CONFIG))
    real = pickle.loads(data)
    assert real == omegaconf.OmegaConf.create(CONFIG)
    assert real.policy.inner.up == 16 and real.policy.last == 3
    real.merge_with({"lr": 1.0})
    real.policy.shape.shape.append(4)
    resolved = to_plain(torch_file.records_from_dict(CONFIG), "a.ckpt")
    theirs = omegaconf.OmegaConf.create(CONFIG)
    assert typed(resolved) == typed(omegaconf.OmegaConf.to_container(theirs, resolve=True))
    with pytest.raises(UserError, match=r"cfg\.a\[0\] is a builtins\.set"):
        torch_file.records_from_dict({"a": [{1}]})


# Expressions of UVA's configurations, and others.
EVALUATED = {
    "a": 0.125,
    "b": {"hz": 60, "wait": "${eval:'(${a} - 0.025) * ${b.hz}'}"},
    "frames": '${eval:"ListConfig(list(range(-12, 17, 4)))"}',
    "relative": "${eval:'${.a} * 8'}",
    "text": "n${eval:1 + 1}m",
    "power": "${eval:'2**10'}",
    "choice": "${eval:\"3 if '${name}' == 'pusht' else 4\"}",
    "through": "${b.wait}",
    "name": "pusht",
}


def test_arithmetic_in_eval_comes_out_as_omegaconf_has_it():
    omegaconf = pytest.importorskip("omegaconf")
    names = {"ListConfig": omegaconf.ListConfig}
    omegaconf.OmegaConf.register_new_resolver("eval", lambda e: eval(str(e), names), replace=True)
    try:
        theirs = omegaconf.OmegaConf.create(EVALUATED)
        wanted = omegaconf.OmegaConf.to_container(theirs, resolve=True)
    finally:
        omegaconf.OmegaConf.clear_resolver("eval")
    wanted["frames"] = list(wanted["frames"])
    assert typed(to_plain(EVALUATED, "a.ckpt")) == typed(wanted)


@pytest.mark.parametrize(
    "expression",
    [
        *("__import__('os').getcwd()", "(1).__class__", "lambda: 1", "[x for x in (1,)]", "nan"),
        *("9**9**9", "'a' * 10**9", "[0] * 10**9", "range(10**9)", "1 / 0", "f'{1}'", "(" * 3000),
    ],
)
def test_eval_runs_nothing_but_arithmetic(expression):
    with pytest.raises(ValueError):
        arithmetic.evaluate(expression)


def test_interpolations_that_lead_nowhere_stay_as_text():
    config = {
        "missing": "???",
        "a": "${b}",
        "b": "${nothing.here}",
        "eval": "${eval:'print(1)'}",
        "to_missing": "${missing}",
        "circle": {"x": "${circle}"},
        "open": "${b",
        "mixed": "${oc.env:HOME} of ${missing}",
    }
    resolved = to_plain(config, "a.ckpt")
    assert {k: v for k, v in resolved.items() if k not in ("a", "circle")} == {
        k: v for k, v in config.items() if k not in ("a", "circle")
    }
    assert resolved["circle"] == {"x": {"x": "${circle}"}}
    bomb = {f"a{i}": f"${{a{i + 1}}}" * 2 for i in range(60)} | {"a60": "x"}
    with pytest.raises(UserError, match=r"a\.ckpt.*expands to too many values"):
        to_plain(bomb, "a.ckpt")
