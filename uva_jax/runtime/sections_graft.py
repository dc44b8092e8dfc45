"""The sections of the configuration that the graft reads, from the head's form to Stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from uva_jax.runtime.fields import setting
from uva_jax.runtime.sections import FitOptions, LoopOptions, Section, no_schedule

FAMILIES = ("cross_attn", "self_attn", "mlp")  # of operators
_LOSSES = ("l1", "l2", "huber")
_DTYPES = ("bfloat16", "float16", "float32")


def _no_phase(phases: Mapping) -> str | None:
    if any(not str(step).isdecimal() for step in phases):
        return "its keys must be numbers of steps, such as {'5000': ('mar/decoder_blocks',)}"
    return None


@dataclass(frozen=True)
class HeadOptions(Section):
    """The grafted head's form and where its operators come from."""

    at: ClassVar[str] = "head"

    cross_attention: str = setting(
        "condition",
        "'condition': cross-attention builds each action step's condition, once per observation; "
        "'residual': it works on the noisy action tokens, at every step",
        choices=("condition", "residual"),
    )
    memory: str = setting(
        "video+aggregate",
        "'video+aggregate': the teacher's aggregator stays and its tokens join the memory (the "
        "safest graft); 'video': the cross-attention has to learn the aggregation",
        choices=("video", "video+aggregate"),
    )
    adapter: str = setting(
        "conv",
        "'conv': the aggregator's first convolution, pooled to 4x4 a frame; or 'linear'",
        choices=("conv", "linear"),
    )
    num_heads: int = setting(8, "attention heads of the cross-attention", above=0)
    self_attn_heads: int = setting(8, "attention heads of the self-attention", above=0)
    cross_mlp_ratio: int = setting(
        2, "hidden width of the cross-attention's own feed-forward over its width", above=0
    )
    mlp_ratio: int = setting(4, "hidden width of the MLP operators over the head's width", above=0)
    self_attn_window: int = setting(
        4, "action steps to either side that a windowed_self_attn looks at", above=0, added=True
    )
    depth: int = setting(0, "blocks (0: as many as the teacher's head has)", least=0)
    start: str = setting(
        "preserve",
        "'preserve': MLP operators start as exact copies of the teacher's blocks, widened, with "
        "the self-attention's gate closed; 'random': all operators start fresh",
        choices=("preserve", "random"),
    )
    operators: tuple[str, ...] = setting(
        (),
        "operators of each block as 'cross,self,mlp', or one entry for all blocks; (): "
        "'cross_attn,self_attn,mlp'. There are also pooled_cross_attn, windowed_self_attn, swiglu, "
        "none in the place of an attention, 'package.module:Class' for your own, and the entry "
        "'keep' for a block that stays the teacher's",
    )
    init_paths: Mapping[str, str] = setting(
        dict.fromkeys(FAMILIES, ""),
        "operator folder to load; '': from this run's distillation, or a fresh start (with a line "
        "that says so) where that did not run",
    )


@dataclass(frozen=True)
class CaptureOptions(Section):
    """Which of the teacher's activations are kept, and how many."""

    at: ClassVar[str] = "capture"

    num_samples: int = setting(8192, "windows cached (8k to 16k)", above=0)
    held_out: int = setting(512, "further windows, from held-out episodes, to judge by", above=0)
    strip: int = setting(
        1, "neighbouring windows that share encoded frames (1: every window on its own)", above=0
    )
    batch: int = setting(16, "strips a step, over all devices", above=0)
    blocks: bool = setting(True, "store every block's input and residual too")
    dtype: str = setting("bfloat16", "dtype of stored activations", choices=_DTYPES)
    encode_frames: int = setting(0, "frames the VAE takes at a time (0: all)", least=0)


@dataclass(frozen=True)
class DistillOptions(FitOptions):
    """Stage 1: every operator learns the teacher's activations."""

    at: ClassVar[str] = "distill"

    operators: tuple[str, ...] = setting(
        FAMILIES, "families of operators that are distilled", choices=FAMILIES
    )
    epochs: int = setting(200, "passes over the cache", above=0)
    lr: float = setting(1e-4, "learning rate", above=0, most=1)
    loss: Mapping[str, str] = setting(
        {"cross_attn": "l1", "self_attn": "l1", "mlp": "l2"},
        "distance to the teacher's activations: l1, l2 or huber",
        choices=_LOSSES,
    )
    fresh_noise: bool = setting(
        True,
        "draw new diffusion noise for every batch and recompute the teacher's blocks from the "
        "cached tokens (nearly free), or use the stored block activations",
    )
    block_epochs: int = setting(
        0, "epochs of self-attention and MLP operators (0: as above)", least=0
    )
    block_lr: float = setting(
        0.0, "learning rate of self-attention and MLP operators (0: as above)", least=0, most=1
    )
    sampling_steps: str = setting(
        "",
        "diffusion steps when heads are compared by their samples ('': the policy's own)",
        refuses=no_schedule,
    )


@dataclass(frozen=True)
class FinetuneOptions(LoopOptions):
    """Stage 2: the graft trained end to end on part of the data."""

    at: ClassVar[str] = "finetune"

    data_fraction: float = setting(
        0.1,
        "share of the training episodes, whole ones, picked by seed",
        above=0,
        most=1,
    )
    reuse_cache: bool = setting(
        False,
        "take the windows that capture has cached instead of encoding data_fraction of the "
        "episodes; needs everything before the head frozen: freeze=('mar',)",
    )
    freeze_encoder: bool = setting(True, "keep VAE and MAR encoder as they are")
    freeze: tuple[str, ...] = setting(
        (), "further path patterns that stay, such as 'mar' or 'action_head/memory'"
    )
    unfreeze_at: Mapping[str, tuple[str, ...]] = setting(
        {},
        "path patterns that stay until a step: {'5000': ('mar/decoder_blocks',)}",
        free=True,
        refuses=_no_phase,
    )
    dropout: bool = setting(False, "the transformer's dropout while fine-tuning")
    noise_draws: int = setting(1, "diffusion draws of the head for each window of a batch", above=0)
    teacher_weight: float = setting(
        0.0,
        "weight of the mean square between the outputs of teacher and graft on the same noisy "
        "actions, beside the diffusion loss of the data (0: that alone)",
        least=0,
    )
    use_lora: bool = setting(False, "train low-rank adapters in place of the targets' kernels")
    lora_rank: int = setting(64, "rank of the adapters", above=0)
    lora_targets: tuple[str, ...] = setting(
        ("mar/decoder_blocks/*/attn/*", "mar/decoder_blocks/*/mlp/*"),
        "path patterns of the kernels that get adapters",
    )
    gradient_checkpointing: bool = setting(
        False, "compute the decoder's activations twice: less memory, more time"
    )
