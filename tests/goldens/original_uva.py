"""The original's side of `check_export.py`, run by the Python of UVA's own environment (3.9).

    python original_uva.py UPSTREAM make TASK CKPT       a random policy of UVA, saved by UVA
    python original_uva.py UPSTREAM sample TASK FOLDER   an export loaded by UVA, and sampled

Workspace, policy, MAR, VAE, configuration, saving and loading are the original's. Only widths and
depths are reduced (by a further model size `mar_reduced`), and CLIP has random weights, because its
own would have to be downloaded. timm's fused attention is off, because in UVA's timm (0.9.7) it
applies dropout in sampling too.
"""

import importlib
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import dill
import hydra
import numpy as np
import torch
from omegaconf import OmegaConf

BATCH, WIDTH, HEADS = 2, 64, 4
# Settings of a task in the original's README and published checkpoints.
SETTINGS = {
    "pusht": [],
    "libero10": [],
    "umi_multi": [
        "task.dataset.dataset_root_dir=none",
        "use_proprioception=True",
        "predict_proprioception=True",
        "shift_action=False",
        "different_history_freq=True",
    ],
    "toolhang": [
        "use_proprioception=True",
        "use_history_action=True",
        "predict_wrist_img=True",
        "predict_proprioception=True",
    ],
}
REDUCED = {
    "model_size": "mar_reduced",
    "pretrained_model_path": "null",
    "diffloss_d": 2,
    "diffloss_w": WIDTH,
    "diffloss_act_d": 3,
    "diffloss_act_w": WIDTH,
    "num_sampling_steps": "'20'",
    "act_diff_testing_steps": "'20'",
}
_PACKAGE = "unified_video_action"
# Modules that only training uses; left out if their imports are not installed.
_TRAINING_ALONE = (
    "dataset.base_dataset",
    "dataset.umi_multi_dataset",
    "model.common.lr_scheduler",
    "utils.load_env",
    "eval.eval",
)


def prepare(upstream):
    """Makes the original importable and adds the reduced sizes."""
    os.environ["TIMM_FUSED_ATTN"] = "0"
    sys.path.insert(0, str(upstream))
    torch.Tensor.cuda = lambda self, *_, **__: self  # the original asks for it by name
    torch.set_num_threads(1)
    for name in _TRAINING_ALONE:
        try:
            importlib.import_module(f"{_PACKAGE}.{name}")
        except ImportError as error:
            print(f"{name} is left out: {error}")
            sys.modules[f"{_PACKAGE}.{name}"] = mock.MagicMock()
    from transformers import CLIPConfig, CLIPModel
    from unified_video_action.model.autoregressive import mar_con_unified as mar
    from unified_video_action.policy import unified_video_action_policy as policy

    side = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
    sizes = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in side.items()}
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    mar.mar_reduced = partial(mar.MAR, norm_layer=norm, **sizes)
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    text = {**sizes, "num_attention_heads": 1, "vocab_size": 99, "eos_token_id": 98}
    vision = {**sizes, "num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)

    def get_text_model(task_name, kind):
        return (CLIPModel(clip) if kind == "clip" else None), None, 30

    policy.get_text_model = get_text_model


def configuration(upstream, task):
    """Returns the original's own configuration of a task with the reduced sizes."""
    model = "model.policy"
    overrides = [s if s.startswith("task") else f"{model}.{s}" for s in SETTINGS[task]]
    overrides += [f"{model}.autoregressive_model_params.{k}={v}" for k, v in REDUCED.items()]
    overrides += [
        f"{model}.action_model_params.predict_action=True",
        f"{model}.vae_model_params.autoencoder_path=null",
        f"{model}.vae_model_params.ddconfig.ch_mult=[1,1,1,1,1]",
        f"+fixture.encoder_num_heads={HEADS}",
        f"+fixture.decoder_num_heads={HEADS}",
    ]
    folder = str(upstream.resolve() / _PACKAGE / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        return hydra.compose(f"uva_{task}", overrides)


def make(upstream, task, out):
    """Makes a workspace with a random policy and saves it."""
    from unified_video_action.model.common.normalizer import LinearNormalizer

    torch.manual_seed(0)
    cfg = configuration(upstream, task)
    workspace = hydra.utils.get_class(cfg.model._target_)(cfg, output_dir=str(out.parent))
    policy = workspace.ema_model
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    if cfg.task.dataset.normalizer_type == "all":
        shapes = dict(cfg.task.shape_meta.obs, action=cfg.task.shape_meta.action)
        fields = {k: v.shape[0] for k, v in shapes.items() if len(v.shape) == 1 and k != "language"}
        normalizer = LinearNormalizer()
        normalizer.fit({name: torch.randn(100, width) for name, width in fields.items()})
        for each in (workspace.model, policy):
            each.set_normalizer(normalizer)
    workspace.save_checkpoint(out, use_thread=False)


def load(folder, task):
    """Loads the exported policy like the original's `eval_sim.py`, after replacing the head."""
    checkpoint = folder / "grafted.ckpt"
    spec = importlib.util.spec_from_file_location("grafted_head", str(folder / "grafted_head.py"))
    grafted_head = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grafted_head)
    with open(str(checkpoint), "rb") as file:
        payload = torch.load(file, pickle_module=dill)
    cfg = payload["cfg"]
    workspace = hydra.utils.get_class(cfg.model._target_)(cfg, output_dir=str(folder))
    for policy in (workspace.model, workspace.ema_model):
        policy.model.diffactloss = grafted_head.GraftedActionHead.from_checkpoint(checkpoint)
    read = workspace.ema_model.model.diffactloss.state_dict()
    read = {name: value.clone() for name, value in read.items()}
    workspace.load_payload(payload, exclude_keys=None, include_keys=None)  # strict
    loaded = workspace.ema_model.model.diffactloss.state_dict()
    assert all(torch.equal(read[name], loaded[name]) for name in loaded)
    return workspace.ema_model.eval()


class Draws:
    """Replaces torch's random draws by the noise of each sampling loop, in order."""

    def __init__(self, loops):
        self.loops, self.later = iter(loops), iter(())

    def randn(self, *shape, **_):
        loop = torch.from_numpy(next(self.loops))
        if isinstance(shape[0], tuple):  # the grafted head draws for all steps at once
            return loop.reshape(shape[0])
        self.later = iter(loop[1:])
        return loop[0].reshape(shape)

    def randn_like(self, x):
        return next(self.later).reshape(x.shape)


def sample(policy, given, mode, rounds, temperature):
    """Calls `sample_tokens` with the given noise; returns actions, video and wrist camera."""
    model, laid_out = policy.model, []
    unpatchify = model.unpatchify
    loops = [given[f"noise/{mode}/{i}"] for i in range(int(given["loops/" + mode]))]
    draws, orders = Draws(loops), torch.from_numpy(given["orders"]).long()

    def tensor(name):
        return torch.from_numpy(given[name]) if name in given else None

    def keep(tokens):
        laid_out.append(unpatchify(tokens))
        return laid_out[-1]

    states = {k[len("state/") :]: tensor(k) for k in given if k.startswith("state/")}
    with (
        mock.patch.object(torch, "randn", draws.randn),
        mock.patch.object(torch, "randn_like", draws.randn_like),
        mock.patch.object(model, "unpatchify", keep),
        mock.patch.object(model, "sample_orders", lambda bsz: orders),
        torch.no_grad(),
    ):
        _, actions = model.sample_tokens(
            bsz=BATCH,
            cond=tensor("cond"),
            text_latents=tensor("text_latents"),
            num_iter=rounds,
            cfg=1.0,
            temperature=temperature,
            history_nactions=tensor("history_nactions"),
            proprioception_input=states,
            task_mode=mode,
        )
    found = {"actions": actions}
    return {**found, **dict(zip(("latents", "wrist_latents"), laid_out))}


def main(upstream, action, task, where):
    upstream, where = Path(upstream), Path(where)
    prepare(upstream)
    if action == "make":
        make(upstream, task, where)
        return
    with np.load(str(where / "given.npz")) as arrays:
        given = dict(arrays)
    OmegaConf.register_new_resolver("eval", eval, replace=True)
    policy = load(where, task)
    found = {}
    for mode, rounds in (("policy_model", 1), ("full_dynamic_model", 2)):
        for name, value in sample(policy, given, mode, rounds, float(given["temperature"])).items():
            found[mode + "/" + name] = value.numpy()
    np.savez(str(where / "found.npz"), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
