"""Hostile and damaged checkpoints run no code and give one sentence that names the file."""

import codecs
import pickle
import random
import struct
import sys
import zipfile

import numpy as np
import pytest
from hostile_files import KINDS, cases, command, hostile_files
from hostile_torch import archive, gadgets, tensor_pickle, text

from convert.formats import torch_file
from convert.formats.pickle_records import Global, Record
from uva_jax.runtime.errors import UserError

RUNNING = "os.system os.exec os.posix_spawn os.fork subprocess.Popen exec compile".split()
_WATCH: dict[str, list] = {}


def _audit(event: str, args: tuple) -> None:
    if "events" in _WATCH and event in RUNNING:
        _WATCH["events"].append((event, args))


sys.addaudithook(_audit)


@pytest.fixture
def nothing_runs(tmp_path):
    """Fails the test if a process, exec or compile was started, or the marker file appeared."""
    for codec in ("cp437", "raw_unicode_escape", "unicode_escape"):
        codecs.lookup(codec)  # zipfile and pickletools import these modules when they need them
    _WATCH["events"] = []
    yield
    assert _WATCH.pop("events") == [] and not (tmp_path / "marker").exists()


def refused(path) -> str:
    """Returns the error for `path`."""
    with pytest.raises(UserError) as caught:
        torch_file.read(path)
    message = str(caught.value)
    assert str(path) in message and message.isprintable()
    return message


@pytest.mark.parametrize("kind", list(gadgets("x")))
def test_no_gadget_runs(kind, tmp_path, nothing_runs):
    path = archive(tmp_path / "bad.ckpt", gadgets(str(tmp_path / "marker"))[kind])
    try:
        checkpoint = torch_file.read(path)
        torch_file.write(tmp_path / "again.ckpt", {"payload": checkpoint.payload})
        torch_file.dump_records(checkpoint.payload)
    except UserError as error:
        assert "bad.ckpt" in str(error)
        return
    with pytest.raises(UserError, match=r"bad\.ckpt"):
        _ = checkpoint.cfg
    assert kind not in ("persistent id", "extension registry", "second state")


def test_a_reduce_method_becomes_a_record_and_stays_one(tmp_path, nothing_runs):
    class Bad:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'marker')!r}, 'w')",), {"state": 1}

    path = archive(tmp_path / "bad.ckpt", pickle.dumps({"a": [Bad()]}, 2))
    record = torch_file.read(path).payload["a"][0]
    assert isinstance(record, Record) and record.function == Global("builtins", "exec")
    assert record.state == {"state": 1}
    again = torch_file.load_records(torch_file.dump_records(record))
    assert (again.function, again.args, again.state) == (record.function, record.args, record.state)


def sample(path):
    """Writes a small checkpoint with tensors, records and nested values."""
    payload = {
        "cfg": torch_file.records_from_dict({"a": 1, "b": {"c": "${a}", "d": [1, "x${b.c}"]}}),
        "state_dicts": {"model": {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}},
        "pickles": {"epoch": b"\x80\x02K\x05."},
        "size": torch_file.Size((3, 4)),
    }
    torch_file.write(path, payload)
    return path.read_bytes()


def tensors(value):
    if isinstance(value, torch_file.LazyTensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def read_all(path, wanted) -> bool:
    """Returns whether the damaged file can still be read; only a UserError may be raised.

    What is read must equal the original content: a checksum finds damage that matters.
    """
    try:
        checkpoint = torch_file.read(path)
        found = [tensor.numpy().tobytes() for tensor in tensors(checkpoint.payload)]
        cfg = checkpoint.cfg
        checkpoint.sha256()
    except UserError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return False
    assert (found, cfg) == wanted
    return True


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_flipped_bytes_are_harmless_or_refused_but_never_run(tmp_path, nothing_runs):
    whole = sample(tmp_path / "good.ckpt")
    good = torch_file.read(tmp_path / "good.ckpt")
    entry = good.archive.entries["data.pkl"]
    wanted = [tensor.numpy().tobytes() for tensor in tensors(good.payload)], good.cfg
    path, rng = tmp_path / "bad.ckpt", random.Random(0)
    outcomes = set()
    for number in range(1500):
        data = bytearray(whole)
        start, size = (entry.offset, entry.size) if number % 3 else (0, len(data))
        for _ in range(rng.choice((1, 1, 3))):
            data[start + rng.randrange(size)] = rng.randrange(256)
        path.write_bytes(data)
        outcomes.add(read_all(path, wanted))
    assert outcomes == {True, False}


def test_every_truncation_is_refused(tmp_path):
    whole = sample(tmp_path / "good.ckpt")
    path = tmp_path / "cut.ckpt"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        message = refused(path)
        if size > 4:
            assert "truncated" in message, size


def test_a_file_cut_while_open_is_one_sentence(tmp_path):
    whole = sample(tmp_path / "good.ckpt")
    checkpoint = torch_file.read(tmp_path / "good.ckpt")
    with open(tmp_path / "good.ckpt", "r+b") as file:
        file.truncate(len(whole) // 3)
    with pytest.raises(UserError, match=r"good\.ckpt ends in the middle"):
        checkpoint.payload["state_dicts"]["model"]["w"].numpy()
    with pytest.raises(UserError, match=r"good\.ckpt ends in the middle"):
        torch_file.write(tmp_path / "b.ckpt", checkpoint.payload)
    assert not (tmp_path / "b.ckpt").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "old PyTorch format"),
        (b"storages".ljust(257, b"\0") + b"ustar\x00".ljust(255), "old PyTorch format"),
        (pickle.dumps({"a": 1}, 2), "bare pickle"),
        (struct.pack("<Q", 2) + b"{}" + bytes(8), "safetensors"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        (b"hello", "is not a PyTorch checkpoint"),
    ],
)
def test_other_formats_are_named(head, says, tmp_path):
    path = tmp_path / "file.ckpt"
    path.write_bytes(head)
    assert says in refused(path)


def test_paths_that_are_no_file_are_named(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.ckpt")
    assert "folder" in refused(tmp_path)


def test_zip_tricks_are_refused(tmp_path):
    good, path = pickle.dumps({}, 2), tmp_path / "bad.ckpt"
    assert "two entries named" in refused(archive(path, good, [("data.pkl", good)]))
    assert "outside its own folder" in refused(archive(path, good, [("!../evil", b"")]))
    assert "outside its own folder" in refused(archive(path, good, [("data/../../evil", b"")]))
    assert "outside its own folder" in refused(archive(path, good, [("!/etc/passwd", b"")]))
    assert "no single data.pkl" in refused(archive(path, good, [("!other/data.pkl", good)]))
    assert "TorchScript" in refused(archive(path, good, [("constants.pkl", good)]))
    bomb = archive(path, bytes(50 << 20), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000 and "compressed" in refused(bomb)
    assert "big-endian" in refused(archive(path, good, byteorder=b"big"))


def test_an_oversized_pickle_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1000)
    assert "the limit is 1000" in refused(archive(tmp_path / "a.ckpt", bytes(2000)))


def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path):
    path, bytes_16 = tmp_path / "a.ckpt", [("data/0", bytes(16))]
    archive(path, tensor_pickle((2, 2), (2, 1)), bytes_16)
    assert torch_file.read(path).payload.numpy().shape == (2, 2)
    lies = {
        "beyond": ((2, 3), (3, 1)),
        "reaches": ((2, 2), (3, 1)),
        "reaches beyond": ((2,), (1,), 3),
        "not whole": ((2,), (-1,), 3),
        "are not whole numbers from 0": ((-2,), (1,)),
        "strides or offset": ((2,), (1,), -1),
        "differ in length": ((2, 2), (1,)),
        "whole numbers": ((1 << 70,), (0,)),
        "is expanded": ((1 << 40,), (0,)),
        "needs 32 bytes": ((2,), (1,), 0, 8),
        "needs -4 bytes": ((2,), (1,), 0, -1),
        "no bytes": ((2,), (1,), 0, 4, "FloatStorage", "../0"),
        "quantised": ((2,), (1,), 0, 4, "QInt8Storage"),
    }
    for says, arguments in lies.items():
        archive(path, tensor_pickle(*arguments), bytes_16)
        assert says.strip() in refused(path), says
    assert "needs 16 bytes" in refused(
        archive(path, tensor_pickle((2, 2), (2, 1)), [("data/0", bytes(15))])
    )


def test_pickle_bombs_are_refused(tmp_path):
    megabyte = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    copies = b"c_codecs\nencode\nq\x00" + megabyte + text("latin1") + b"\x86q\x01]"
    path = tmp_path / "a.ckpt"
    archive(path, b"\x80\x02" + copies + b"h\x00h\x01Ra" * 5000 + b".")
    assert "expand far beyond" in refused(path)
    deep_key = b"\x80\x02})" + b"\x85" * 200_000 + b"Ns."
    assert "too deeply nested" in refused(archive(path, deep_key))
    doubled_key = b"\x80\x02})" + b"q\x00h\x00\x86" * 64 + b"Ns."
    assert "too deeply nested" in refused(archive(path, doubled_key))


def test_endless_nesting_ends_in_a_sentence(tmp_path):
    wrap = b"]q\x00h\x01ah\x00q\x010"  # a new list around the last one
    path = archive(tmp_path / "a.ckpt", b"\x80\x02]q\x01" + wrap * 9000 + b"h\x01.")
    payload = torch_file.read(path).payload
    with pytest.raises(UserError, match="nested too deeply"):
        torch_file.write(tmp_path / "b.ckpt", payload)
    loop: dict = {}
    loop["again"] = loop
    checkpoint = torch_file.read(archive(path, pickle.dumps({"cfg": loop}, 2)))
    with pytest.raises(UserError, match=r"a\.ckpt.*nested without end"):
        _ = checkpoint.cfg


def test_records_hold_no_tensor_data():
    with pytest.raises(UserError, match=r"policy\.json cannot be read.*tensor data"):
        torch_file.load_records(b"\x80\x02" + text("0") + b"Q.", "policy.json")
    with pytest.raises(UserError, match="numpy.ndarray"):
        torch_file.dump_records({"x": np.ones(2)})


# ---- the command line ----


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_refuses_every_file_in_one_sentence(kind, tmp_path):
    files = hostile_files(tmp_path, [kind])
    first = next(files)
    assert command("from_torch", tmp_path / "good.ckpt", tmp_path / "good") == (0, "")
    assert command("inspect", tmp_path / "good.safetensors") == (0, "")
    _WATCH["events"] = []
    for file in (first, *files):
        looked, said = command("inspect", file.path)
        assert looked in (0, 2) and said.count("\n") == (1 if looked else 0), file
        status, said = command("from_torch", file.path, tmp_path / "policy")
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, file
        assert file.path.stem in said and file.said in said, (file, said)
        assert not (tmp_path / "policy").exists(), file
        file.path.unlink()
    # Dataclasses compile their annotations, so only processes count here; exec leaves the marker.
    started = [event for event, _ in _WATCH.pop("events") if event not in ("exec", "compile")]
    assert not started and not (tmp_path / "marker").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_there_are_more_than_a_hundred_hostile_files(tmp_path):
    names = [(kind, name) for kind, made in cases(tmp_path).items() for name, _, _ in made()]
    assert tuple(cases(tmp_path)) == KINDS and len(names) == len(set(names)) >= 150
