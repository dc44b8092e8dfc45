"""The sections of the configuration that the graft reads: head, capture, distillation, Stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from uva_jax.runtime.fields import setting
from uva_jax.runtime.sections import (
    MATMUL_PRECISIONS,
    FitOptions,
    LoopOptions,
    Section,
    no_schedule,
)

FAMILIES = ("cross_attn", "self_attn", "mlp")  # of operators
_LOSSES = ("l1", "l2", "huber")
_DTYPES = ("bfloat16", "float16", "float32")


def _no_phase(phases: Mapping) -> str | None:
    if any(not str(step).isdecimal() for step in phases):
        return "its keys must be numbers of steps, such as {'5000': ('mar/decoder_blocks',)}"
    return None


@dataclass(frozen=True)
class HeadOptions(Section):
    """The architecture of the grafted head and the source of its operators."""

    at: ClassVar[str] = "head"

    replace: bool = setting(
        True,
        "False: graft nothing; Stage 2 fine-tunes the teacher with its own head, for comparison",
        added=True,
    )
    cross_attention: str = setting(
        "condition",
        "'condition': cross-attention builds each action step's condition, once per observation; "
        "'residual': it adds to the noisy action tokens, at every diffusion step",
        choices=("condition", "residual"),
    )
    memory: str = setting(
        "video+aggregate",
        "'video+aggregate': video tokens and the tokens of the teacher's aggregator, which stays "
        "(the safest graft); 'video': the cross-attention has to learn the aggregation",
        choices=("video", "video+aggregate"),
    )
    adapter: str = setting(
        "conv",
        "'conv': the aggregator's first convolution, pooled to 4x4 per frame; or 'linear'",
        choices=("conv", "linear"),
    )
    size: str = setting(
        "small",
        "'small': costs about as much as the teacher's head (every second block has a "
        "light_self_attn, and MLPs are as wide as the head); 'large': every block has a full "
        "self_attn and a wider MLP. head.operators and head.mlp_ratio go before it",
        choices=("small", "large"),
    )
    num_heads: int = setting(8, "attention heads of the cross-attention", above=0)
    self_attn_heads: int = setting(8, "attention heads of the self-attention", above=0)
    cross_mlp_ratio: int = setting(
        2, "hidden width of the cross-attention's feed-forward layer over its width", above=0
    )
    mlp_ratio: int = setting(
        0,
        "hidden width of the MLP operators over the head's width (0: 1 if head.size is small, "
        "otherwise 4)",
        least=0,
    )
    self_attn_window: int = setting(
        4, "action steps to either side that a windowed_self_attn looks at", above=0, added=True
    )
    depth: int = setting(0, "blocks (0: as many as the teacher's head has)", least=0)
    start: str = setting(
        "preserve",
        "'preserve': MLP operators start as exact, widened copies of the teacher's blocks and the "
        "self-attention's gate at zero; 'random': all operators start from random weights",
        choices=("preserve", "random"),
    )
    operators: tuple[str, ...] = setting(
        (),
        "operators of each block as 'cross,self,mlp', or one entry for all blocks; (): those of "
        "head.size. There are cross_attn, pooled_cross_attn, self_attn, windowed_self_attn, "
        "light_self_attn, mlp, swiglu, "
        "none in place of an attention, 'package.module:Class' for your own, and the entry "
        "'keep' for a block that stays the teacher's",
    )
    init_paths: Mapping[str, str] = setting(
        dict.fromkeys(FAMILIES, ""),
        "operator folder to load; '': this run's distilled operator, or random weights (a line "
        "says so) if the run has none",
    )


@dataclass(frozen=True)
class CaptureOptions(Section):
    """Which of the teacher's activations are stored, and for how many windows."""

    at: ClassVar[str] = "capture"

    num_samples: int = setting(8192, "training windows that are cached (8k to 16k)", above=0)
    held_out: int = setting(512, "windows of held-out episodes, for validation", above=0)
    strip: int = setting(
        1, "windows of a strip, which share encoded frames (1: no sharing)", above=0
    )
    batch: int = setting(16, "strips per step, over all devices", above=0)
    blocks: bool = setting(True, "also store every block's input and residual")
    dtype: str = setting("bfloat16", "dtype of stored activations", choices=_DTYPES)
    encode_frames: int = setting(0, "frames that the VAE encodes at a time (0: all)", least=0)


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
        0, "epochs of self-attention and MLP operators (0: distill.epochs)", least=0
    )
    block_lr: float = setting(
        0.0, "learning rate of self-attention and MLP operators (0: distill.lr)", least=0, most=1
    )
    sampling_steps: str = setting(
        "",
        "diffusion steps for comparing heads by their samples ('': the policy's own)",
        refuses=no_schedule,
    )


@dataclass(frozen=True)
class ShortenOptions(FitOptions):
    """Stage 3: the fine-tuned head learns to sample in few evaluations."""

    at: ClassVar[str] = "shorten"

    evaluations: int = setting(
        0, "evaluations of the head for each sample (0: no shortened head)", least=0, most=5
    )
    sampling_steps: str = setting(
        "",
        "diffusion steps of the samples that it learns ('': the policy's own)",
        refuses=no_schedule,
    )
    samples: int = setting(2, "samples that it learns for each window", least=2)
    epochs: int = setting(100, "passes over the windows", above=0)
    lr: float = setting(1e-4, "learning rate", above=0, most=1)


@dataclass(frozen=True)
class FinetuneOptions(LoopOptions):
    """Stage 2: fine-tuning of the whole graft on part of the data."""

    at: ClassVar[str] = "finetune"

    data_fraction: float = setting(
        0.1,
        "share of the training episodes, picked by seed",
        above=0,
        most=1,
    )
    reuse_cache: bool = setting(
        False,
        "train on the windows that capture has cached instead of data_fraction of the episodes; "
        "needs everything before the head frozen: freeze=('mar',)",
    )
    cache_latents: bool = setting(
        True,
        "if parameters before the head train: encode every frame once, before the first step, in "
        "place of in every step that reads it",
        added=True,
    )
    freeze_encoder: bool = setting(True, "freeze the VAE and the MAR encoder")
    freeze: tuple[str, ...] = setting(
        (), "further frozen path patterns, such as 'mar' or 'action_head/memory'"
    )
    unfreeze_at: Mapping[str, tuple[str, ...]] = setting(
        {},
        "path patterns that are frozen until a step: {'5000': ('mar/decoder_blocks',)}",
        free=True,
        refuses=_no_phase,
    )
    dropout: bool = setting(False, "apply the transformer's dropout")
    noise_draws: int = setting(1, "diffusion noise draws for each window of a batch", above=0)
    teacher_weight: float = setting(
        0.0,
        "weight of the mean squared error between the outputs of teacher and graft on the same "
        "noisy actions, added to the diffusion loss (0: diffusion loss alone)",
        least=0,
    )
    x0_weight: float = setting(
        100.0,
        "largest weight of a timestep's error (0: all are 1): up to it, the error of eps counts as "
        "that of the actions, so that the timesteps that decide a sample count most",
        least=0,
    )
    interpolation: float = setting(
        1.0,
        "how far the returned parameters are from those before Stage 2 to the fine-tuned ones; "
        "with 0.5 a policy keeps more of what it did well before (arXiv 2109.01903)",
        above=0,
        most=1,
        added=True,
    )
    keep_best: bool = setting(
        True,
        "return the state whose action samples on held-out windows have the smallest error, the "
        "start included, in place of the last one; a state replaces an earlier one only if it is "
        "better by more than a standard error",
    )
    check_every: int = setting(
        0, "steps between the checks of keep_best (0: a tenth of finetune.steps)", least=0
    )
    check_windows: int = setting(128, "held-out windows of such a check", above=0)
    matmul_precision: str = setting(
        "default",
        "of linear layers, as distill.matmul_precision",
        choices=MATMUL_PRECISIONS,
        added=True,
    )
    use_lora: bool = setting(False, "train low-rank adapters instead of the targets' kernels")
    lora_rank: int = setting(64, "rank of the adapters", above=0)
    lora_targets: tuple[str, ...] = setting(
        ("mar/decoder_blocks/*/attn/*", "mar/decoder_blocks/*/mlp/*"),
        "path patterns of the kernels that get adapters",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute the decoder's activations: less memory, more time"
    )
