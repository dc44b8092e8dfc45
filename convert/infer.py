"""Infers a policy's architecture from a checkpoint's cfg and the shapes of its tensors.

Shapes come first; the cfg gives what shapes do not determine (numbers of attention heads, sampling
steps, dropout), and the two must agree. Only this module turns UVA's choices by task name into
fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from convert.cfg import AR, Cfg, check, check_horizon
from uva_jax.models import policy_config as pc
from uva_jax.runtime.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

# Attention heads by `model_size` (upstream's presets); shapes determine everything else.
_PRESET_HEADS = {
    "mar_tiny": (6, 768),
    "mar_small": (6, 768),
    "mar_base": (12, 768),
    "mar_large": (16, 1024),
    "mar_huge": (16, 1280),
}
_UMI_STATE = (
    "robot0_eef_pos",
    "robot0_eef_rot_axis_angle",
    "robot0_gripper_width",
    "robot0_eef_rot_axis_angle_wrt_start",
)
_TOWER = "text_model.text_model."
_CLIP_HEAD_WIDTH = 64  # of every attention head in every CLIP: their number is width // 64
_ROBOMIMIC_STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns 1 + the largest index that the pattern's group matches."""
    found = [int(m.group(1)) for name in shapes if (m := re.match(pattern, name))]
    return 1 + max(found, default=-1)


class _Reader:
    """Shapes by name; a missing one raises a UserError."""

    def __init__(self, shapes: Shapes, source: str):
        self.shapes, self.source = shapes, source

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise UserError(
                f"{self.source} has no tensor {name!r}, so it is not a whole UVA policy; "
                "give a checkpoint that UVA's training wrote"
            )
        return tuple(self.shapes[name])


def infer_config(shapes: Shapes, cfg: Mapping, source: str) -> pc.PolicyConfig:
    """Infers the architecture of a UVA checkpoint.

    Args:
      shapes: tensor name (as in `state_tensors`) -> shape.
      cfg: the checkpoint's configuration with resolved interpolations.
      source: the file, for error messages.

    Raises:
      UserError: tensors are missing, or cfg and shapes contradict each other.
    """
    get, said = _Reader(shapes, source), Cfg(cfg, source)
    if not any(name.startswith(("model.diffactloss.", "model.diffloss.")) for name in shapes):
        raise UserError(
            f"{source} has neither an action head nor a video head (no tensor model.diffactloss.* "
            "or model.diffloss.*): it is not a UVA policy; give a checkpoint that UVA's training "
            "wrote"
        )
    task = str(said.get("task.name", "unknown"))
    if said.get("task.dataset.dataset_type") == "multitask":
        task += "_multitask"  # PushT-M: the original distinguishes it from PushT only by its data
    vae = _vae(get)
    patch, token_dim = said.integer(f"{AR}.patch_size", 1), get["model.z_proj.weight"][1]
    if vae.z_channels * patch**2 != token_dim or patch < 1:
        wanted = f"such that patches of {vae.z_channels} latent channels make {token_dim} numbers"
        said.refuse(f"{AR}.patch_size", patch, wanted)
    side = math.isqrt(get["model.spatial_pos_embed"][1])
    if side * side != get["model.spatial_pos_embed"][1]:
        raise UserError(
            f"{source} has {get['model.spatial_pos_embed'][1]} tokens per frame, which is not a "
            "square grid; give a checkpoint that UVA's training wrote"
        )
    image_size = side * patch * vae.stride
    stated = said.integer(f"{AR}.img_size", None)
    if stated is not None and stated != image_size:
        raise UserError(
            f"{source}: its cfg says img_size {stated}, but its tensors hold a {side}x{side} grid, "
            f"which is {image_size} px; one of them is damaged"
        )
    mar, proprio_keys = _mar(get, said, task, (side, side))
    check_horizon(said, mar.n_frames)
    steps = str(said.get(f"{AR}.num_sampling_steps", "100"))
    act_steps = str(said.get(f"{AR}.act_diff_testing_steps", "100"))
    act_train = said.integer(f"{AR}.act_diff_training_steps", 1000)
    common = {"n_frames": mar.n_frames, "grid": mar.grid}
    action = {**common, "train_steps": act_train}
    heads = {
        "video_head": _head(get, "model.diffloss", steps, clip=False, **common),
        "wrist_head": _head(get, "model.diffloss_wrist", steps, clip=False, **common),
        "proprio_head": _head(get, "model.diffproploss", act_steps, clip=True, **action),
        "action_head": _head(get, "model.diffactloss", act_steps, clip=True, **action),
    }
    key = "model.policy.action_model_params.act_model_type"
    stated = said.choice(key, None, pc.AGGREGATORS)
    found = heads["action_head"] and heads["action_head"].aggregator
    if stated is not None and found is not None and stated != found:
        raise UserError(
            f"{source}: its cfg says act_model_type {stated!r}, but its tensors are a {found!r} "
            "head; one of them is damaged"
        )
    fields = normalizer_fields(shapes)
    config = pc.PolicyConfig(
        task=task,
        image_size=image_size,
        patch_size=patch,
        vae=vae,
        mar=mar,
        **heads,
        normalizer_type=str(said.get("task.dataset.normalizer_type", "all")),
        normalizer_fields=fields,
        proprio_keys=proprio_keys,
        n_obs_steps=said.integer("task.env_runner.n_obs_steps", 16),
        n_action_steps=said.integer("model.policy.n_action_steps", 8),
        shift_action=said.flag("model.policy.shift_action", True),
        different_history_freq=said.flag("model.policy.different_history_freq"),
        temperature=said.number(f"{AR}.temperature", 1.0, 0.0),
        num_iter=said.integer(f"{AR}.num_iter", 1),
        cfg=said.number(f"{AR}.cfg", 1.0, 0.0),
        cfg_schedule=str(said.get(f"{AR}.cfg_schedule", "linear")),
        language_model=said.get("task.dataset.language_emb_model"),
        task_modes=said.modes(),
        text_tower=text_tower(shapes, source),
    )
    check(config, source, inferred=True)
    return config


def normalizer_fields(shapes: Shapes) -> tuple[tuple[str, int], ...]:
    """Returns the fields of the normaliser as sorted pairs (name, width)."""
    return tuple(
        sorted(
            (m.group(1), (tuple(shape) or (1,))[0])
            for name, shape in shapes.items()
            if (m := re.fullmatch(r"normalizer\.params_dict\.([^.]+)\.scale", name))
        )
    )


def infer_vae(shapes: Shapes, source: str) -> pc.VAEConfig:
    """Infers the VAE's architecture from the shapes of its tensors (`vae_model.*`).

    Raises:
      UserError: a tensor is missing.
    """
    return _vae(_Reader(shapes, source))


def _vae(get: _Reader) -> pc.VAEConfig:
    ch = get["vae_model.encoder.conv_in.weight"][0]
    levels = _count(get.shapes, r"vae_model\.encoder\.down\.(\d+)\.")
    widths = [get[f"vae_model.encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return pc.VAEConfig(
        ch=ch,
        ch_mult=tuple(w // ch for w in widths),
        num_res_blocks=_count(get.shapes, r"vae_model\.encoder\.down\.0\.block\.(\d+)\."),
        attn_levels=tuple(
            i for i in range(levels) if f"vae_model.encoder.down.{i}.attn.0.q.weight" in get
        ),
        z_channels=get["vae_model.post_quant_conv.weight"][0],
    )


def text_tower(shapes: Shapes, source: str) -> pc.TextTowerConfig | None:
    """Infers the language tower, or None for checkpoints without one.

    Raises:
      UserError: the tower is not CLIP's.
    """
    get = _Reader(shapes, source)
    if not any(name.startswith(_TOWER) for name in get.shapes):
        return None
    vocab_size, width = get[f"{_TOWER}embeddings.token_embedding.weight"]
    if width % _CLIP_HEAD_WIDTH:
        raise UserError(
            f"{get.source}: its language tower has width {width}, which is not a multiple of "
            f"{_CLIP_HEAD_WIDTH}, so it is not CLIP's and its number of attention heads is "
            "unknown; give a checkpoint that UVA's training wrote"
        )
    return pc.TextTowerConfig(
        vocab_size=vocab_size,
        width=width,
        depth=_count(get.shapes, rf"{re.escape(_TOWER)}encoder\.layers\.(\d+)\."),
        num_heads=width // _CLIP_HEAD_WIDTH,
        max_length=get[f"{_TOWER}embeddings.position_embedding.weight"][0],
        projection=get["text_model.text_projection.weight"][0],
        mlp_width=get[f"{_TOWER}encoder.layers.0.mlp.fc1.weight"][0],
    )


def _heads(get: _Reader, said: Cfg, side: str, width: int) -> int:
    fixture = said.integer(f"fixture.{side}_num_heads", None)
    if fixture is not None:
        return fixture
    size = str(said.get(f"{AR}.model_size", ""))
    heads, preset_width = _PRESET_HEADS.get(size, (None, None))
    if heads is None or preset_width != width:
        raise UserError(
            f"{get.source}: model_size {size!r} at width {width} is not one of UVA's sizes "
            f"({', '.join(_PRESET_HEADS)}), and shapes do not determine the number of attention "
            f"heads; add cfg.fixture.{side}_num_heads to the checkpoint"
        )
    return heads


def _mar(
    get: _Reader, said: Cfg, task: str, grid: tuple[int, int]
) -> tuple[pc.MARConfig, tuple[str, ...]]:
    dim, token_dim = get["model.z_proj.weight"]
    dec = get["model.decoder_embed.weight"][0]
    history = "model.fake_latent_history_action" in get
    wrist = "model.z_proj_wrist.weight" in get
    proprio_dim, proprio_image, proprio_keys = 0, False, ()
    streams = 3 + history + wrist
    fused = get["model.proj_cond_x_layer.weight"][1] / dim
    if "model.proprioception_proj_cond.weight" in get:
        proprio_dim = get["model.proprioception_proj_cond.weight"][1]
        proprio_image = fused == streams + 2
        streams += 1 + proprio_image
        proprio_keys = _UMI_STATE if "umi" in task else _ROBOMIMIC_STATE
        if "pusht" in task:
            proprio_keys = ("agent_pos",)
    if fused != streams:
        raise UserError(
            f"{get.source}: its fusing layer takes {fused:g} inputs, but its other tensors give "
            f"{streams}; the file mixes two models"
        )
    return pc.MARConfig(
        encoder_embed_dim=dim,
        encoder_depth=_count(get.shapes, r"model\.encoder_blocks\.(\d+)\."),
        encoder_num_heads=_heads(get, said, "encoder", dim),
        decoder_embed_dim=dec,
        decoder_depth=_count(get.shapes, r"model\.decoder_blocks\.(\d+)\."),
        decoder_num_heads=_heads(get, said, "decoder", dec),
        mlp_ratio=get["model.encoder_blocks.0.mlp.fc1.weight"][0] / dim,
        n_frames=get["model.temporal_pos_embed"][1],
        grid=grid,
        token_dim=token_dim,
        action_dim=get["model.action_proj_cond.weight"][1],
        history_action=history,
        proprio_dim=proprio_dim,
        proprio_steps=4 if said.flag("model.policy.different_history_freq") else 16,
        proprio_image=proprio_image,
        wrist=wrist,
        text_dim=get["model.text_proj_cond.weight"][1]
        if "model.text_proj_cond.weight" in get
        else 0,
        text_tokens=get["model.text_pos_embed"][1] if "model.text_pos_embed" in get else 64,
        attn_dropout=said.number(f"{AR}.attn_dropout", 0.1, 0.0, 1.0),
        proj_dropout=said.number(f"{AR}.proj_dropout", 0.1, 0.0, 1.0),
        mask_ratio_min=said.number(f"{AR}.mask_ratio_min", 0.7, 0.0, 1.0),
        label_drop_prob=said.number(f"{AR}.label_drop_prob", 0.1, 0.0, 1.0),
        action_mask_ratio=said.number("model.policy.action_mask_ratio", 0.5, 0.0, 1.0),
    ), proprio_keys


def _aggregator(get: _Reader, prefix: str) -> tuple[str | None, int]:
    """Infers the aggregator's name and number of actions from its tensors."""
    if f"{prefix}.interpolate.weight" in get:
        return "conv_fc", get[f"{prefix}.interpolate.weight"][0]
    if f"{prefix}.conv_transpose3d.weight" in get:
        kernel = get[f"{prefix}.conv_transpose3d.weight"][2]
        return "conv_ori", kernel * get["model.temporal_pos_embed"][1]
    if f"{prefix}.conv.2.weight" in get:
        return "conv2", get[f"{prefix}.conv.2.weight"][0]
    if f"{prefix}.fc.2.weight" in get:
        return "fc2", get[f"{prefix}.fc.2.weight"][0]
    return None, 16


def _head(get: _Reader, prefix: str, steps: str, **fields) -> pc.MLPHeadConfig | None:
    if not any(name.startswith(f"{prefix}.") for name in get.shapes):
        return None
    if f"{prefix}.blocks.0.mlp.fc1.weight" in get:
        return None  # a grafted head: `grafted_config` describes it
    width, channels = get[f"{prefix}.net.input_proj.weight"]
    aggregator, n_actions = _aggregator(get, prefix)
    return pc.MLPHeadConfig(
        channels=channels,
        z_channels=get[f"{prefix}.net.cond_embed.weight"][1],
        width=width,
        depth=_count(get.shapes, rf"{re.escape(prefix)}\.net\.res_blocks\.(\d+)\."),
        aggregator=aggregator,
        n_actions=n_actions,
        sampling_steps=steps,
        **fields,
    )


def stored_config(payload: Mapping, source: str) -> pc.PolicyConfig | None:
    """Returns the architecture that an export of this project stores in the file, or None.

    Raises:
      UserError: it is damaged.
    """
    text = payload.get("uva_jax") if isinstance(payload, Mapping) else None
    if text is None:
        return None
    try:
        config = pc.from_dict(json.loads(text)["policy"])
    except UserError as error:
        raise UserError(f"{source}: its 'uva_jax' entry does not fit: {error}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{source}: its 'uva_jax' entry is damaged ({error!r})") from error
    check(config, source, inferred=False)
    return config
