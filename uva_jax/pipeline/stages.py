"""The pipeline as a table: convert -> capture -> distill -> finetune -> evaluate -> export.

Each stage reads only what earlier stages wrote; `pipeline.py` skips, resumes and reruns them. The
work itself is in `graft/`, `train/` and `eval/`: a stage opens its inputs, calls it, and saves.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from convert.formats import torch_file
from convert.from_torch import convert_open, export_records
from convert.to_torch import export_policy
from uva_jax.data import source
from uva_jax.eval import evaluate as evaluation
from uva_jax.graft import assemble, distill, finetune, record, stage1
from uva_jax.graft.capture import CaptureOptions
from uva_jax.models import policy_folder
from uva_jax.models.policy import Policy
from uva_jax.pipeline.engine import Context, Stage
from uva_jax.pipeline.inputs import data_files, load_policy, mesh_of, open_data, teacher_checkpoint
from uva_jax.pipeline.training_stages import TRAINING_STAGES
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.settings import section
from uva_jax.storage import sample_store
from uva_jax.storage.identity import external_hash
from uva_jax.storage.site import Site


def run_convert(context: Context) -> dict:
    """torch checkpoint -> teacher/policy."""
    path, weights = teacher_checkpoint(context.config), context.config.teacher.weights
    checkpoint = torch_file.read(path)
    policy, info = convert_open(checkpoint, weights=weights)
    head = policy.config.action_head
    if head is None or head.kind != "mlp":
        raise UserError(f"{path} has no MLP action head to graft from")
    records = export_records(checkpoint, weights)
    policy_folder.save_policy(context.folder / "policy", policy, source=info, records=records)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param)))
    context.metrics.say(
        f"{path.name}: {policy.config.task}, {count / 1e6:.2f} M parameters, "
        f"{policy.config.image_size} px, {head.aggregator} head, {head.depth} x {head.width}"
    )
    return {"parameters": count, "sha256": info["sha256"], "weights": info["weights"]}


def _site(context: Context, folder: Path) -> Site:
    return Site(folder, context.metrics, context.is_primary, context.barrier)


def _teacher_hash(context: Context) -> str:
    return external_hash(teacher_checkpoint(context.config), context.workdir)


def run_capture(context: Context) -> dict:
    """Windows -> activations/train and activations/held_out."""
    teacher = load_policy(context.inputs["convert"] / "policy", context.config)
    reader = open_data(context, teacher)
    options = section(context.config.capture, CaptureOptions)
    train, held_out = source.split(reader.buffer, reader.options)
    seed = context.config.seed
    result = {}
    for name, mask, samples in (
        ("train", train, options.num_samples),
        ("held_out", held_out, options.held_out),
    ):
        strips = source.plan_strips(
            reader.buffer.episode_ends,
            mask,
            strip=options.strip,
            stride=reader.stride,
            options=reader.options,
            seed=seed,
            count=-(-samples // options.strip),
        )
        cache = record.capture_cache(
            _site(context, context.folder / name),
            teacher,
            strips,
            reader,
            dataclasses.replace(options, num_samples=samples),
            seed=seed + (name == "held_out"),
            origin=_teacher_hash(context),
        )
        result[name] = {"samples": samples, "bytes": cache.nbytes()}
    return result


def run_distill(context: Context) -> dict:
    """Activations -> operators/<family>, and how good they are."""
    config = context.config
    teacher = policy_folder.load_policy(context.inputs["convert"] / "policy")  # float32 throughout
    folders = context.inputs["capture"]
    return stage1.distill_operators(
        teacher,
        sample_store.SampleStore.open(folders / "train"),
        sample_store.SampleStore.open(folders / "held_out"),
        head_options=section(config.head, assemble.HeadOptions),
        options=section(config.distill, distill.DistillOptions),
        seed=config.seed,
        folder=context.folder,
        metrics=context.metrics,
    )


def load_grafted(context: Context, *, say) -> Policy:
    """The teacher with the head that this configuration describes, operators loaded."""
    config = context.config
    teacher = load_policy(context.inputs["convert"] / "policy", config)
    options = section(config.head, assemble.HeadOptions)
    head = assemble.start_head(
        teacher.action_head,
        assemble.grafted_config(teacher, options),
        options.start,
        config.seed,
    )
    distilled = context.inputs.get("distill")
    head = assemble.load_operators(head, options.init_paths, distilled, say)
    return assemble.assemble(teacher, head)


def run_finetune(context: Context) -> dict:
    """Operators back into the policy (grafted/), then Stage 2 (finetune/policy)."""
    policy = load_grafted(context, say=context.metrics.say)
    records = policy_folder.read_records(context.inputs["convert"] / "policy")
    _, about = policy_folder.read_description(context.inputs["convert"] / "policy")
    policy_folder.save_policy(context.workdir / "grafted", policy, source=about, records=records)
    config = context.config
    options = section(config.finetune, finetune.FinetuneOptions)
    teacher = None
    if options.teacher_weight:
        teacher = load_policy(context.inputs["convert"] / "policy", config)
    trainer = finetune.Trainer(policy, options, mesh_of(config), config.seed, teacher)
    tokens = finetune.trunk_is_frozen(trainer.phases, options)
    finetune.check_reuse(trainer.phases, options)
    if options.reuse_cache:
        batches = finetune.token_batches(
            finetune.cached_tokens(context.inputs["capture"] / "train"), options, config.seed
        )
    else:
        batches = _own_data(context, policy, options, tokens)
    count = sum(trainer.arrays[k].size for k in trainer.phases[0].trainable)
    context.metrics.say(
        f"{count / 1e6:.2f} M of {sum(x.size for x in trainer.arrays.values()) / 1e6:.2f} M "
        f"parameters train, on {'cached tokens' if tokens else 'frames'}"
    )
    loss = finetune.loss_on_tokens if tokens else finetune.loss_on_images
    tuned = trainer.run(loss, batches, folder=context.folder, metrics=context.metrics)
    policy_folder.save_policy(context.folder / "policy", tuned, source=about, records=records)
    return {"trainable_parameters": count, "steps": options.steps}


def _own_data(context: Context, policy: Policy, options: finetune.FinetuneOptions, tokens: bool):
    """Batches from `data_fraction` of the episodes, encoded first if the trunk is frozen."""
    config = context.config
    reader = open_data(context, policy)
    mask = finetune.chosen_episodes(reader.buffer, reader.options, options, config.seed)
    capture = section(config.capture, CaptureOptions)
    strips = source.plan_strips(
        reader.buffer.episode_ends,
        mask,
        strip=capture.strip if tokens else 1,
        stride=reader.stride,
        options=reader.options,
        seed=config.seed,
    )
    context.metrics.say(
        f"{int(mask.sum())} of {reader.buffer.n_episodes} episodes, {strips.current.size} windows"
    )
    if not tokens:
        return finetune.image_batches(reader, strips, options, config.seed)
    teacher = load_policy(context.inputs["convert"] / "policy", config)
    record.capture_cache(
        _site(context, context.folder / "tokens"),
        teacher,
        strips,
        reader,
        dataclasses.replace(capture, num_samples=strips.current.size, blocks=False),
        seed=config.seed + 2,
        origin=_teacher_hash(context),
    )
    cached = finetune.cached_tokens(context.folder / "tokens")
    return finetune.token_batches(cached, options, config.seed)


def run_evaluate(context: Context) -> dict:
    """Teacher, graft after Stage 1 and graft after Stage 2 on held-out windows and in rollouts."""
    policies = {
        "teacher": context.inputs["convert"] / "policy",
        "graft_stage1": context.workdir / "grafted",
        "graft": context.inputs["finetune"] / "policy",
    }
    policies = {k: load_policy(v, context.config) for k, v in policies.items()}
    if not context.is_primary:
        return {}
    return evaluation.run(context, policies, _held_out_windows(context, policies["teacher"]))


def _held_out_windows(context: Context, policy: Policy):
    """(reader, single windows of the held-out episodes), or None if none are wanted."""
    if not (count := context.config.evaluate.windows):
        return None
    # Never mirrored: what is asked is how well the demonstrations are met.
    reader = open_data(context, policy, mirror="")
    _, held_out = source.split(reader.buffer, reader.options)
    strips = source.plan_strips(
        reader.buffer.episode_ends,
        held_out,
        strip=1,
        stride=reader.stride,
        options=reader.options,
        seed=context.config.evaluate.noise_seed,
    )
    return reader, strips.first(count)


def run_export(context: Context) -> dict:
    """finetune/policy -> export/grafted.ckpt, in the original's layout."""
    out, policy = context.folder / context.config.export.filename, context.inputs["finetune"]
    _, about = policy_folder.read_description(policy / "policy")
    # What no policy keeps (CLIP's vision half beside a language tower) comes from the teacher.
    kept = set(about.get("ignored", ())) - {"_dummy_variable"}
    base = teacher_checkpoint(context.config) if kept else None
    if not context.is_primary:
        return {}
    found = export_policy(policy / "policy", out, base=base)
    context.metrics.say(f"{out} ({found['bytes'] / 1e6:.1f} MB, {found['tensors']} tensors)")
    return {"file": str(out), "bytes": found["bytes"]}


def _init_paths(config) -> dict:
    return {f"head.init_paths.{k}": v for k, v in config.head.init_paths.items() if v}


_STAGES = (
    *TRAINING_STAGES,
    Stage(
        "convert",
        run_convert,
        needs=(),
        config_keys=("teacher",),
        folder="teacher",
        describe="torch checkpoint to Flax",
        fingerprint=lambda config: {"checkpoint": teacher_checkpoint(config)},
    ),
    Stage(
        "capture",
        run_capture,
        needs=("convert",),
        config_keys=("seed", "precision", "data", "capture"),
        folder="activations",
        describe="the teacher's activations",
        fingerprint=data_files,
    ),
    Stage(
        "distill",
        run_distill,
        needs=("convert", "capture"),
        config_keys=(
            "seed",
            "distill",
            "head.cross_attention",
            "head.memory",
            "head.adapter",
            "head.num_heads",
            "head.self_attn_heads",
            "head.cross_mlp_ratio",
            "head.mlp_ratio",
            "head.depth",
            "head.start",
            "head.operators",
        ),
        folder="operators",
        describe="each operator learns the teacher's activations",
    ),
    Stage(
        "finetune",
        run_finetune,
        needs=("convert", "capture", "distill"),
        config_keys=("seed", "precision", "data", "capture", "head", "finetune"),
        folder="finetune",
        describe="the whole policy, end to end",
        fingerprint=lambda config: data_files(config) | _init_paths(config),
    ),
    Stage(
        "evaluate",
        run_evaluate,
        needs=("convert", "finetune"),
        config_keys=("seed", "precision", "data", "evaluate"),
        folder="eval",
        describe="rollouts and report",
        fingerprint=data_files,
    ),
    Stage(
        "export",
        run_export,
        needs=("finetune",),
        config_keys=("teacher", "export"),
        folder="export",
        describe="back to a torch checkpoint",
    ),
)


def stages(config) -> tuple[Stage, ...]:
    """The table for a configuration: given operators make capture and distillation needless, and
    a policy whose decoder alone trains needs no latents."""
    skipped = set() if config.pretrain.steps else {"encode"}
    if any(config.head.init_paths.values()):
        skipped |= {"distill"} if config.finetune.reuse_cache else {"capture", "distill"}
    table = [s for s in _STAGES if s.name not in skipped]
    names = {s.name for s in table}
    return tuple(
        dataclasses.replace(s, needs=tuple(n for n in s.needs if n in names)) for s in table
    )
