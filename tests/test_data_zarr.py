"""Zarr files of other programs: versions, codecs, missing chunks; and files that are not zarr."""

import bz2
import json
import lzma
import shutil
import sys
import types
import zipfile
import zlib
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tensorstore as ts

from uva_jax.cli.import_recordings import main
from uva_jax.data.import_recordings import open_hdf5
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.replay_writer import write_replay_buffer
from uva_jax.runtime.errors import UserError

STEPS = 60
ENDS = np.array([25, STEPS])
IMAGES = np.random.default_rng(0).integers(0, 256, (STEPS, 20, 20, 3), np.uint8)
STATE = np.round(np.random.default_rng(1).normal(size=(STEPS, 4)), 1).astype(np.float32)
BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}


def write_v2(folder, name, values, compressor=None, chunk=None, **metadata):
    """Writes an array as zarr-python 3 does: chunks of only the fill value are left out."""
    given = {
        "shape": list(values.shape),
        "chunks": [chunk or len(values), *values.shape[1:]],
        "dtype": values.dtype.str,
        "compressor": compressor,
        "fill_value": 0,
        **metadata,
    }
    spec = {"driver": "zarr", "kvstore": f"file://{folder}/{name}/", "metadata": given}
    ts.open(spec, create=True).result().write(values).result()
    return folder


def change(file, **members):
    """Changes members of a file of metadata."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **members}))
    return file.read_bytes()


@pytest.fixture
def buffer(tmp_path):
    """A folder with images in 12 chunks, a state and the episodes' ends."""
    folder = tmp_path / "b.zarr"
    write_v2(folder, "meta/episode_ends", ENDS)
    write_v2(folder, "data/state", STATE, BLOSC, chunk=20)
    return write_v2(folder, "data/img", IMAGES, chunk=5)


def zip_up(folder):
    with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, f"inner/{file.relative_to(folder)}")
    return f"{folder}.zip"


def check_state(path):
    found = ReplayBuffer.open(path, required=("state",))
    assert found.episode_ends.tolist() == ENDS.tolist() and found.dtype("state") == np.float32
    np.testing.assert_array_equal(found.read("state"), STATE)
    rows = np.array([[59, 0], [19, 20]])
    np.testing.assert_array_equal(found.read_rows({"state": rows})["state"], STATE[rows])


@pytest.mark.parametrize(
    ("written", "noted"),
    [
        ({"id": "zstd", "level": 3}, {"id": "zstd", "level": 3, "checksum": True}),
        ({"id": "zlib", "level": 6}, {"id": "zlib", "level": -1}),
        ({"id": "gzip", "level": 6}, {"id": "gzip", "level": 6, "mtime": 0}),
        ({"id": "bz2", "level": 1}, {"id": "bz2"}),
        (BLOSC, {**BLOSC, "typesize": 4, "nthreads": 8}),
    ],
)
def test_settings_that_only_an_encoder_needs_do_no_harm(buffer, written, noted):
    write_v2(buffer, "data/new", STATE, written, chunk=20)
    (buffer / "data/new").rename(buffer / "state2")
    for file in (buffer / "state2").iterdir():
        file.rename(buffer / "data/state" / file.name)
    file = buffer / "data/state/.zarray"
    content = change(file, compressor=noted, filters=[], fill_value=0, attributes={})
    check_state(buffer)
    check_state(zip_up(buffer))
    assert file.read_bytes() == content


def test_a_fill_value_may_be_noted_as_another_type(buffer):
    change(buffer / "data/img/.zarray", fill_value=0.0)
    (buffer / "data/img/3.0.0.0").unlink()
    assert not ReplayBuffer.open(buffer).read("img", 15, 20).any()
    change(buffer / "data/state/.zarray", fill_value="NaN")
    check_state(buffer)


DELTA = {"id": "delta", "dtype": "<f4", "astype": "<f4"}
SCALE = {"id": "fixedscaleoffset", "scale": 10, "offset": 1, "dtype": "<f4", "astype": "<i2"}
RAW = [{"id": lzma.FILTER_DELTA, "dist": 4}, {"id": lzma.FILTER_LZMA2, "preset": 1}]
CODECS = {
    "lz4": ({"id": "lz4", "acceleration": 1}, lambda x: imagecodecs.lz4_encode(x, header=True)),
    "lzma": ({"id": "lzma", "format": 1, "check": -1, "filters": None}, lzma.compress),
    "lzma, raw": (
        {"id": "lzma", "format": lzma.FORMAT_RAW, "filters": RAW},
        lambda x: lzma.compress(x, lzma.FORMAT_RAW, filters=RAW),
    ),
    "delta, blosc": ([DELTA, BLOSC], lambda x: imagecodecs.blosc_encode(difference(x))),
    "delta, zstd": ([DELTA, {"id": "zstd"}], lambda x: imagecodecs.zstd_encode(difference(x))),
    "delta": ([DELTA, None], lambda x: difference(x)),
    "scale, zlib": (
        [SCALE, {"id": "zlib"}],
        lambda x: zlib.compress(np.rint((np.frombuffer(x, "<f4") - 1) * 10).astype("<i2")),
    ),
    "astype": (
        [{"id": "astype", "encode_dtype": "<f8", "decode_dtype": "<f4"}, None],
        lambda x: np.frombuffer(x, "<f4").astype("<f8").tobytes(),
    ),
    "quantize, bz2": (
        [{"id": "quantize", "digits": 1, "dtype": "<f4", "astype": "<f4"}, {"id": "bz2"}],
        bz2.compress,
    ),
    "bitround, shuffle": (
        [{"id": "bitround", "keepbits": 23}, {"id": "shuffle", "elementsize": 4}, None],
        lambda x: np.frombuffer(x, np.uint8).reshape(-1, 4).T.tobytes(),
    ),
    "crc32": ([{"id": "crc32"}, None], lambda x: zlib.crc32(x).to_bytes(4, "little") + x),
}


def difference(data):
    values = np.frombuffer(data, "<f4")
    return np.concatenate([values[:1], np.diff(values)]).tobytes()


def store_by(buffer, codecs, encode):
    """Rewrites the state's chunks of 20 steps in another codec."""
    codecs = codecs if isinstance(codecs, list) else [codecs]
    file = buffer / "data/state/.zarray"
    change(file, compressor=codecs[-1], filters=codecs[:-1] or None)
    for number in range(3):
        part = STATE[20 * number : 20 * number + 20]
        (buffer / f"data/state/{number}.0").write_bytes(encode(part.tobytes()))


@pytest.mark.parametrize("name", CODECS)
def test_codecs_that_tensorstore_lacks_are_undone(buffer, name):
    store_by(buffer, *CODECS[name])
    for path in (buffer, zip_up(buffer)):
        found = ReplayBuffer.open(path).read("state")
        np.testing.assert_allclose(found, STATE, atol=1e-6)  # delta rounds
    (buffer / "data/state/1.0").write_bytes(b"\x01\x00\x00\x00?")
    with pytest.raises(UserError, match="chunk 1.0 of data/state is damaged"):
        ReplayBuffer.open(buffer).read("state")


def test_other_codecs_are_left_to_numcodecs_and_named_without_it(buffer, monkeypatch):
    store_by(buffer, {"id": "pcodec", "level": 8}, lambda data: data[::-1])
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    with pytest.raises(UserError, match="the codec pcodec, which .*pip install numcodecs"):
        ReplayBuffer.open(buffer, required=("state",))
    known = types.SimpleNamespace(decode=lambda data: data[::-1])
    package = types.SimpleNamespace(get_codec=lambda config: {"pcodec": known}[config["id"]])
    monkeypatch.setitem(sys.modules, "numcodecs", package)
    check_state(buffer)
    store_by(buffer, {"id": "mine"}, lambda data: data)
    with pytest.raises(UserError, match="codec mine, which the installed numcodecs cannot decode"):
        ReplayBuffer.open(buffer, required=("state",))


def test_a_codec_without_its_package_names_what_to_install(buffer, monkeypatch):
    store_by(buffer, *CODECS["lz4"])
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UserError, match=r"codec lz4, .*pip install 'uva_jax\[codecs\]'"):
        ReplayBuffer.open(buffer, required=("state",))


def write_v3(folder, name, values, codecs, chunk):
    metadata = {
        "shape": list(values.shape),
        "data_type": values.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [chunk, *values.shape[1:]]},
        },
        "codecs": codecs,
        "fill_value": 0,
    }
    spec = {"driver": "zarr3", "kvstore": f"file://{folder}/{name}/", "metadata": metadata}
    ts.open(spec, create=True, delete_existing=True).result().write(values).result()
    change(folder / name / "zarr.json", attributes={}, storage_transformers=[])


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
ZSTD = {"name": "zstd", "configuration": {"level": 0}}
SHARDS = {
    "chunk_shape": [10, 4],
    "codecs": [BYTES, ZSTD],
    "index_codecs": [BYTES, {"name": "crc32c"}],
}


@pytest.fixture
def version_3(tmp_path):
    folder = tmp_path / "three.zarr"
    write_v3(folder, "meta/episode_ends", ENDS, [BYTES, ZSTD], 2)
    write_v3(folder, "data/img", IMAGES, [BYTES, {"name": "blosc"}], 5)
    write_v3(folder, "data/state", STATE, [BYTES, ZSTD], 20)
    for group, attributes in (("", {"made_by": "me"}), ("meta", {"tasks": ["fold"]}), ("data", {})):
        node = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (folder / group / "zarr.json").write_text(json.dumps(node))
    return folder


def test_version_3_reads_like_version_2(version_3, buffer):
    for path in (version_3, zip_up(version_3)):
        found = ReplayBuffer.open(path)
        assert found.attributes == {"made_by": "me"} and found.tasks == ("fold",)
        np.testing.assert_array_equal(found.read("img", 3, 17), IMAGES[3:17])
        check_state(path)
    assert [found.shape(k) for k in found.keys] == [(STEPS, 20, 20, 3), (STEPS, 4)]


@pytest.mark.parametrize(
    ("codecs", "noted"),
    [
        ([BYTES, ZSTD], [BYTES, {"name": "zstd", "configuration": {"level": 0, "checksum": True}}]),
        ([BYTES, ZSTD], [BYTES, {"name": "numcodecs.zstd", "configuration": {"level": -5}}]),
        ([BYTES, {"name": "gzip"}, {"name": "crc32c"}], None),
        ([{"name": "sharding_indexed", "configuration": SHARDS}], None),
        ([{"name": "bytes", "configuration": {"endian": "big"}}, ZSTD], None),
    ],
)
def test_version_3_with_the_codecs_of_zarr_python(version_3, codecs, noted):
    write_v3(version_3, "data/state", STATE, codecs, 20)
    if noted:
        change(version_3 / "data/state/zarr.json", codecs=noted)
    check_state(version_3)


def test_version_3_with_the_codecs_of_numcodecs(version_3):
    codecs = [{"name": "numcodecs.delta"}, BYTES, {"name": "numcodecs.lz4"}]
    change(version_3 / "data/state/zarr.json", codecs=codecs)
    for number in range(3):
        part = difference(STATE[20 * number : 20 * number + 20].tobytes())
        (version_3 / f"data/state/c/{number}/0").write_bytes(CODECS["lz4"][1](part))
    np.testing.assert_allclose(ReplayBuffer.open(version_3).read("state"), STATE, atol=1e-6)


def test_version_3_is_imported(version_3, tmp_path, capsys):
    assert main([str(version_3), "--kind", "zarr", "--out", str(tmp_path / "copy.zarr")]) == 0
    check_state(tmp_path / "copy.zarr")


@pytest.mark.parametrize("fill", [0, 7, None])
def test_a_missing_chunk_is_the_fill_value(buffer, version_3, fill):
    change(buffer / "data/state/.zarray", fill_value=fill)
    change(version_3 / "data/state/zarr.json", fill_value=fill or 0)
    (buffer / "data/state/1.0").unlink()
    (version_3 / "data/state/c/1/0").unlink()
    wanted = STATE.copy()
    wanted[20:40] = fill or 0
    np.testing.assert_array_equal(ReplayBuffer.open(version_3).read("state"), wanted)
    if fill is None:
        with pytest.raises(UserError, match="data/state cannot be read .* incomplete"):
            ReplayBuffer.open(buffer).read("state")
    else:
        np.testing.assert_array_equal(ReplayBuffer.open(buffer).read("state"), wanted)


@pytest.mark.parametrize("count", [1, 3, 4, 12])
def test_images_that_miss_in_bulk_are_lost_ones(buffer, count):
    for number in range(count):
        (buffer / f"data/img/{number}.0.0.0").unlink()
    if count > 3:
        with pytest.raises(UserError, match=f"data/img lacks {count} of its 12 chunks of images"):
            ReplayBuffer.open(buffer, required=("img",))
    else:
        found = ReplayBuffer.open(buffer, required=("img",)).read("img")
        assert not found[: 5 * count].any()
        np.testing.assert_array_equal(found[5 * count :], IMAGES[5 * count :])


def test_arrays_that_nobody_reads_are_not_touched(buffer):
    clean = ReplayBuffer.open(buffer).fingerprint(("state",))
    for file in (buffer / "data/img").glob("*.0"):
        file.unlink()
    (buffer / "data/img/.zarray").write_text("{")
    write_v2(buffer, "data/depth", STATE[:7])
    found = ReplayBuffer.open(buffer, required=("state",))
    check_state(buffer)
    assert found.fingerprint(("state",)) == clean
    with pytest.raises(UserError, match="img/.zarray is not readable JSON"):
        found.read("img")


def test_folders_for_chunks_that_old_zarr_did_not_note(buffer):
    for number in range(3):
        data = (buffer / f"data/state/{number}.0").read_bytes()
        (buffer / f"data/state/{number}.0").unlink()
        (buffer / f"data/state/{number}").mkdir()
        (buffer / f"data/state/{number}/0").write_bytes(data)
    described = json.loads((buffer / "data/state/.zarray").read_text())
    described.pop("dimension_separator", None)
    (buffer / "data/state/.zarray").write_text(json.dumps(described))
    check_state(buffer)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"dtype": "|O"}, r"data/state holds \|O, but only arrays of numbers"),
        ({"chunks": [20]}, "impossible metadata"),
        ({"fill_value": "none"}, "impossible metadata"),
        ({"compressor": "zstd"}, "impossible metadata"),
    ],
)
def test_metadata_that_does_not_fit_is_explained(buffer, members, message):
    change(buffer / "data/state/.zarray", **members)
    with pytest.raises(UserError, match=message):
        ReplayBuffer.open(buffer)


def le_robot(folder):
    for name in ("meta/info.json", "meta/episodes.jsonl", "data/chunk-000/episode_000000.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def hdf5(folder):
    h5py.File(folder / "demo.hdf5", "w").close()
    return folder


def first_bytes(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def zipped_arrays(folder):
    np.savez(folder / "a.npz", img=IMAGES)
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (le_robot, "holds a LeRobot data set .* write_replay_buffer"),
        (lambda f: zip_up(le_robot(f / "robot")), "holds a LeRobot data set"),
        (first_bytes("file-000.parquet", b"PAR1"), "holds a LeRobot data set"),
        (hdf5, "holds HDF5 files, .* --kind libero or --kind robomimic"),
        (lambda f: hdf5(f) / "demo.hdf5", "holds HDF5 files, .* --kind libero"),
        (first_bytes("a.zarr.tar.gz", b"\x1f\x8b\x08"), "holds a packed archive, .* unpack it"),
        (zipped_arrays, "holds NumPy's files"),
        (first_bytes("train.tfrecord-00000-of-00004", b"\0"), "holds an RLDS data set"),
    ],
)
def test_what_is_no_zarr_is_named_with_the_way_out(tmp_path, make, message, capsys):
    (tmp_path / "given").mkdir()
    path = make(tmp_path / "given")
    with pytest.raises(UserError, match=message):
        ReplayBuffer.open(path)
    assert main([str(path), "--kind", "zarr", "--out", str(tmp_path / "out.zarr")]) == 2
    assert not (tmp_path / "out.zarr").exists()


def test_folders_above_and_inside_a_zarr_point_at_it(buffer, version_3):
    (buffer.parent / "deep/er").mkdir(parents=True)
    other = (buffer.parent / "deep/er/a.zarr").absolute()
    shutil.copytree(buffer, other)
    for path, meant in (
        (buffer.parent, f"one of {buffer}, {other}, {version_3}"),
        (buffer.parent / "deep", other),
        (buffer / "data", buffer),
        (version_3 / "data" / "img", version_3),
    ):
        with pytest.raises(UserError, match=f"did you mean {meant}"):
            ReplayBuffer.open(path)


def test_an_importer_of_hdf5_says_what_it_was_given(tmp_path):
    write_replay_buffer(tmp_path / "own.zarr", {"state": STATE}, ENDS)
    for path, message in (
        (le_robot(tmp_path / "robot"), "holds a LeRobot data set"),
        (tmp_path / "own.zarr", "is a zarr: .*--kind zarr"),
        (Path(zip_up(tmp_path / "own.zarr")), "is a zarr: .*--kind zarr"),
    ):
        with pytest.raises(UserError, match=message):
            open_hdf5("robomimic", [path], None)
