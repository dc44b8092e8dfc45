"""Language latents of task sentences: CLIP's tokeniser, the tower, files of latents, errors."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from test_text_tower import random_policy
from variants import VARIANTS

from convert.__main__ import main
from uva_jax.data.clip_tokenizer import END, START, ClipTokenizer
from uva_jax.data.language import read_latents, task_latents
from uva_jax.models.policy_config import TextTowerConfig
from uva_jax.runtime.errors import UserError

# Recorded from transformers' CLIPTokenizer, padding="max_length", max_length=30.
GOLDEN = json.loads((Path(__file__).parent / "goldens" / "clip_tokens.json").read_text())
TASKS = ("put the mug on the stove", "pick up the cup")


def byte_words():
    """Returns a printable character for each byte, as byte-level tokenisers have."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (chr(256 + i) for i in range(256 - len(plain)))
    return [chr(b) for b in plain] + list(rest)


def vocabulary():
    letters = sorted(byte_words())
    merged = [merge.replace(" ", "") for merge in GOLDEN["merges"]]
    words = [*letters, *(x + "</w>" for x in letters), *merged, START, END]
    return {word: number for number, word in enumerate(words)}


def write_vocabulary(folder, words=None, merges=None):
    folder.mkdir(parents=True, exist_ok=True)
    words, merges = words or vocabulary(), merges or GOLDEN["merges"]
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def policy():
    tower = TextTowerConfig(
        vocab_size=len(vocabulary()),
        width=32,
        depth=1,
        num_heads=2,
        max_length=32,
        projection=12,
        mlp_width=64,
    )
    return random_policy(dataclasses.replace(VARIANTS["libero10"], text_tower=tower))


@pytest.fixture(scope="module")
def plain_policy():
    """A policy that takes language but has no tower."""
    return random_policy(VARIANTS["libero10"])


# ---- the tokeniser ----


@pytest.mark.parametrize("entry", GOLDEN["sentences"], ids=lambda e: ascii(e["text"][:20]))
def test_tokens_and_padding_are_transformers(folder, entry):
    tokens, mask = ClipTokenizer.load(folder)([entry["text"]])
    assert tokens[0].tolist() == entry["tokens"]
    assert mask[0].tolist() == [1] * entry["length"] + [0] * (30 - entry["length"])


def test_a_sentence_longer_than_the_padding_is_not_cut(folder):
    tokens, mask = ClipTokenizer.load(folder)(["the plate " * 20, "the plate"])
    assert tokens.shape == (2, 42) and mask.sum(axis=1).tolist() == [42, 4]


@pytest.mark.parametrize("lists", [True, False])
def test_tokenizer_json_holds_the_same(folder, tmp_path, lists):
    merges = [m.split() for m in GOLDEN["merges"]] if lists else GOLDEN["merges"]
    described = {"model": {"type": "BPE", "vocab": vocabulary(), "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    sentences = [entry["text"] for entry in GOLDEN["sentences"]]
    tokens, _ = ClipTokenizer.load(tmp_path)(sentences)
    assert tokens.tolist() == [entry["tokens"] for entry in GOLDEN["sentences"]]


CACHED = Path("models--openai--clip-vit-base-patch32") / "snapshots" / "3d74acf"


@pytest.mark.parametrize(
    ("variable", "hub"),
    [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_cache_of_transformers_is_found(tmp_path, monkeypatch, variable, hub):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UserError, match="models--openai--clip") as error:
        ClipTokenizer.load()
    for part in (str(tmp_path), "vocab.json", "config.data.vocabulary", "config.data.language"):
        assert part in str(error.value)
    write_vocabulary(tmp_path / hub / CACHED)
    assert ClipTokenizer.load().end == len(vocabulary()) - 1


def without(*words):
    return {k: v for k, v in vocabulary().items() if k not in words}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab.json": "{"}, "vocab.json is not readable JSON"),
        ({"vocab.json": "[" * 100_000}, "vocab.json is not readable JSON"),
        ({"vocab.json": "[]"}, "should hold a JSON object"),
        ({"vocab.json": '{"a": "b"}'}, "not a whole number"),
        ({"vocab.json": '{"a": 1, "b": 1}'}, "share a number"),
        ({"vocab.json": json.dumps(without(START))}, "lacks <.startoftext.>"),
        ({"vocab.json": json.dumps(without("turn</w>"))}, "'turn</w>', which the vocabulary lacks"),
        ({"merges.txt": "#version\nt h e\n"}, "merge 0 is 't h e', not two words"),
        ({"merges.txt": "#version\n\ufffd"}, "not two words"),
        ({"merges.txt": b"\xff\xfe"}, "merges.txt cannot be read"),
        ({"merges.txt": None}, "it holds only vocab.json"),
        ({"merges.txt": None, "tokenizer.json": '{"model": 3}'}, "holds no model"),
        ({"merges.txt": None, "tokenizer.json": '{"model": {}}'}, "holds no merges"),
    ],
)
def test_a_missing_or_damaged_vocabulary_is_a_sentence(tmp_path, change, message):
    write_vocabulary(tmp_path)
    for name, content in change.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        ClipTokenizer.load(tmp_path)


# ---- latents from the tower ----


def test_the_tower_gives_one_vector_a_task(policy, folder):
    found = task_latents(TASKS, policy=policy, vocabulary=str(folder))
    assert found.shape == (2, 12) and found.dtype == np.float32
    tokens, mask = ClipTokenizer.load(folder)(TASKS[1:], length=8)  # padding does not matter
    np.testing.assert_allclose(found[1], policy.text_model(tokens, mask)[0], rtol=1e-4, atol=1e-6)
    again = task_latents(TASKS[::-1], policy=policy, vocabulary=str(folder))
    np.testing.assert_allclose(again, found[::-1], rtol=1e-5, atol=1e-6)


def test_without_tower_or_file_there_are_no_vectors(plain_policy, folder):
    with pytest.raises(UserError, match="no language tower .* config.data.language"):
        task_latents(TASKS, policy=plain_policy, vocabulary=str(folder))


def test_another_models_vocabulary_is_refused(policy, tmp_path):
    words = vocabulary() | {"extra": len(vocabulary())}
    with pytest.raises(UserError, match="has 555 words .* has 554"):
        task_latents(TASKS, policy=policy, vocabulary=str(write_vocabulary(tmp_path, words)))


def test_a_task_that_is_too_long_is_named(policy, folder):
    with pytest.raises(UserError, match="'plate plate .* has 42 tokens, .* at most 32"):
        tasks = ["put", " ".join(["plate"] * 40)]
        task_latents(tasks, policy=policy, vocabulary=str(folder))


# ---- latents from a file ----


def write_safetensors(path, arrays, dtype="F32"):
    header, data = {"__metadata__": {"by": "a test"}}, b""
    for name, value in arrays.items():
        content = value.tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_file_gives_the_vectors_of_the_tasks_in_order(plain_policy, tmp_path, ending):
    path = tmp_path / f"latents{ending}"
    arrays = {t: np.full(12, i, np.float32) for i, t in enumerate((*TASKS, "another"))}
    np.savez(path, **arrays) if ending == ".npz" else write_safetensors(path, arrays)
    found = task_latents(TASKS[::-1], policy=plain_policy, path=str(path))
    np.testing.assert_array_equal(found, [[1.0] * 12, [0.0] * 12])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {TASKS[0]: np.zeros(12)},
            "no language latent for the task 'pick up the cup'; its tasks are 'put",
        ),
        (dict.fromkeys(TASKS, np.zeros(13)), r"of shape \(13,\) .* takes \(12,\)"),
        (dict.fromkeys(TASKS, np.zeros((1, 12))), r"of shape \(1, 12\)"),
        (dict.fromkeys(TASKS, np.full(12, np.nan)), "not finite"),
        (dict.fromkeys(TASKS, np.zeros(12, int)), "not real numbers"),
        (dict.fromkeys(TASKS, np.array([{}] * 12)), "cannot be read as language latents"),
    ],
)
def test_vectors_that_do_not_fit_are_a_sentence(plain_policy, tmp_path, arrays, message):
    np.savez(tmp_path / "latents.npz", **arrays)
    with pytest.raises(UserError, match=message):
        task_latents(TASKS, policy=plain_policy, path=str(tmp_path / "latents.npz"))


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.txt"])
@pytest.mark.parametrize("content", [None, b"", b"\xff" * 40, b"PK\3\4" + b"\0" * 40])
def test_a_file_that_is_none_is_a_sentence(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="no file of|should end in|cannot be read as"):
        read_latents(str(path))


def test_safetensors_of_half_precision_and_truncated_ones(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"cup": np.array([1.5, -2], np.float16)}, "F16")
    np.testing.assert_array_equal(read_latents(str(path))["cup"], np.float32([1.5, -2]))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as language latents"):
        read_latents(str(path))


# ---- upstream's pickle ----


VECTORS = {"cup": np.arange(12, dtype=np.float32), "allow_pickle": np.ones(12, np.float32)}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_upstreams_pickle_becomes_plain_arrays(tmp_path, protocol):
    source, out = tmp_path / "language_latents.pkl", tmp_path / "latents.npz"
    source.write_bytes(pickle.dumps(VECTORS, protocol))
    assert main(["latents", str(source), str(out)]) == 0
    found = read_latents(str(out))
    assert list(found) == list(VECTORS)
    assert all(np.array_equal(found[task], VECTORS[task]) for task in VECTORS)


class Gadget:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "make",
    [
        lambda target: {"cup": Gadget(target)},
        lambda target: Gadget(target),
        lambda target: {"cup": [1.0, 2.0]},
        lambda target: {"cup": np.zeros((2, 2), np.float32)},
        lambda target: {"cup": np.zeros(3, ">f4")},
        lambda target: {"cup": np.zeros(3, int)},
        lambda target: {"cup": np.full(3, np.inf, np.float32)},
        lambda target: {},
    ],
)
def test_any_other_pickle_is_refused_and_not_run(tmp_path, make, capsys):
    source, target = tmp_path / "a.pkl", tmp_path / "made"
    source.write_bytes(pickle.dumps(make(target), 4))
    assert main(["latents", str(source), str(tmp_path / "out.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not target.exists() and not (tmp_path / "out.npz").exists()
