"""Measures the time and the effect of each part of the training recipe, in one table:

    python -m uva_jax ablate --config configs/pretrain_tiny.py --workdir runs/ablate \
        --config.data.max_episodes=60

The configuration's policy is trained from random weights for a few steps on a few episodes: once as
configured and once for every part that is removed or added, with the same VAE, seed and steps.
Encoding frames in every step, as upstream does, is only timed, because it trains the same policy.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags

from uva_jax.data import source
from uva_jax.data.augment import CropAndBlur
from uva_jax.data.check import check_split
from uva_jax.data.readers import open_reader
from uva_jax.data.windows import WindowSpec
from uva_jax.eval.actions import action_figures, sample_actions
from uva_jax.models.policy import Policy
from uva_jax.pipeline import inputs
from uva_jax.pretrain import architecture, joint, latents
from uva_jax.pretrain.windows import Windows, readout_scale
from uva_jax.runtime import parallel
from uva_jax.runtime import settings as settings
from uva_jax.runtime.errors import UserError, exit_status
from uva_jax.runtime.guards import locked
from uva_jax.runtime.metrics import MetricsWriter, read_metrics
from uva_jax.runtime.sections import EMBEDDED
from uva_jax.runtime.settings import section
from uva_jax.storage.atomic import read_json, write_json
from uva_jax.storage.site import Site

_TIMED = 256  # frames whose encoding is timed
_JUDGED = 128  # held-out windows for which actions are sampled


class Variant(NamedTuple):
    """One row of the table: the difference from the configuration."""

    name: str
    changes: Mapping = {}  # to PretrainOptions
    mirror: bool = True
    views: int = 0
    readout: bool = True


def variants(options: joint.PretrainOptions, *, mirror: bool, readout: bool) -> list[Variant]:
    """Returns the configuration as it is, then with one part removed, then with one added."""
    other = "adamw" if options.optimizer == "muon" else "muon"
    found = [Variant("as configured", mirror=mirror, readout=readout)]
    base = found[0]

    def add(name: str, **more) -> None:
        found.append(base._replace(name=name, **more))

    if options.noise_draws > 1:
        add("one noise draw", changes={"noise_draws": 1})
    if mirror:
        add("no mirror", mirror=False)
    if readout:
        add("no readout head", readout=False)
    add(f"{other} in place of {options.optimizer}", changes={"optimizer": other})
    add("crops and blurs, one view", views=1)
    add("random history spacing", changes={"different_history_freq": True})
    return found


class Bench:
    """The episodes, encoded once with the copies that all variants need, and their VAE."""

    def __init__(self, config, vae_of: Policy, workdir: Path, metrics: MetricsWriter):
        self.config, self.workdir, self.metrics = config, workdir, metrics
        self.data = section(config.data, source.DataOptions)
        model = section(config.pretrain.model, architecture.ModelOptions)
        any_width = WindowSpec.of(vae_of.config).without_widths()
        self.buffer = open_reader(self.data, vae_of, spec=any_width).buffer
        check_split(self.buffer, self.data)
        shape = self.buffer.shape(self.data.action_key)
        wanted = architecture.model_config(model, shape[-1])
        if WindowSpec.of(wanted).more_than_images:
            raise UserError(
                "ablate supports only policies that observe one camera and nothing else: leave "
                "config.pretrain.model.text_dim, past_actions, states and wrist at their defaults"
            )
        if wanted.vae != vae_of.config.vae or wanted.image_size != vae_of.config.image_size:
            raise UserError(
                "the VAE of --policy differs in size from the configuration's: give a policy that "
                "was trained with this configuration"
            )
        fresh = Policy(wanted, dtype=inputs.compute_dtype(config), rngs=nnx.Rngs(config.seed))
        self.policy = architecture.fit_normalizer(fresh, self.buffer, self.data)
        self.policy.vae = vae_of.vae
        augment = config.pretrain.augment
        self.copies = latents.Copies(
            bool(self.data.mirror), 1, CropAndBlur(augment.crop, augment.blur), config.seed
        )
        self.cache = latents.encode_frames(
            Site(workdir / "latents", metrics),
            self.policy,
            self.buffer,
            self.data.image_key,
            self.copies,
        )
        self.moments = latents.Latents.open(self.cache, int(config.pretrain.memory_gb * 2**30))
        self.train, self.held_out = source.split(self.buffer, self.data)
        self.reader = open_reader(dataclasses.replace(self.data, mirror=""), self.policy)
        self.strips = self.reader.strips(self.held_out, strip=1, seed=0).first(_JUDGED)

    def encoding_seconds(self) -> float:
        """Returns the seconds of encoding one frame."""
        mesh = parallel.make_mesh(devices=jax.local_devices())
        encode = latents.encoder(self.policy, mesh)
        frames = self.copies.read(
            self.buffer, self.data.image_key, np.arange(_TIMED) % self.buffer.n_steps
        )
        encode(frames)
        start = time.perf_counter()
        encode(frames)
        return (time.perf_counter() - start) / _TIMED

    def windows(self, mask: np.ndarray, *, mirror: bool, views: int, key: str) -> Windows:
        """Returns the windows of the episodes in `mask` for one variant."""
        return Windows(
            self.buffer,
            mask,
            self.policy,
            self.data if mirror else dataclasses.replace(self.data, mirror=""),
            self.config.seed,
            state_key=key,
            copies=dataclasses.replace(self.copies, views=views),
        )

    def row(self, variant: Variant, options: joint.PretrainOptions) -> dict:
        """Trains and evaluates one variant, or reads the result of an earlier call."""
        folder = self.workdir / variant.name.replace(" ", "_").replace(",", "")
        if (found := read_json(folder / "row.json")) is not None:
            return found
        folder.mkdir(exist_ok=True)
        own, seed = self.config.pretrain, self.config.seed
        key = own.readout if variant.readout else ""
        how = {"mirror": variant.mirror, "views": variant.views, "key": key}
        options = dataclasses.replace(options, **variant.changes)
        scale = readout_scale(self.buffer, key, own.readout_angles, mirrored=variant.mirror)
        with MetricsWriter(folder, "pretrain", fresh=True) as metrics:
            policy = joint.pretrain(
                self.policy,
                self.moments,
                self.windows(self.train, **how),
                self.windows(self.held_out, **how | {"mirror": False, "views": 0}),
                options=options,
                mesh=inputs.mesh_of(self.config),
                seed=seed,
                folder=folder / "states",
                metrics=metrics,
                state_scale=scale,
            )
        found = self._figures(policy, folder, options)
        write_json(folder / "row.json", found)
        return found

    def _figures(self, policy: Policy, folder: Path, options: joint.PretrainOptions) -> dict:
        lines = read_metrics(folder, "pretrain")
        # The first line is left out, because the first call compiles.
        timed = [line for line in lines if "policy/loss" in line][1:]
        if len(timed) < 2:
            raise UserError(
                f"--steps {options.steps} is too few to time: give at least {4 * options.log_every}"
            )
        seconds = (timed[-1]["time"] - timed[0]["time"]) / (timed[-1]["step"] - timed[0]["step"])
        (judged,) = [line for line in lines if "policy/held_out/policy_model/act_loss" in line]
        samples, truth = sample_actions(
            policy, self.reader, self.strips, draws=4, sampling_steps="10", seed=0
        )
        return {
            "seconds": seconds,
            "act_loss": judged["policy/held_out/policy_model/act_loss"],
            "action_mse": action_figures(samples, truth)["mse"],
        }


def table(rows: Mapping[str, Mapping], encoding: float) -> str:
    """Formats the results; `encoding` is the time of encoding a step's frames, in seconds."""
    first = next(iter(rows.values()))
    lines = [f"{'':<30}{'s/step':>8}{'x':>7}{'action loss':>13}{'action MSE':>12}"]

    def line(name, seconds, *cells):
        lines.append(f"{name:<30}{seconds:>8.3f}{seconds / first['seconds']:>7.2f}{''.join(cells)}")

    for name, row in rows.items():
        line(name, row["seconds"], f"{row['act_loss']:>13.4f}", f"{row['action_mse']:>12.5f}")
    line("frames encoded in every step", first["seconds"] + encoding, f"{'same':>13}")
    return "\n".join(lines)


def run(config, workdir: Path, policy: str, steps: int) -> None:
    """Trains all variants and prints the table; an interrupted run resumes at its variant.

    Args:
      config: the configuration.
      workdir: folder of the variants.
      policy: path of the policy whose VAE is used.
      steps: of each variant.

    Raises:
      UserError: the configuration, the policy or the workdir does not fit.
    """
    config = settings.check(config)
    vae_of = inputs.any_policy(policy)
    options = section(config.pretrain, joint.PretrainOptions)
    options = dataclasses.replace(
        options,
        steps=steps,
        warmup=min(options.warmup, steps // 4),
        checkpoint_every=steps,
        log_every=max(options.steps_per_call, steps // 10),
        ema=dataclasses.replace(options.ema, max_value=min(options.ema.max_value, 1 - 10 / steps)),
        score=dataclasses.replace(options.score, every=0),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir, print), MetricsWriter(workdir, "ablate") as metrics:
        about = {k: str(v) for k, v in settings.leaves(config).items()} | {"steps": steps}
        if read_json(workdir / "ablate.json") not in (None, about):
            raise UserError(f"{workdir} holds results of other settings: choose another --workdir")
        write_json(workdir / "ablate.json", about)
        bench = Bench(config, vae_of, workdir, metrics)
        encoding, rows = bench.encoding_seconds(), {}
        chosen = variants(
            options, mirror=bool(config.data.mirror), readout=bool(config.pretrain.readout)
        )
        for variant in chosen:
            metrics.say(variant.name)
            rows[variant.name] = bench.row(variant, options)
        print(
            f"{bench.buffer.n_episodes} episodes, {steps} steps of {options.batch} windows; "
            f"encoding takes {encoding * 1e3:.1f} ms per frame, once for each copy of the recording"
        )
        frames = 2 * bench.policy.config.mar.n_frames * options.batch
        print(table(rows, encoding * frames), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; bad input prints one sentence on stderr and returns status 2."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "Configuration file (see configs/).", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "Folder of the runs.", flag_values=values)
    flags.DEFINE_string(
        "policy",
        EMBEDDED,
        f"Policy whose VAE is used: a policy folder, a UVA .ckpt or '{EMBEDDED}'.",
        flag_values=values,
    )
    flags.DEFINE_integer("steps", 400, "Steps of every run.", lower_bound=8, flag_values=values)

    def command() -> int:
        try:
            values(["ablate", *(sys.argv[1:] if argv is None else argv)])
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{error} (python -m uva_jax settings lists every setting)") from error
        if config.value is None or values.workdir is None:
            raise UserError("say what to train and where: --config FILE --workdir DIR")
        run(config.value, Path(values.workdir), values.policy, values.steps)
        return 0

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
