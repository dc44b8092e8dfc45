"""The published architectures: every tensor has the original's name and shape, every part its size.

`goldens/full_size.json.gz` lists the state dicts that the original code builds at full size: the
whole PushT policy, and the MAR part (transformer and heads) of the other tasks.
"""

import gzip
import json
import math
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import silently

from configs import common
from convert import from_torch, infer, rules
from convert.architecture import infer_policy
from convert.formats import torch_file
from convert.state_dicts import state_tensors
from uva_jax.__main__ import main
from uva_jax.cli import bench_conversion
from uva_jax.main import run
from uva_jax.models.architectures import ARCHITECTURES
from uva_jax.storage import policy_arrays

GOLDEN = json.loads(
    gzip.decompress((Path(__file__).parent / "goldens" / "full_size.json.gz").read_bytes())
)
PUSHT = {name: tuple(shape) for name, shape in GOLDEN["pusht"]}
SETTINGS = {"autoregressive_model_params": {"model_size": "mar_base"}}
TASK_SETTINGS = {
    "libero10": {"use_proprioception": False},
    "umi_multi": {"use_proprioception": True, "different_history_freq": True},
    "toolhang": {"use_proprioception": True, "predict_wrist_img": True},
}


def without_normalizer(shapes):
    return {name: shape for name, shape in shapes.items() if not name.startswith("normalizer.")}


def other_task(task):
    """Returns the state dict of another task's policy: PushT's VAE and that task's MAR part."""
    tensors = {n: s for n, s in PUSHT.items() if n.startswith(("vae_model.", "_dummy"))}
    return tensors | {f"model.{n}": tuple(s) for n, s in GOLDEN["other_tasks"][task]["tensors"]}


def test_the_full_size_policy_has_the_originals_names_and_shapes():
    ours = without_normalizer(bench_conversion.torch_shapes(bench_conversion.architecture("pusht")))
    assert ours == {name: shape for name, shape in PUSHT.items() if name != "_dummy_variable"}


def test_every_part_has_the_originals_number_of_parameters():
    sizes = Counter()
    for name, shape in bench_conversion.torch_shapes(
        bench_conversion.architecture("pusht")
    ).items():
        _, *rest = name.split(".")
        vae, mar = name.startswith("vae_model."), name.startswith("model.")
        inner = name.partition(".")[2]
        quant = vae and inner.startswith(("quant_conv", "post_quant_conv"))
        head = mar and inner.startswith(("diffloss.", "diffactloss."))
        decoder, position = inner.startswith("decoder"), inner.startswith("diffusion_")
        parts = {
            "policy_total": vae or mar,
            "vae_total": vae,
            "vae_encoder": vae and inner.startswith("encoder."),
            "vae_decoder": vae and inner.startswith("decoder."),
            "vae_quant_convs": quant,
            "mar_total": mar,
            "encoder_blocks": mar and inner.startswith("encoder_blocks."),
            "encoder_all": mar and not (head or decoder or position),
            "decoder_blocks": mar and inner.startswith("decoder_blocks."),
            "decoder_all": mar and decoder,
            "diffusion_pos": mar and position,
            "diffloss": mar and rest[0] == "diffloss",
            "diffactloss": mar and rest[0] == "diffactloss",
            **{
                f"diffactloss.{part}": mar and rest[:2] == ["diffactloss", part]
                for part in ("conv", "fc", "interpolate", "refine", "net")
            },
        }
        sizes.update({part: math.prod(shape) for part, here in parts.items() if here})
    assert dict(sizes) == GOLDEN["counts"]


@pytest.mark.parametrize("task", TASK_SETTINGS)
def test_other_tasks_are_inferred_with_the_originals_names_and_shapes(task):
    tensors = other_task(task)
    cfg = {"task": {"name": task}, "model": {"policy": SETTINGS | TASK_SETTINGS[task]}}
    config = infer.infer_config(tensors, cfg, task)
    _, left_out, problems = rules.plan(tensors)
    wanted = {name: shape for name, shape in tensors.items() if name not in left_out}
    assert not problems and bench_conversion.torch_shapes(config) == wanted
    mar = sum(math.prod(s) for n, s in tensors.items() if n.startswith("model."))
    assert mar == GOLDEN["other_tasks"][task]["n_params"]


# From upstream's configurations and training scripts of the published policies.
PUBLISHED = {
    "pusht": ("pusht", {}, {"normalizer_type": "all"}, {}),
    "pusht_multitask": (
        "pusht",
        {},
        {"normalizer_type": "all", "dataset_type": "multitask"},
        {},
    ),
    "libero10": ("libero10", {}, {"normalizer_type": "all", "language_emb_model": "clip"}, {}),
    "umi_multitask": (
        "umi",
        {
            "use_proprioception": True,
            "predict_proprioception": True,
            "shift_action": False,
            "different_history_freq": True,
        },
        {"normalizer_type": "none", "language_emb_model": "clip"},
        {"task_modes": ["policy_model", "full_dynamic_model"]},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_architecture_is_what_the_originals_state_dict_and_cfg_say(name):
    config = ARCHITECTURES[name]
    task, switches, dataset, rest = PUBLISHED[name]
    task_tensors = {"libero10": "libero10", "umi_multitask": "umi_multi"}.get(name)
    tensors = other_task(task_tensors) if task_tensors else PUSHT
    _, left_out, _ = rules.plan(tensors)
    known = bench_conversion.torch_shapes(config)
    apart = ("normalizer.", "text_model.")
    assert {n: s for n, s in known.items() if not n.startswith(apart)} == {
        n: s for n, s in tensors.items() if n not in left_out and not n.startswith(apart)
    }
    params = {"autoregressive_model_params": {"model_size": "mar_base", "temperature": 0.95}}
    cfg = {
        "task": {"name": task, "dataset": dataset} | rest,
        "model": {"policy": params | switches},
    }
    fields = {n: s for n, s in known.items() if n.startswith(apart)}
    assert infer.infer_config(tensors | fields, cfg, name) == config


def test_a_random_checkpoint_is_read_like_an_original_one(tmp_path):
    bench_conversion.make(tmp_path / "made.ckpt", "tiny")
    checkpoint = torch_file.read(tmp_path / "made.ckpt")
    tensors = state_tensors(checkpoint, "ema")
    config = infer_policy(checkpoint, tensors)
    assert "uva_jax" not in checkpoint.payload and config == bench_conversion.architecture("tiny")
    values = tensors["model.z_proj.weight"].numpy()
    assert values.dtype == np.float32 and 0.01 < values.std() < 0.03


def test_bench_measures_both_conversions_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    here = lambda name, source, out: bench_conversion._step(name, Path(source), out)  # noqa: E731
    # Not in separate processes, which takes longer.
    monkeypatch.setattr(bench_conversion, "_apart", here)
    monkeypatch.setattr(bench_conversion, "WARM_RUNS", 1)
    found = tmp_path / "figures.json"
    (tmp_path / "work").mkdir()
    command = [
        "bench",
        "conversion",
        "--size",
        "tiny",
        "--out",
        str(tmp_path / "work"),
        "--json",
        str(found),
    ]
    assert main(command) == 0
    figures = json.loads(found.read_text())
    assert list(figures["steps"]) == ["copy", "from_torch", "to_torch"]
    assert all(step["cold"] > 0 and step["warm"] > 0 for step in figures["steps"].values())
    assert figures["kept"] == 4 * 4_602_675
    assert "to_torch" in capsys.readouterr().out.splitlines()[-1]
    assert not list((tmp_path / "work").iterdir())


def _by_command(checkpoint, folder):
    from_torch.from_torch(checkpoint, folder)


def _by_pipeline(checkpoint, folder):
    config = common.get_config()
    config.teacher.checkpoint = str(checkpoint)
    silently(run, config, str(folder), ["convert"])


@pytest.mark.parametrize("convert", [_by_command, _by_pipeline])
def test_a_conversion_never_holds_the_whole_policy(convert, tmp_path, monkeypatch):
    bench_conversion.make(tmp_path / "made.ckpt", "tiny")
    held, most, load = set(), [], from_torch._load

    def counted(name, *args):
        array = load(name, *args)
        held.add(name)
        weakref.finalize(array, held.discard, name)
        most.append(len(held))
        return array

    monkeypatch.setattr(from_torch, "_load", counted)
    monkeypatch.setattr(policy_arrays, "_IN_FLIGHT", 1 << 20)
    convert(tmp_path / "made.ckpt", tmp_path / "out")
    assert len(most) == 494 and max(most) < 494 / 2
