"""The stages of the table "what a graft is worth": a stage for each of its rows.

They extend a workdir's run: conversion, capture and Stage 1 are the run's own. All others are in
the folder worth/ of the workdir, which is a workdir itself.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from uva_jax.eval import actions, evaluate
from uva_jax.graft import finetune
from uva_jax.graft.energy import energy_scores
from uva_jax.pipeline import graft_stages, stages
from uva_jax.pipeline.engine import Context, Stage
from uva_jax.pipeline.inputs import graft_data, load_policy
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.sections import EvaluateOptions
from uva_jax.runtime.sections_graft import FinetuneOptions
from uva_jax.runtime.settings import section
from uva_jax.storage.atomic import read_json, write_json

FOLDER = "worth"  # in the workdir
HEADS = {
    "teacher": "teacher's own head, fine-tuned",
    "graft": "graft, fine-tuned",
    "random": "same head from random operators, fine-tuned",
}
RECIPES = {
    "configured": "as configured",
    "free": "without the teacher's term",
    "held": "with the teacher's term",
    "weighted": "timesteps weighted by the actions' error",
    "unweighted": "all timesteps weighted alike",
    "lora": "LoRA on the trunk",
    "unfreeze": "decoder from a tenth of the steps on",
}
_TRUNK = ("lora", "unfreeze")  # recipes with which more than the head trains
_WEIGHT = 100.0  # of the teacher's term, where the configuration has none
SHARED = ("convert", "capture", "distill", "assemble")
_ERROR_KEYS = tuple(
    f"evaluate.{key}" for key in ("windows", "draws", "sampling_steps", "sampler", "noise_seed")
)
_AGGREGATOR = ("action_head/memory", "action_head/memory/conv", "action_head/memory/aggregator")


class Cell(NamedTuple):
    """A fine-tuned policy of the table: which head, by which recipe, on which share of the data."""

    head: str
    recipe: str
    fraction: float

    @property
    def name(self) -> str:
        """The name of its stage and its folder."""
        return f"{self.head}-{self.recipe}-{self.fraction:g}"


def cell_config(config: ConfigDict, cell: Cell) -> ConfigDict:
    """Returns the configuration that makes a cell."""
    config = ConfigDict(config.to_dict())
    own = config.finetune
    own.data_fraction = cell.fraction
    if cell.recipe == "free":
        own.teacher_weight = 0.0
    elif cell.recipe == "held":
        own.teacher_weight = own.teacher_weight or _WEIGHT
    elif cell.recipe == "weighted":
        own.x0_weight = own.x0_weight or FinetuneOptions.x0_weight
    elif cell.recipe == "unweighted":
        own.x0_weight = 0.0
    elif cell.recipe == "lora":
        own.use_lora, own.reuse_cache = True, False
    elif cell.recipe == "unfreeze":
        # The published recipe opens the decoder after 5k of 50k steps.
        with own.ignore_type():
            own.unfreeze_at = {f"{-(-own.steps // 10)}": ("mar/decoder_blocks",)}
        own.reuse_cache = False
    if cell.head == "teacher":
        config.head.replace, config.shorten.evaluations = False, 0
        # What the patterns freeze in the graft is the aggregator in the teacher's head.
        own.freeze = tuple(
            dict.fromkeys("action_head/aggregator" if p in _AGGREGATOR else p for p in own.freeze)
        )
    elif cell.head == "random":
        config.head.start = "random"
        for family in config.head.init_paths:
            config.head.init_paths[family] = ""
    return config


def cell_stages(base, config, cell: Cell) -> list[Stage]:
    """Returns the stages that make a cell; the last is the cell's own.

    Args:
      base: the configuration of the run.
      config: that of the cell.
      cell: the cell.
    """
    found = {s.name: s for s in shared_stages(config)}
    found = {s.name: found[s.name] for s in shared_stages(base) if s.name in found}
    if cell.head == "random":
        found.pop("distill", None)
        found["assemble"] = dataclasses.replace(
            found["assemble"], needs=("convert",), folder="assembled/random"
        )
    if config.finetune.reuse_cache and cell.fraction < 1:
        found["tokens"] = _stored("tokens", _run_tokens, cell.fraction)
    elif cell.recipe in _TRUNK and config.finetune.cache_latents:
        found["latents"] = _stored("latents", graft_stages.run_latents, cell.fraction)
    (base,) = (s for s in stages.stages(config) if s.name == "finetune")
    own = dataclasses.replace(
        base,
        name=cell.name,
        run=_run_finetune,
        needs=tuple(found),
        derived=(),
        folder=f"policies/{cell.name}",
        describe=f"{HEADS[cell.head]}, {RECIPES[cell.recipe]}",
    )
    return [*found.values(), own]


def _stored(what: str, run, fraction: float) -> Stage:
    """Returns the stage that stores what cells with the same share of the data train on."""
    return Stage(
        what,
        run,
        needs=("convert",),
        config_keys=("seed", "precision", "data", "capture", "finetune.data_fraction"),
        folder=f"{what}/{fraction:g}",
        describe=f"stores {what} of {fraction:g} of the episodes",
        fingerprint=graft_data,
    )


def shared_stages(config) -> list[Stage]:
    """Returns the stages that are the run's own, as a run in its folder `FOLDER` sees them."""
    return [
        dataclasses.replace(s, folder=f"../{s.folder}")
        for s in stages.stages(config)
        if s.name in SHARED
    ]


def _run_tokens(context: Context) -> dict:
    config = context.config
    options = section(config.finetune, FinetuneOptions)
    return graft_stages.run_capture(
        context,
        blocks=False,
        episodes=lambda reader: finetune.chosen_episodes(
            reader.buffer, reader.options, options, config.seed
        ),
    )


def _run_finetune(context: Context) -> dict:
    inputs = dict(context.inputs)
    if "tokens" in inputs:
        inputs["capture"] = inputs["tokens"]
    return graft_stages.run_finetune(dataclasses.replace(context, inputs=inputs))


def judged(source: str, name: str) -> Stage:
    """Returns the stage that measures the error of the policy that stage `source` wrote."""

    def run(context: Context) -> dict:
        policy = load_policy(context.inputs[source] / "policy", context.config)
        if (windows := stages.held_out_windows(context, policy)) is None:
            raise UserError(
                "policies are ranked by their error on held-out windows: set "
                "config.evaluate.windows above 0"
            )
        options = section(context.config.evaluate, EvaluateOptions)
        samples, truth = actions.sample_actions(
            policy,
            *windows,
            draws=max(2, options.draws),
            sampling_steps=options.sampling_steps,
            seed=options.noise_seed,
            sampler=options.sampler,
        )
        executed = slice(policy.config.n_action_steps)
        errors = energy_scores(samples[:, :, executed], truth[:, executed])
        errors = [float(x) for x in errors]
        context.metrics.say(f"error {np.mean(errors):.5f}")
        return {"errors": errors, "mse": actions.action_figures(samples, truth)["mse"]}

    return Stage(
        f"error-{name}",
        run,
        needs=(source,),
        config_keys=("seed", "precision", "data", *_ERROR_KEYS),
        folder=f"errors/{name}",
        describe="measures the error of action samples",
        fingerprint=graft_data,
    )


def rolled_out(source: str, name: str, teacher: Stage | None = None) -> Stage:
    """Returns the stage that rolls out the policy that stage `source` wrote.

    Args:
      source: name of the stage.
      name: of the row.
      teacher: the stage that rolled out the teacher, with which it is compared.
    """

    def run(context: Context) -> dict:
        config, folder = context.config, context.folder
        policies = {"teacher": load_policy(context.inputs["convert"] / "policy", config)}
        if teacher is not None:
            # Its scores are known, so it is not rolled out again.
            known = read_json(context.inputs[teacher.name] / "teacher.json")
            write_json(folder / "teacher.json", known)
            policies["graft"] = load_policy(context.inputs[source] / "policy", config)
        options = dataclasses.replace(section(config.evaluate, EvaluateOptions), videos=0)
        language = stages.language_of(context.config)
        found = evaluate.evaluate(policies, None, options, folder, context.metrics, language)
        return found["teacher" if teacher is None else "graft"]

    return Stage(
        f"rollouts-{name}",
        run,
        needs=tuple(dict.fromkeys(("convert", source, *([teacher.name] if teacher else [])))),
        config_keys=("seed", "precision", "data", "evaluate"),
        folder=f"rollouts/{name}",
        describe="rolls out",
    )
