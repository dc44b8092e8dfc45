"""The arrays of a policy folder are the same written or read at once or one by one."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from hostile_torch import sound
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import from_torch, to_torch
from convert.formats import torch_file
from convert.formats.torch_tensors import in_c_order
from uva_jax.models import policy_folder, surgery
from uva_jax.runtime.errors import UserError
from uva_jax.storage.lazy_array import LazyArray, ahead


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random policy as a PyTorch checkpoint."""
    return sound(tmp_path_factory.mktemp("checkpoint") / "small.ckpt")


@pytest.fixture(scope="module")
def teacher(checkpoint):
    """The same policy in memory."""
    return from_torch.convert_checkpoint(checkpoint)[0]


@pytest.fixture(scope="module")
def streamed(checkpoint, tmp_path_factory):
    """The same policy as a folder that a conversion wrote."""
    folder = tmp_path_factory.mktemp("streamed") / "policy"
    from_torch.from_torch(checkpoint, folder)
    return folder


def same(found, wanted):
    assert set(found) == set(wanted)
    for path, value in wanted.items():
        array = found[path].load() if isinstance(found[path], LazyArray) else found[path]
        np.testing.assert_array_equal(array, value, err_msg=path)


def test_a_converted_folder_holds_what_a_saved_one_does(streamed, teacher, tmp_path):
    policy_folder.save_policy(tmp_path / "saved", teacher, source={})
    wanted = surgery.flatten(teacher)
    for folder in (streamed, tmp_path / "saved"):
        same(policy_folder.read_arrays(folder), wanted)
        same(surgery.flatten(policy_folder.load_policy(folder)), wanted)


def test_folders_that_orbax_compressed_are_read(streamed, teacher, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(streamed, folder)
    shutil.rmtree(folder / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = surgery.flatten(teacher)
        checkpointer.save(folder / "params", traverse_util.unflatten_dict(arrays, sep="/"))
    same(surgery.flatten(policy_folder.load_policy(folder)), arrays)
    to_torch.export_policy(folder, tmp_path / "old.ckpt")
    to_torch.export_policy(streamed, tmp_path / "new.ckpt")
    old, new = (torch_file.read(tmp_path / f"{name}.ckpt") for name in ("old", "new"))
    assert old.sha256() == new.sha256()


def test_damaged_arrays_are_one_sentence_and_write_nothing(streamed, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(streamed, folder)
    largest = max((folder / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    largest.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged.*make the policy folder again") as caught:
        to_torch.export_policy(folder, tmp_path / "out.ckpt")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_policy_whose_arrays_were_cut_is_one_sentence(streamed, tmp_path):
    folder = shutil.copytree(streamed, tmp_path / "policy")
    files = [f for f in (folder / "params").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with pytest.raises(UserError, match="missing or damaged"):
        policy_folder.load_policy(folder)


def test_arrays_of_another_architecture_are_refused_before_anything_is_written(teacher, tmp_path):
    arrays = {"mar/z_proj/bias": LazyArray((3,), np.dtype(np.float32), lambda: np.zeros(3))}
    with pytest.raises(UserError, match=r"mar/z_proj/bias has shape \(3,\)"):
        policy_folder.save_arrays(tmp_path / "p", teacher.config, arrays, source=dict)
    assert not list(tmp_path.iterdir())


def test_what_the_source_refuses_leaves_no_folder(teacher, tmp_path):
    arrays = {
        path: LazyArray(value.shape, np.dtype(np.float32), lambda value=value: np.asarray(value))
        for path, value in surgery.flatten(teacher).items()
    }

    def refuse():
        raise UserError("no.")

    with pytest.raises(UserError, match="no"):
        policy_folder.save_arrays(tmp_path / "p", teacher.config, arrays, source=refuse)
    assert not list(tmp_path.iterdir())


def test_ahead_keeps_the_order_and_hands_errors_on():
    assert list(ahead(lambda n: n * n, range(20))) == [n * n for n in range(20)]
    made = ahead(lambda n: 1 // (3 - n), range(20))
    with pytest.raises(ZeroDivisionError):
        list(made)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_c_order_is_only_another_place_in_memory(shape, order):
    values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    found = in_c_order(values.transpose(axes))
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, values.transpose(axes))
