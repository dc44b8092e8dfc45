"""Hashes of external files and the JSON records of a stage."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain_tiny
from uva_jax.pipeline.inputs import graft_data, recording
from uva_jax.runtime.errors import UserError
from uva_jax.storage.atomic import read_json, write_json
from uva_jax.storage.identity import Identity, Part, external_hash, hash_arrays, hash_json


def test_the_hash_of_values_depends_on_neither_the_order_of_keys_nor_their_types():
    assert hash_json({"a": (1, 2.0), "b": None}) == hash_json({"b": None, "a": [1, np.float64(2)]})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
    # Finished stages of earlier versions are known by this hash.
    said = "dd5b7385b29d0ff6d79b01eec5530781e4ee75ce6228a069af309103252c3644"
    assert Identity({"head.depth": 3, "x": ["a"]}, {"convert": "ab"}).hash == said


def test_the_hash_of_arrays_depends_on_names_dtypes_shapes_and_values():
    x = np.arange(6, dtype=np.float32)
    same = {"b": x, "a": x.reshape(2, 3)}
    first = hash_arrays(same)
    assert hash_arrays({"a": jnp.asarray(x).reshape(2, 3), "b": np.repeat(x, 2)[::2]}) == first
    others = [same | {"a": x}, same | {"b": x + 1}, same | {"b": x.view(np.int32)}, {"a": x}]
    others += [{"b": x, "c": x.reshape(2, 3)}, same | {"b": jnp.asarray(x, jnp.bfloat16)}]
    assert len({first, *map(hash_arrays, others)}) == 1 + len(others)


def test_external_hash_reads_an_unchanged_file_once(tmp_path, monkeypatch):
    path = tmp_path / "big.ckpt"
    path.write_bytes(b"weights")
    os.utime(path, (1e9, 1e9))
    first = external_hash(path, tmp_path)
    path.write_bytes(b"WEIGHTS")  # same size and time, so the change cannot be noticed
    os.utime(path, (1e9, 1e9))
    assert external_hash(path, tmp_path) == first
    os.utime(path, (2e9, 1e9 + 1))
    assert external_hash(path, tmp_path) != first


def test_external_hash_of_a_file_just_written_is_not_trusted_by_its_time(tmp_path):
    path = tmp_path / "fresh"
    path.write_bytes(b"a")
    stat = path.stat()
    first = external_hash(path, tmp_path)
    path.write_bytes(b"b")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert external_hash(path, tmp_path) != first


def test_external_hash_of_a_folder_depends_on_names_and_contents(tmp_path):
    folder = tmp_path / "data.zarr"
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "0").write_bytes(b"a")
    hashes = {external_hash(folder, tmp_path)}
    (folder / "img" / "0").rename(folder / "img" / "1")
    hashes.add(external_hash(folder, tmp_path))
    (folder / "img" / "1").write_bytes(b"b")
    hashes.add(external_hash(folder, tmp_path))
    assert len(hashes) == 3


def test_of_a_part_only_what_counts_is_opened(tmp_path):
    folder = tmp_path / "data.zarr"
    for name in ("data/img/0", "data/depth/0", "meta/ends/0"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"a")
    part = Part(folder, "data", ("img",))
    first = external_hash(part, tmp_path)
    (folder / "data/depth/0").write_bytes(b"b")
    os.mkfifo(folder / "data/depth/1")
    assert external_hash(part, tmp_path) == first
    for name in ("data/img/0", "meta/ends/0"):
        (folder / name).write_bytes(b"b")
        assert external_hash(part, tmp_path) != first
        first = external_hash(part, tmp_path)
    assert str(part) == str(folder)


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_recording_counts_by_the_arrays_that_are_read(tmp_path):
    config = pretrain_tiny.get_config()
    config.data.path = str(tmp_path / "a.zarr")
    config.pretrain.model.update(wrist=True, states=("pose",))
    config.data.wrist_key = "wrist"
    assert graft_data(config)["data"].members == ("action", "img")
    assert recording(config)["data"].members == ("action", "img", "pose", "state", "wrist")
    config.teacher.checkpoint = str(tmp_path / "no.ckpt")
    assert graft_data(config)["data"] == config.data.path  # all of it: the stage will tell
    (tmp_path / "a.zarr/meta").mkdir(parents=True)
    (tmp_path / "a.zarr/meta/info.json").write_text("{}")
    with pytest.raises(UserError, match="holds a LeRobot data set"):
        graft_data(config)
