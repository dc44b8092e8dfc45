"""Atomic writes: files and folders have the old content or the new."""

import errno
import os

import pytest

from uva_jax.storage.atomic import (
    is_leftover,
    new_file,
    new_folder,
    read_json,
    remove_folder,
    write_bytes,
    write_json,
)


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    write_bytes(path, b"old")
    with new_file(path) as temporary:
        assert temporary.suffix == ".mp4" and temporary.parent == path.parent
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_a_file_that_fails_half_way_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_json(path, {"metrics": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"metrics": 2})
    assert read_json(path) == {"metrics": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["done.json", ".zattrs", "clip.mp4", "README"])
def test_what_a_killed_writer_leaves_is_known_by_its_name(tmp_path, name):
    with new_file(tmp_path / name) as temporary:
        assert is_leftover(temporary) and not is_leftover(tmp_path / name)
        temporary.write_bytes(b"")


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path):
    path = tmp_path / "policy"
    for text in ("old", "new"):
        with new_folder(path) as new:
            assert list(new.iterdir()) == []
            (new / text).touch()
    assert [p.name for p in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_fails_half_way_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "policy"
    path.mkdir()
    (path / "old").touch()
    (tmp_path / ".policy.new").mkdir()  # of a killed process
    (tmp_path / ".policy.new" / "half").touch()
    with pytest.raises(RuntimeError), new_folder(path) as new:
        assert list(new.iterdir()) == []
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_removed_with_what_an_earlier_removal_left(tmp_path):
    for name in (".cache.old", "cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chunk").touch()
    remove_folder(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
