"""The activation cache: written by chunks, resumed, read by rows; damage raises an error."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from uva_jax.runtime.errors import UserError
from uva_jax.storage.sample_store import SampleStore

N, CHUNK = 43, 8  # six chunks, the last of three samples
ARRAYS = {"z": ((4, 6), "bfloat16"), "target": ((5,), "float32"), "t": ((), "int32")}
META = {"teacher": "abc", "config": {"depth": 3}}


def values():
    rng = np.random.default_rng(0)
    return {
        "z": rng.normal(size=(N, 4, 6)).astype(ml_dtypes.bfloat16),
        "target": rng.normal(size=(N, 5)).astype(np.float32),
        "t": np.arange(N, dtype=np.int32),
    }


def create(folder, **changes):
    given = {"arrays": ARRAYS, "num_samples": N, "chunk": CHUNK, "meta": META, **changes}
    return SampleStore.create(folder, **given)


def write(cache, chunks=None):
    for i in cache.missing_chunks() if chunks is None else chunks:
        start, stop = cache.chunk_range(i)
        cache.write_chunk(i, {name: value[start:stop] for name, value in values().items()})
    cache.flush()
    return cache


@pytest.fixture
def folder(tmp_path):
    write(create(tmp_path / "cache")).finish()
    return tmp_path / "cache"


def chunk_file(folder, name="z", index=2):
    return folder / name / f"c.{index}{'.0' * len(ARRAYS[name][0])}"


def test_what_was_written_is_read_back(folder):
    cache = SampleStore.open(folder)
    assert cache.names == ("z", "target", "t")
    assert (cache.num_samples, cache.chunk, cache.num_chunks) == (N, CHUNK, 6)
    assert cache.meta == META and cache.nbytes() == N * (48 + 20 + 4)
    loaded = cache.load()
    for name, value in values().items():
        assert (cache.shape(name), cache.dtype(name)) == (value.shape, value.dtype)
        assert loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name], value)
        np.testing.assert_array_equal(cache.read(name, 6, 19), value[6:19])


def test_a_path_may_go_up_a_folder(folder):
    found = SampleStore.open(folder / ".." / folder.name).read("t")
    np.testing.assert_array_equal(found, np.arange(N))


def test_scattered_rows_are_gathered_in_the_order_asked_for(folder):
    rows = np.random.default_rng(1).integers(0, N, (3, 7))
    found = SampleStore.open(folder).read_rows(("t", "z"), rows)
    assert tuple(found) == ("t", "z")
    for name in found:
        np.testing.assert_array_equal(found[name], values()[name][rows])


def test_more_than_max_bytes_is_not_loaded(folder):
    cache = SampleStore.open(folder)
    assert cache.load(["t"], max_bytes=4 * N - 1) is None
    assert list(cache.load(["t"], max_bytes=4 * N)) == ["t"]


def test_the_arrays_are_plain_zarr_v3_with_bfloat16_as_its_bits(folder):
    about = json.loads((folder / "z/zarr.json").read_text())
    assert about["zarr_format"] == 3 and about["data_type"] == "uint16"
    assert about["attributes"] == {"dtype": "bfloat16"}
    assert [c["name"] for c in about["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert json.loads((folder / "zarr.json").read_text())["node_type"] == "group"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/z/"}}
    bits = ts.open(spec).result().read().result()
    np.testing.assert_array_equal(bits.view(ml_dtypes.bfloat16), values()["z"])


def test_zarr_python_reads_it(folder):
    zarr = pytest.importorskip("zarr", minversion="3")
    group = zarr.open_group(folder, mode="r")
    np.testing.assert_array_equal(group["target"][:], values()["target"])
    np.testing.assert_array_equal(group["z"][:].view(ml_dtypes.bfloat16), values()["z"])


def test_the_index_says_what_is_there(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["meta"] == META and index["chunk"] == CHUNK
    assert index["arrays"]["z"] == {"item_shape": [4, 6], "dtype": "bfloat16"}
    assert (index["num_samples"], index["samples_done"], index["finished"]) == (N, N, True)


def test_a_cut_off_cache_resumes_at_its_missing_chunks(tmp_path):
    write(create(tmp_path / "c"), [0, 1, 4])
    with pytest.raises(UserError, match="holds 24 of 43 samples; .* to resume"):
        SampleStore.open(tmp_path / "c")
    cache = create(tmp_path / "c")
    assert cache.missing_chunks() == [2, 3, 5]
    with pytest.raises(ValueError, match="3 chunks are not written"):
        cache.finish()
    write(cache).finish()
    np.testing.assert_array_equal(SampleStore.open(tmp_path / "c").read("t"), np.arange(N))


def test_a_chunk_counts_only_when_every_array_has_it(tmp_path):
    cache = write(create(tmp_path / "c"))
    os.remove(chunk_file(tmp_path / "c", "target", 1))
    (tmp_path / "c/target/c.1.0.__lock").write_bytes(b"half")  # what a killed writer leaves
    assert cache.missing_chunks() == [1]


def test_a_cache_that_was_cut_off_before_its_arrays_were_made_resumes(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "finished": False}))
    for file in (folder / "z").iterdir():
        file.unlink()
    (folder / "z").rmdir()
    with pytest.raises(UserError, match="holds 0 of 43 samples"):
        SampleStore.open(folder)
    write(create(folder)).finish()
    np.testing.assert_array_equal(SampleStore.open(folder).read("z"), values()["z"])


def test_creating_a_finished_cache_again_changes_nothing(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert create(folder).missing_chunks() == []
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    SampleStore.open(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meta": {**META, "teacher": "xyz"}}, r'meta\.teacher: "abc" -> "xyz"'),
        ({"meta": {**META, "config": {"depth": 4}}}, r"meta\.config\.depth: 3 -> 4"),
        ({"num_samples": 44}, "num_samples: 43 -> 44"),
        ({"chunk": 16}, "chunk: 8 -> 16"),
        (
            {"arrays": {**ARRAYS, "z": ((4, 6), "float16")}},
            r'arrays\.z\.dtype: "bfloat16" -> "float16"',
        ),
        ({"arrays": {"z": ARRAYS["z"], "t": ARRAYS["t"]}}, r"arrays\.target\..* -> absent"),
    ],
)
def test_a_cache_made_from_something_else_is_refused_or_replaced(folder, change, said):
    with pytest.raises(UserError, match=said):
        create(folder, **change)
    SampleStore.open(folder)  # still whole
    cache = create(folder, replace=True, **change)
    assert len(cache.missing_chunks()) == cache.num_chunks
    assert cache.samples_done() == 0


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="files but no cache"):
        create(tmp_path, replace=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_missing_cache_is_told(tmp_path):
    with pytest.raises(UserError, match="index.json does not exist"):
        SampleStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["z", "target", "t"])
def test_a_chunk_that_vanished_is_an_error_and_not_zeros(folder, name):
    cache = SampleStore.open(folder)
    os.remove(chunk_file(folder, name))
    with pytest.raises(UserError, match=f"damaged: {name} cannot be read"):
        cache.read(name)
    with pytest.raises(UserError, match=f"damaged: {name} cannot be read"):
        cache.read_rows([name], np.array([20]))
    cache.read(name, 0, 16)  # other chunks are fine
    with pytest.raises(UserError, match="1 of its 6 chunks are missing, the first is 2"):
        SampleStore.open(folder)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped"])
def test_a_damaged_chunk_is_an_error(folder, damage):
    file = chunk_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"truncated": content[:-20], "emptied": b"", "flipped": content}[damage])
    cache = SampleStore.open(folder)
    with pytest.raises(UserError, match="damaged: z cannot be read .*c.2.0.0"):
        cache.read("z")
    with pytest.raises(UserError, match="damaged: z cannot be read"):
        cache.read_rows(["z"], np.arange(N))


def test_a_damaged_description_is_an_error(folder):
    (folder / "z/zarr.json").write_text("{")
    with pytest.raises(UserError, match="damaged: z cannot be read"):
        SampleStore.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json is damaged"):
        SampleStore.open(folder)


def test_a_chunk_of_zeros_counts_as_written(tmp_path):
    cache = create(tmp_path / "c", arrays={"z": ((3,), "bfloat16")}, num_samples=4, chunk=4)
    cache.write_chunk(0, {"z": np.zeros((4, 3), ml_dtypes.bfloat16)})
    cache.finish()
    assert not SampleStore.open(tmp_path / "c").read("z").any()


def test_values_may_be_overwritten_after_they_were_handed_over(tmp_path):
    cache = create(tmp_path / "c", arrays={"x": ((1000,), "float32")}, num_samples=64, chunk=8)
    buffer = np.empty((8, 1000), np.float32)
    for i in range(8):
        buffer[:] = i
        cache.write_chunk(i, {"x": buffer})
    cache.finish()
    found = SampleStore.open(tmp_path / "c").read("x")
    np.testing.assert_array_equal(found, np.repeat(np.arange(8), 8)[:, None] * np.ones(1000))


def test_a_chunk_is_on_the_disk_when_its_future_is_done(tmp_path):
    cache = create(tmp_path / "c")
    cache.write_chunk(0, {name: value[:CHUNK] for name, value in values().items()}).result()
    assert cache.missing_chunks() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong", ["shape", "dtype", "names"])
def test_values_that_do_not_fit_are_refused(tmp_path, wrong):
    given = {name: value[:CHUNK] for name, value in values().items()}
    if wrong == "shape":
        given["t"] = given["t"][:-1]
    elif wrong == "dtype":
        given["z"] = given["z"].astype(np.float32)
    else:
        del given["t"]
    with pytest.raises(ValueError, match="chunk 0 needs arrays"):
        create(tmp_path / "c").write_chunk(0, given)


def test_two_writers_share_one_cache(tmp_path):
    first, second = create(tmp_path / "c"), create(tmp_path / "c")
    write(first, [0, 2, 4])
    write(second, [1, 3, 5])
    first.finish()
    np.testing.assert_array_equal(SampleStore.open(tmp_path / "c").read("t"), np.arange(N))


def test_what_is_not_there_is_told(folder):
    cache = SampleStore.open(folder)
    with pytest.raises(UserError, match="lacks 'h'; it holds z, target, t"):
        cache.read("h")
    with pytest.raises(ValueError, match=r"samples \[40, 44\)"):
        cache.read("t", 40, 44)
    with pytest.raises(ValueError, match=r"samples \[-1, 3\)"):
        cache.read_rows(["t"], np.array([-1, 2]))
