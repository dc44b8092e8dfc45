"""The sections of the configuration that policy training reads; see `sections`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.fields import setting
from uva_jax.runtime.sections import (
    LARGEST_SEED,
    MATMUL_PRECISIONS,
    EMAOptions,
    LoopOptions,
    Section,
    no_schedule,
)

# A task mode says which of past, future and actions are given and which are predicted.
TASK_MODES = (
    "video_model",
    "dynamic_model",
    "policy_model",
    "inverse_model",
    "full_dynamic_model",
)


def _no_modes(modes: Mapping) -> str | None:
    if unknown := [m for m in modes if m not in TASK_MODES]:
        return f"{unknown[0]!r} is no task mode; there are {', '.join(TASK_MODES)}"
    if modes and not any(modes.values()):
        return "at least one mode needs a share above 0"
    return None


def _no_levels(multipliers: Sequence) -> str | None:
    return None if multipliers else "the VAE needs at least one level"


@dataclass(frozen=True)
class ModelOptions(Section):
    """Sizes and inputs of a policy trained from random weights; defaults: upstream's for PushT."""

    at: ClassVar[str] = "pretrain.model"

    task: str = setting("pusht", "name of the task, stored in the checkpoint")
    image_size: int = setting(256, "side of the frames in pixels", above=0)
    vae_width: int = setting(128, "channels of the VAE's first level", above=0)
    vae_multipliers: tuple[int, ...] = setting(
        (1, 1, 2, 2, 4), "channels of the VAE's levels over the width", above=0, refuses=_no_levels
    )
    width: int = setting(768, "width of the transformer", above=0)
    depth: int = setting(12, "blocks of the encoder, and of the decoder", above=0)
    heads: int = setting(12, "attention heads of the transformer", above=0)
    dropout: float = setting(0.1, "dropout rate of the transformer", least=0, below=1)
    video_head: tuple[int, int] = setting(
        (1024, 6), "width and blocks of the video head", length=2, above=0
    )
    action_head: tuple[int, int] = setting(
        (1024, 6), "width and blocks of the action head", length=2, above=0
    )
    n_action_steps: int = setting(8, "number of predicted actions that are executed", above=0)
    text_dim: int = setting(
        0,
        "width of the language latents, which come from config.data.language (CLIP's: 512; 0: no "
        "language)",
        least=0,
    )
    past_actions: bool = setting(False, "past actions are an input")
    states: tuple[str, ...] = setting(
        (), "arrays of the robot's state that are an input, concatenated in this order"
    )
    predict_states: bool = setting(True, "future states are predicted in training")
    wrist: bool = setting(False, "a second camera (data.wrist_key) is an input and is predicted")

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(
                f"{self.key('heads')} is {self.heads}, which does not divide "
                f"{self.key('width')}={self.width}"
            )
        if self.wrist and not self.states:
            raise UserError(
                f"{self.key('wrist')} needs {self.key('states')}, because the original reads a "
                "wrist camera only together with the robot's state: set both"
            )


@dataclass(frozen=True)
class VAEOptions(LoopOptions):
    """Training of the VAE on frames of the recording."""

    at: ClassVar[str] = "pretrain.vae_training"

    steps: int = setting(0, "optimiser steps (0: the given VAE is not trained)", least=0)
    batch: int = setting(48, "frames per step", above=0)
    lr: float = setting(8e-4, "learning rate", above=0, most=1)
    warmup: int = setting(100, "steps of learning-rate warm-up", least=0)
    weight_decay: float = setting(
        0.01, "weight decay of AdamW; 1-d tensors (biases, norms) have none", least=0, most=1
    )
    ema: EMAOptions = field(default_factory=lambda: EMAOptions(max_value=0.999))
    frames: int = setting(40_000, "random frames of the training set", above=0)
    kl_weight: float = setting(2e-6, "weight of the KL divergence of the latents", least=0)
    edge_weight: float = setting(
        0.5, "weight of the loss on differences between neighbouring pixels", least=0
    )
    focus: float = setting(
        40.0, "largest weight of a rare pixel relative to the background", least=1
    )
    readout_weight: float = setting(1.0, "weight of the readout head's loss", least=0)
    decode_every: int = setting(
        3, "with a readout head, one frame in this many is decoded too", above=0
    )
    rarity: float = setting(
        0.0, "power of a frame's rarity in its sampling probability (0: uniform)", least=0
    )
    decoder_steps: int = setting(
        0,
        "further steps that train the decoder alone and decode every frame",
        least=0,
    )
    decoder_rarity: float = setting(0.0, "rarity in the decoder's steps", least=0)
    checkpoint_every: int = setting(500, "steps between resumable states", above=0)
    log_every: int = setting(20, "steps between logged lines", above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.decode_every:
            raise UserError(
                f"{self.key('decode_every')} is {self.decode_every}, but must divide "
                f"{self.key('batch')}={self.batch}"
            )


@dataclass(frozen=True)
class AugmentOptions(Section):
    """Upstream's augmentation, as views of the frames that are encoded once.

    Each view takes as much time and disk space as the plain frames.
    """

    at: ClassVar[str] = "pretrain.augment"

    views: int = setting(
        0, "augmented copies of every episode, in addition to the plain one", least=0
    )
    crop: float = setting(
        0.95, "side of the random crop over the frame's, in half of the copies", above=0, most=1
    )
    blur: float = setting(
        2.0, "largest standard deviation of the blur in pixels, in half of the copies", least=0.1
    )


@dataclass(frozen=True)
class ScoreOptions(Section):
    """Rollouts in gym-pusht during training, on seeds that no test uses."""

    at: ClassVar[str] = "pretrain.score"

    every: int = setting(
        0, "steps between rollouts, a multiple of checkpoint_every (0: none)", least=0
    )
    num_seeds: int = setting(50, "seeds that are rolled out", above=0)
    start_seed: int = setting(300_000, "the first of the seeds", least=0, most=LARGEST_SEED)
    max_steps: int = setting(300, "steps of a rollout", above=0)
    sampling_steps: str = setting(
        "10", "diffusion steps of the action head ('': the policy's own)", refuses=no_schedule
    )
    noise_seed: int = setting(0, "seed of the samplers' noise", least=0, most=LARGEST_SEED)


@dataclass(frozen=True)
class PretrainOptions(LoopOptions):
    """Training a policy: `--stage pretrain`, which also runs the stages vae and encode."""

    at: ClassVar[str] = "pretrain"

    mar: str = setting(
        "", "weights to start from: MAR's .pth as published, or a UVA checkpoint ('': none)"
    )
    vae: str = setting(
        "", "VAE to start from: a KL-VAE's .ckpt as published, or a UVA checkpoint ('': none)"
    )
    from_scratch: bool = setting(
        False, "allow random weights where pretrain.mar or pretrain.vae is not given"
    )
    model: ModelOptions = field(default_factory=ModelOptions)
    vae_training: VAEOptions = field(default_factory=VAEOptions)
    readout: str = setting(
        "",
        "array of the data that a readout head predicts in training, as a further loss ('': none)",
    )
    readout_angles: tuple[int, ...] = setting(
        (), "columns of the readout array that are angles in radians", least=0
    )
    readout_weight: float = setting(
        1.0, "first weight of the readout head's loss; it falls to a tenth", least=0
    )
    progress_share: float = setting(
        1.0,
        "share of the training windows that is used after pretrain.progress_start of the steps: "
        "those whose actions shorten their episode the most, compared with other episodes from "
        "similar states of pretrain.readout; for recordings that end when the task is done",
        above=0,
        most=1,
        added=True,
    )
    progress_start: float = setting(
        0.5,
        "share of the steps on all windows, before that selection",
        least=0,
        below=1,
        added=True,
    )
    progress_steps: int = setting(
        32, "steps over which the progress of a window is counted", above=0, added=True
    )
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    different_history_freq: bool = setting(
        False, "random spacing of the past frames, drawn per batch (upstream's name)"
    )
    modes: Mapping[str, float] = setting(
        {},
        "task modes and their shares of the batches; {}: all of the policy's, uniformly",
        free=True,
        least=0,
        refuses=_no_modes,
    )
    video_steps: int = setting(0, "steps of a first phase with mode video_model alone", least=0)
    noise_draws: int = setting(4, "diffusion noise draws for each window (upstream: 1)", above=0)
    matmul_precision: str = setting(
        "default",
        "precision of float32 matrix products: 'default', or 'bfloat16', which rounds the factors "
        "of linear layers and sums in float32 (faster on newer CPUs)",
        choices=MATMUL_PRECISIONS,
    )
    steps: int = setting(
        100_000,
        "optimiser steps (0: keep the policy of pretrain.mar and train its VAE's decoder alone)",
        least=0,
    )
    batch: int = setting(64, "windows per step", above=0)
    gradient_checkpointing: bool = setting(
        False, "recompute the transformer's activations: less memory, more time"
    )
    steps_per_call: int = setting(4, "steps per call of the compiled program", above=0)
    judge_windows: int = setting(512, "held-out windows of the validation losses", above=0)
    score: ScoreOptions = field(default_factory=ScoreOptions)
    memory_gb: float = setting(
        4.0, "GiB of latents that are kept in memory; larger sets are read from disk", least=0
    )
    save_dtype: str = setting(
        "float32",
        "'float32', or 'bfloat16': rounded weights in half the space",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.progress_share < 1 and not self.readout:
            raise UserError(
                f"{self.key('progress_share')} is {self.progress_share}, but {self.key('readout')} "
                "names no array of states by which windows are compared: name one, or set the "
                "share to 1"
            )
        if self.score.every % self.checkpoint_every:
            raise UserError(
                f"{self.score.key('every')} is {self.score.every}, but must be a multiple of "
                f"{self.key('checkpoint_every')}={self.checkpoint_every}, because scores are taken "
                "with the resumable states"
            )

    def shares(self, policy_modes: Sequence[str]) -> dict[str, float]:
        """Returns the probability of every mode; uniform over `policy_modes` by default."""
        given = {m: s for m, s in self.modes.items() if s > 0} or dict.fromkeys(policy_modes, 1.0)
        total = sum(given.values())
        return {m: s / total for m, s in given.items()}
