"""`grafted_head.py`, the torch head as one file: its requirements, its inputs, its outputs."""

import ast
import dataclasses
import json
import pickle
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import CONFIG

torch = pytest.importorskip("torch")

from convert import standalone  # noqa: E402
from convert.to_torch import export_policy  # noqa: E402
from convert.torch.head import GraftedActionHead  # noqa: E402
from uva_jax.models import surgery  # noqa: E402
from uva_jax.models.policy_config import GraftedHeadConfig  # noqa: E402
from uva_jax.runtime.errors import UserError  # noqa: E402

FILES = ("grafted.ckpt", "grafted.safetensors")
HEAD = GraftedHeadConfig(
    channels=2,
    z_channels=32,
    width=32,
    depth=2,
    operators=(("pooled_cross_attn", "windowed_self_attn", "swiglu"), ("none", "none", "keep")),
    grid=(4, 4),
    pool=(2, 2),
    memory_width=16,
    num_heads=4,
    self_attn_heads=4,
    sampling_steps="4",
)
# A user's code in an environment with only torch, einops and the exported files.
PROGRAM = """
import importlib.util, sys
packages, folder = sys.argv[1:3]
sys.path[:0] = [folder, packages]
from grafted_head import GraftedActionHead
import torch
seen = ("jax", "flax", "numpy", "uva_jax", "convert")
assert not [name for name in seen if importlib.util.find_spec(name)]
given = torch.load(folder + "/given.pt", weights_only=True)
for name in sys.argv[3:]:
    head = GraftedActionHead.from_checkpoint(folder + "/" + name)
    z, noise = given["z"], given["noise"]
    found = {
        "condition": head.condition(z),
        "loss": head(given["target"], z, t=given["t"], noise=noise[0]),
        "sample": head.sample(z, 0.9, noise=noise),
        "guided": head.sample(z, cfg=1.5, noise=noise[:, :2]),
    }
    torch.save({k: v.detach() for k, v in found.items()}, folder + "/" + name + ".out")
"""


def random_policy(config):
    policy, random = surgery.abstract_policy(config), np.random.default_rng(0)
    arrays = {
        path: (0.1 * random.standard_normal(leaf.shape)).astype(leaf.dtype)
        for path, leaf in surgery.shapes(policy).items()
    }
    return surgery.replace(policy, arrays)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with both kinds of export, and the policy they hold."""
    folder = tmp_path_factory.mktemp("export")
    policy = random_policy(dataclasses.replace(CONFIG, action_head=HEAD))
    for name in FILES:
        facts = export_policy(policy, folder / name)
    assert facts["head"] == str(folder / "grafted_head.py")
    return folder, policy


def needs_of(*names: str) -> set[str]:
    """Returns distributions and all their installed requirements."""
    found, pending = set(), list(names)
    while pending:
        name = pending.pop()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            pending += [re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder from which only torch and einops can be imported."""
    folder = tmp_path_factory.mktemp("packages")
    installed = Path(sysconfig.get_paths()["purelib"])
    for name in needs_of("torch", "einops"):
        for top in {file.parts[0] for file in metadata.files(name) or ()}:
            if top != ".." and (installed / top).exists() and not (folder / top).exists():
                (folder / top).symlink_to(installed / top)
    return folder


def test_it_equals_flax_where_neither_this_project_nor_jax_is(exported, packages):
    folder, policy = exported
    random = np.random.default_rng(0)
    given = {
        "z": random.standard_normal((4, 64, 32), dtype=np.float32),
        "noise": random.standard_normal((5, 4, 16, 2), dtype=np.float32),
        "t": np.array([0, 3, 500, 999]),
        "target": random.uniform(-1, 1, (4, 16, 2)).astype(np.float32),
    }
    torch.save({k: torch.from_numpy(v) for k, v in given.items()}, folder / "given.pt")
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(packages), str(folder), *FILES]
    subprocess.run(command, check=True, timeout=300)

    @jax.jit
    def outputs(head, z, noise, t, target):
        return {
            "condition": head.condition(z),
            "loss": head.loss(target, z, t=t, noise=noise[0])["loss"].mean(),
            "sample": head.sample(z, noise=noise, temperature=0.9),
            "guided": head.sample(z, noise=noise[:, :2], cfg=1.5, guided=True),
        }

    with jax.default_matmul_precision("highest"):
        wanted = outputs(policy.action_head, **given)
    for file in FILES:
        found = torch.load(folder / f"{file}.out", weights_only=True)
        for name, want in wanted.items():
            error = np.abs(found[name].numpy() - want).max()
            assert error <= 1e-5 * np.abs(want).max(), (file, name)


def lowest_python(source: str) -> tuple[int, int]:
    """Returns the oldest Python 3 with the syntax and the library that a source uses."""
    return pytest.importorskip("vermin").detect(source)[1]


def test_it_keeps_to_python_3_8():
    source = standalone.source()
    assert lowest_python(source) <= (3, 8)
    assert lowest_python(source + "\nzip('ab', 'cd', strict=True)\n") > (3, 8)
    assert lowest_python(source + "\n'ab'.removeprefix('a')\n") > (3, 8)


def test_joined_modules_have_no_name_in_common():
    names = []
    for node in ast.parse(standalone.source(), feature_version=(3, 8)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets]
    assert "GraftedActionHead" in names and len(set(names)) == len(names)


def test_every_name_of_the_joined_file_is_defined(tmp_path):
    (tmp_path / "grafted_head.py").write_text(standalone.source())
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--target-version=py38",
        "--select=F,B,E9",
    ]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_file_of_that_name_by_someone_else_is_kept(exported, tmp_path):
    (tmp_path / "grafted_head.py").write_text("mine = 1\n")
    with pytest.raises(UserError, match="no export wrote it"):
        export_policy(exported[1], tmp_path / "grafted.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["grafted_head.py"]


def test_a_policy_that_is_no_graft_gets_no_such_file(tmp_path):
    export_policy(random_policy(CONFIG), tmp_path / "plain.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.ckpt"]


def test_the_checkpoint_grows_by_no_second_copy_of_the_head(exported):
    with zipfile.ZipFile(exported[0] / "grafted.ckpt") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert sizes["archive/head.pkl"] < sizes["archive/data.pkl"]
    tensors = torch.load(exported[0] / "grafted.ckpt", weights_only=False)["state_dicts"]
    held = sum(t.nbytes for t in tensors["ema_model"].values())
    assert sum(size for name, size in sizes.items() if "/data/" in name) == held


def test_a_payload_that_was_saved_again_without_cfg_is_read(exported, tmp_path):
    payload = torch.load(exported[0] / "grafted.ckpt", weights_only=False)
    plain = {name: payload[name] for name in ("state_dicts", "uva_jax")}
    torch.save(plain, tmp_path / "plain.pt")
    again = GraftedActionHead.from_checkpoint(tmp_path / "plain.pt").state_dict()
    wanted = GraftedActionHead.from_checkpoint(exported[0] / "grafted.ckpt").state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    del payload["uva_jax"]
    torch.save(payload, tmp_path / "upstream.ckpt")  # as UVA's own training saves it
    with pytest.raises(ValueError, match="holds no grafted action head"):
        GraftedActionHead.from_checkpoint(tmp_path / "upstream.ckpt")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["data.pkl", "head.pkl"])
def test_nothing_that_a_file_holds_is_executed(name, exported, tmp_path):
    evil, trace = tmp_path / "evil.ckpt", tmp_path / "executed"
    with (
        zipfile.ZipFile(exported[0] / "grafted.ckpt") as source,
        zipfile.ZipFile(evil, "w") as copy,
    ):
        for entry in source.namelist():
            if entry != "archive/head.pkl":
                copy.writestr(entry, source.read(entry))
        if name == "head.pkl":
            copy.writestr("archive/head.pkl", pickle.dumps(_Touch(trace), protocol=2))
    if name == "data.pkl":
        torch.save({"uva_jax": json.dumps({}), "state_dicts": _Touch(trace)}, evil)
    with pytest.raises(ValueError, match="holds no grafted action head"):
        GraftedActionHead.from_checkpoint(evil)
    assert not trace.exists()
