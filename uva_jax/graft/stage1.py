"""Stage 1 as a whole: distils operators from activation caches into one folder per family."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from uva_jax.graft import assemble, distill, distill_blocks, judge
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.atomic import write_json
from uva_jax.storage.sample_store import SampleStore


def distill_operators(
    teacher: Policy,
    train: SampleStore,
    held_out: SampleStore,
    *,
    head_options: assemble.HeadOptions,
    options: distill.DistillOptions,
    seed: int,
    folder: Path,
    metrics: MetricsWriter,
) -> dict:
    """Trains the operator families in `options.operators` and saves each in its folder.

    Args:
      teacher: the policy, in float32.
      train, held_out: caches of its activations.
      head_options: architecture of the head; `init_paths` are loaded before training.
      options: `config.distill`.
      seed: of random weights, sample order and noise.
      folder: gets <family>/ and head.json, and resumable states in training.
      metrics: writer of progress and messages.

    Returns:
      {"operators": rows of `judge`, "head": result of `judge.judge_head`}.

    Raises:
      UserError: the caches lack arrays that the options need, or do not fit the head.
    """
    form = head_options.cross_attention
    names = ["z", "actions", "condition"]
    names += [] if options.fresh_noise else ["h", "residual", "t"]
    if missing := [name for name in names if name not in train.names]:
        raise UserError(
            f"{train.folder} has no {', '.join(missing)}, which config.distill.fresh_noise=False "
            "needs: capture again with config.capture.blocks=True"
        )
    head = assemble.start_head(
        teacher.action_head,
        assemble.grafted_config(teacher, head_options),
        head_options.start,
        seed,
    )
    for family, path in head_options.init_paths.items():
        if path:
            head = assemble.load_operator(path, head, family)
    data, held = train.load(names), held_out.load(names)
    metrics.say(distill.check_budget(options, len(data["z"])))
    common = dict(options=options, seed=seed, folder=folder, metrics=metrics)
    features = distill.memory_features(head, data["z"])
    held_features = distill.memory_features(head, held["z"])
    rows = []
    if form == "condition" and "cross_attn" in options.operators:
        head = distill.distill_condition(head, features, jnp.asarray(data["condition"]), **common)
        rows += judge.judge_condition(
            head, held_features, jnp.asarray(held["condition"]), options.loss["cross_attn"]
        )
    data, held_inputs = (
        {k: jnp.asarray(v) for k, v in part.items() if k != "z"} for part in (data, held)
    )
    key = jax.random.key(seed + 1)
    if any(distill_blocks.trained_families(block, form, options) for block in head.blocks):
        predicted = distill.predict_condition(head, features)
        head = distill_blocks.distill_blocks(head, teacher.action_head, data, predicted, **common)
        judged = judge.judge_blocks(
            head,
            teacher.action_head,
            held_inputs,
            distill.predict_condition(head, held_features),
            options=options,
            key=key,
        )
        rows += judged
    whole = judge.judge_head(
        head,
        teacher.action_head,
        jnp.asarray(held["z"]),
        jnp.asarray(held["actions"]),
        temperature=teacher.config.temperature,
        sampling_steps=options.sampling_steps or None,
        key=key,
    )
    for family in options.operators:
        if not assemble.family_arrays(head, family):
            metrics.say(f"no block has a {family} operator")
            continue
        mine = [row for row in rows if row["operator"] == family]
        assemble.save_operator(folder / family, head, family, {"blocks": mine})
        for row in mine:
            metrics.say(
                f"{family} block {row['block']}: loss {row['scaled']:.4f} (raw {row['raw']:.2g}, "
                f"shuffled {row['shuffled']:.3f}), {100 * (1 - row['fvu']):.1f}% explained"
            )
    metrics.say(
        f"action samples from equal noise: MSE to the teacher's {whole['pair_mse']:.5f}, "
        f"to the demonstrations {whole['graft_mse']:.5f} (teacher {whole['teacher_mse']:.5f})"
    )
    write_json(folder / "head.json", whole)
    return {"operators": rows, "head": whole}
