"""The table that maps torch parameter names to flax paths, used in both directions.

A line names a torch module, its flax module and the type of layer, which gives its tensors and
their layouts. `{i}` and `{j}` stand for an index, `{f}` for a name, `{n}` and `{l}` for the names
of an operator's norms and of its other layers. Every torch name must match exactly one line or be
listed as ignored; all problems of a checkpoint are reported together.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The change of a tensor's layout from torch to flax, and its `inverse`."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _identity(x: np.ndarray) -> np.ndarray:
    return x


SAME = Layout(_identity, _identity)
TRANSPOSE = Layout(lambda x: x.T, lambda x: x.T)
# (out, in, *window) <-> (*window, in, out), any number of window axes.
CONV = Layout(
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)
# ConvTranspose3d (in, out, k, 1, 1) <-> one matrix per output offset (k, in, out).
CONV_TRANSPOSE_TIME = Layout(
    lambda x: np.moveaxis(x[..., 0, 0], 2, 0),
    lambda x: np.moveaxis(x, 0, 2)[..., None, None],
)

# type of layer -> ((torch tensor, flax tensor, layout), ...)
KINDS: dict[str, tuple[tuple[str, str, Layout], ...]] = {
    "linear": ((".weight", "/kernel", TRANSPOSE), (".bias", "/bias", SAME)),
    "conv": ((".weight", "/kernel", CONV), (".bias", "/bias", SAME)),
    "norm": ((".weight", "/scale", SAME), (".bias", "/bias", SAME)),
    "time_conv": ((".weight", "/kernel", CONV_TRANSPOSE_TIME), (".bias", "/bias", SAME)),
    "param": (("", "", SAME),),
}

IGNORED = {
    r"_dummy_variable": "an empty marker of the original policy class",
    r"text_model\.(vision_model\..*|visual_projection\.weight|logit_scale)": (
        "CLIP's vision tower, which UVA does not use"
    ),
    r"text_model\.text_model\.embeddings\.position_ids": "a constant: position indices",
}


def _vae(side: str, levels: str) -> list[tuple[str, str, str]]:
    torch, flax = f"vae_model.{side}", f"vae/{side}"
    lines = [
        (f"{torch}.conv_in", f"{flax}/conv_in", "conv"),
        (f"{torch}.conv_out", f"{flax}/conv_out", "conv"),
        (f"{torch}.norm_out", f"{flax}/norm_out", "norm"),
    ]
    blocks = [
        (f"{torch}.{levels}.{{i}}.block.{{j}}", f"{flax}/{levels}/{{i}}/block/{{j}}"),
        (f"{torch}.mid.block_1", f"{flax}/mid/block_1"),
        (f"{torch}.mid.block_2", f"{flax}/mid/block_2"),
    ]
    for t, f in blocks:
        lines += [(f"{t}.norm{n}", f"{f}/norm{n}", "norm") for n in (1, 2)]
        lines += [(f"{t}.conv{n}", f"{f}/conv{n}", "conv") for n in (1, 2)]
        lines += [(f"{t}.nin_shortcut", f"{f}/nin_shortcut", "conv")]
    attentions = [
        (f"{torch}.{levels}.{{i}}.attn.{{j}}", f"{flax}/{levels}/{{i}}/attn/{{j}}"),
        (f"{torch}.mid.attn_1", f"{flax}/mid/attn_1"),
    ]
    for t, f in attentions:
        lines += [(f"{t}.norm", f"{f}/norm", "norm")]
        lines += [(f"{t}.{n}", f"{f}/{n}", "conv") for n in ("q", "k", "v", "proj_out")]
    resample = "downsample" if side == "encoder" else "upsample"
    lines += [
        (
            f"{torch}.{levels}.{{i}}.{resample}.conv",
            f"{flax}/{levels}/{{i}}/{resample}/conv",
            "conv",
        )
    ]
    return lines


def _mar() -> list[tuple[str, str, str]]:
    tables = (
        "fake_latent fake_latent_x fake_action_latent fake_latent_wrist_x "
        "fake_latent_history_action temporal_pos_embed spatial_pos_embed text_pos_embed "
        "decoder_temporal_pos_embed decoder_spatial_pos_embed decoder_text_pos_embed "
        "diffusion_temporal_embed diffusion_spatial_embed"
    ).split()
    linears = (
        "z_proj z_proj_cond z_proj_wrist action_proj_cond history_action_proj_cond "
        "proprioception_proj_cond proprioception_image_proj_cond text_proj_cond "
        "proj_cond_x_layer decoder_embed"
    ).split()
    lines = [(f"model.{n}", f"mar/{n}", "param") for n in tables]
    lines += [(f"model.{n}", f"mar/{n}", "linear") for n in linears]
    lines += [
        (f"model.{n}", f"mar/{n}", "norm") for n in ("z_proj_ln", "encoder_norm", "decoder_norm")
    ]
    for side in ("encoder", "decoder"):
        t, f = f"model.{side}_blocks.{{i}}", f"mar/{side}_blocks/{{i}}"
        lines += [(f"{t}.norm{n}", f"{f}/norm{n}", "norm") for n in (1, 2)]
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            lines += [(f"{t}.{part}", f"{f}/{part.replace('.', '/')}", "linear")]
    return lines


def _aggregator(torch: str, flax: str) -> list[tuple[str, str, str]]:
    return [
        (f"{torch}.conv.0", f"{flax}/conv", "conv"),
        (f"{torch}.conv.2", f"{flax}/conv_out", "conv"),
        (f"{torch}.fc.0", f"{flax}/fc1", "linear"),
        (f"{torch}.fc.2", f"{flax}/fc2", "linear"),
        (f"{torch}.interpolate", f"{flax}/interpolate", "linear"),
        (f"{torch}.refine.0", f"{flax}/refine1", "linear"),
        (f"{torch}.refine.2", f"{flax}/refine2", "linear"),
        (f"{torch}.conv_transpose3d", flax, "time_conv"),
    ]


def _mlp_head(torch: str, flax: str) -> list[tuple[str, str, str]]:
    t, f = f"{torch}.net", f"{flax}/net"
    return _aggregator(torch, f"{flax}/aggregator") + [
        (f"{t}.time_embed.mlp.0", f"{f}/time_embed/fc1", "linear"),
        (f"{t}.time_embed.mlp.2", f"{f}/time_embed/fc2", "linear"),
        (f"{t}.cond_embed", f"{f}/cond_embed", "linear"),
        (f"{t}.input_proj", f"{f}/input_proj", "linear"),
        (f"{t}.res_blocks.{{i}}.in_ln", f"{f}/res_blocks/{{i}}/in_ln", "norm"),
        (f"{t}.res_blocks.{{i}}.mlp.0", f"{f}/res_blocks/{{i}}/fc1", "linear"),
        (f"{t}.res_blocks.{{i}}.mlp.2", f"{f}/res_blocks/{{i}}/fc2", "linear"),
        (
            f"{t}.res_blocks.{{i}}.adaLN_modulation.1",
            f"{f}/res_blocks/{{i}}/adaLN_modulation",
            "linear",
        ),
        (f"{t}.final_layer.linear", f"{f}/final_layer/linear", "linear"),
        (f"{t}.final_layer.adaLN_modulation.1", f"{f}/final_layer/adaLN_modulation", "linear"),
    ]


def _grafted_head(torch: str, flax: str) -> list[tuple[str, str, str]]:
    """The torch module of the grafted head (`convert/torch/head.py`) has the flax names."""
    lines = [
        (f"{torch}.input_proj", f"{flax}/input_proj", "linear"),
        (f"{torch}.time_embed.fc1", f"{flax}/time_embed/fc1", "linear"),
        (f"{torch}.time_embed.fc2", f"{flax}/time_embed/fc2", "linear"),
        (f"{torch}.final_layer.linear", f"{flax}/final_layer/linear", "linear"),
        (
            f"{torch}.final_layer.adaLN_modulation",
            f"{flax}/final_layer/adaLN_modulation",
            "linear",
        ),
    ]
    lines += [
        (f"{torch}.{n}", f"{flax}/{n}", "param")
        for n in ("queries", "condition_scale", "condition_shift")
    ]
    t, f = f"{torch}.memory", f"{flax}/memory"
    lines += [(f"{t}.{n}", f"{f}/{n}", "linear") for n in ("proj", "aggregate_proj")]
    lines += [(f"{t}.{n}", f"{f}/{n}", "norm") for n in ("norm", "aggregate_norm")]
    lines += [(f"{t}.conv", f"{f}/conv", "conv")]
    lines += _aggregator(f"{t}.aggregator", f"{f}/aggregator")
    # Operators are open to new ones, so their layers are known by name: norms begin with "norm"
    # (the MLP keeps the original's "in_ln"), the other layers are Linears, the rest are arrays.
    t, f = f"{torch}.blocks.{{i}}.{{f}}", f"{flax}/blocks/{{i}}/{{f}}"
    lines += [(f"{t}.{{n}}", f"{f}/{{n}}", "norm"), (f"{t}.{{l}}", f"{f}/{{l}}", "linear")]
    return lines + [(f"{t}.{{l}}", f"{f}/{{l}}", "param")]


def _text_tower() -> list[tuple[str, str, str]]:
    torch, flax = "text_model.text_model", "text_model"
    lines = [
        (f"{torch}.embeddings.{n}.weight", f"{flax}/{n}", "param")
        for n in ("token_embedding", "position_embedding")
    ]
    lines += [
        (f"{torch}.final_layer_norm", f"{flax}/final_layer_norm", "norm"),
        ("text_model.text_projection", f"{flax}/text_projection", "linear"),
    ]
    t, f = f"{torch}.encoder.layers.{{i}}", f"{flax}/layers/{{i}}"
    lines += [(f"{t}.layer_norm{n}", f"{f}/layer_norm{n}", "norm") for n in (1, 2)]
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        lines += [(f"{t}.self_attn.{part}", f"{f}/self_attn/{part}", "linear")]
    return lines + [(f"{t}.mlp.{n}", f"{f}/mlp/{n}", "linear") for n in ("fc1", "fc2")]


def _normalizer() -> list[tuple[str, str, str]]:
    t, f = "normalizer.params_dict.{f}", "normalizer/{f}"
    return [(f"{t}.{n}", f"{f}/{n}", "param") for n in ("scale", "offset")] + [
        (f"{t}.input_stats.{n}", f"{f}/input_stats/{n}", "param")
        for n in ("min", "max", "mean", "std")
    ]


HEADS = {
    "model.diffloss": "video_head",
    "model.diffloss_wrist": "wrist_head",
    "model.diffactloss": "action_head",
    "model.diffproploss": "proprio_head",
}

TABLE: tuple[tuple[str, str, str], ...] = tuple(
    _vae("encoder", "down")
    + _vae("decoder", "up")
    + [
        ("vae_model.quant_conv", "vae/quant_conv", "conv"),
        ("vae_model.post_quant_conv", "vae/post_quant_conv", "conv"),
    ]
    + _mar()
    + [line for torch, flax in HEADS.items() for line in _mlp_head(torch, flax)]
    + _grafted_head("model.diffactloss", "action_head")
    + _text_tower()
    + _normalizer()
)

_HOLES = re.compile(r"\\\{(\w)\\\}")
_NAMES = {
    "i": r"\d+",
    "j": r"\d+",
    "f": "[^./]+",
    "n": r"norm[^./]*|in_ln",
    "l": r"(?!norm|in_ln\b)[^./]+",
}


def _pattern(template: str) -> re.Pattern:
    """Returns the template as a full-match pattern with named groups."""

    def group(match: re.Match) -> str:
        name = match.group(1)
        return f"(?P<{name}>{_NAMES[name]})"

    return re.compile(_HOLES.sub(group, re.escape(template)))


@functools.cache
def _compiled() -> tuple[tuple[re.Pattern, str, re.Pattern, str, Layout], ...]:
    return tuple(
        (_pattern(t + t_end), t + t_end, _pattern(f + f_end), f + f_end, layout)
        for t, f, kind in TABLE
        for t_end, f_end, layout in KINDS[kind]
    )


def to_flax(name: str) -> tuple[str, Layout] | None:
    """Returns the flax path (joined by "/") and layout of a torch name, or None."""
    for pattern, _, _, flax, layout in _compiled():
        if match := pattern.fullmatch(name):
            return flax.format(**match.groupdict()), layout
    return None


def to_torch(path: str) -> tuple[str, Layout] | None:
    """Returns the torch name and layout of a flax path, or None."""
    for _, torch, pattern, _, layout in _compiled():
        if match := pattern.fullmatch(path):
            return torch.format(**match.groupdict()), layout
    return None


def ignored(name: str) -> str | None:
    """Returns why a torch name is ignored, or None."""
    for pattern, why in IGNORED.items():
        if re.fullmatch(pattern, name):
            return why
    return None


def plan(names: Iterable[str]) -> tuple[dict[str, tuple[str, Layout]], dict[str, str], list[str]]:
    """Sorts torch names into targets, ignored ones and problems.

    Returns:
      {flax path: (torch name, layout)}, {ignored name: why}, [problem].
    """
    targets: dict[str, tuple[str, Layout]] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    for name in names:
        if why := ignored(name):
            skipped[name] = why
        elif (found := to_flax(name)) is None:
            problems.append(f"no rule for {name}")
        elif found[0] in targets:
            problems.append(f"{name} and {targets[found[0]][0]} both map to {found[0]}")
        else:
            targets[found[0]] = (name, found[1])
    return targets, skipped, problems
