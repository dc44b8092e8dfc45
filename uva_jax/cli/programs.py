"""The pipeline's programs, lowered from shapes alone, for devices that this machine may lack.

Each function lowers the repeated program of a stage by the stage's own builder, which makes the
function, mesh and shardings and takes shapes in place of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from uva_jax.data import batch_shapes
from uva_jax.data.check import BufferView
from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.source import DataOptions
from uva_jax.envs.pusht import IMAGE_SIZE
from uva_jax.graft import assemble, distill, finetune, fixed
from uva_jax.graft.capture import Capture, CaptureOptions, cache_arrays, latent_arrays
from uva_jax.models import diffusion, diffusion_head, surgery
from uva_jax.models.encoding import encode_in_parts
from uva_jax.models.policy import Policy
from uva_jax.models.policy_call import PolicyCall
from uva_jax.models.policy_config import PolicyConfig, steps_of
from uva_jax.runtime import parallel
from uva_jax.runtime.errors import UserError
from uva_jax.runtime.settings import section

Devices = Sequence[jax.Device]


class Loop(NamedTuple):
    """The body of a program's loop. The compiler counts it once; it runs `more` further times."""

    body: jax.stages.Lowered
    more: int


class Program(NamedTuple):
    """One program to compile, with the number of chips and of steps."""

    name: str
    about: str
    chips: int
    lowered: jax.stages.Lowered
    steps: int = 0  # of the stage; 0: it is not a stage
    advice: tuple[str, ...] = ()  # settings to change if it does not fit
    loops: tuple[Loop, ...] = ()


def _frame_size(config) -> tuple[int, int]:
    """Returns height and width of the data's frames; PushT's if there are no data yet."""
    path = Path(config.data.path).expanduser()
    if section(config.data, DataOptions).embedded or not path.exists():
        return IMAGE_SIZE, IMAGE_SIZE
    key = config.data.image_key
    buffer = BufferView(ReplayBuffer.open(path, required=(key,)))
    buffer.add_frames(key)
    return buffer.shape(key)[1:3]


def _one(devices: Devices) -> NamedSharding:
    """Returns the sharding of arrays on the first device."""
    return parallel.replicated(parallel.make_mesh(devices=devices[:1]))


def capture_step(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """Lowers one step of the capture, on all chips."""
    options = section(config.capture, CaptureOptions)
    policy = surgery.abstract_policy(teacher, dtype=dtype)
    capture, frame = Capture(policy, options, devices), _frame_size(config)
    mine = options.batch * (options.strip + teacher.mar.n_frames - 1)
    per_step, size = capture.strips * options.strip, options.encode_frames
    return Program(
        "capture",
        f"{options.batch * options.strip} windows per chip",
        len(devices),
        capture.lower(batch_shapes.strip_shapes(teacher, capture.strips, options.strip, frame)),
        sum(math.ceil(n / per_step) for n in (options.num_samples, options.held_out)),
        (
            f"--config.capture.batch={max(1, options.batch // 2)}",
            f"--config.capture.encode_frames={max(1, (size or mine) // 4)}",
        ),
        (_encoding(policy, (size, *frame, 3), -(-mine // size) - 1, devices),)
        if 0 < size < mine
        else (),
    )


def _encoding(policy, frames: tuple[int, ...], more: int, devices: Devices) -> Loop:
    """Lowers the VAE's loop over parts of a batch."""
    graph, state = nnx.split(policy)

    def encode(state, frames):
        return encode_in_parts(nnx.merge(graph, state), frames, 0)

    shapes = (state, jax.ShapeDtypeStruct(frames, jnp.uint8))
    return Loop(jax.jit(encode).lower(*parallel.shapes_on_mesh(shapes, _one(devices))), more)


def condition_fit(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """Lowers one step of the condition fit, on one chip that holds all samples' features.

    Raises:
      UserError: the head has no condition to fit.
    """
    del dtype  # Stage 1 computes in float32
    options = section(config.distill, distill.DistillOptions)
    head = _grafted(config, surgery.abstract_policy(teacher)).action_head
    if not config.head.replace or head.config.cross_attention != "condition":
        raise UserError(
            "the condition fit needs config.head.replace=True and cross_attention='condition': set "
            "them, or leave the fit out of --only"
        )
    samples = config.capture.num_samples
    z = jax.ShapeDtypeStruct((samples, teacher.mar.n_tokens, head.config.z_channels), jnp.float32)
    features = nnx.eval_shape(lambda head, z: head.memory.features(z), head, z)
    features = tuple(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in features)
    lowered, fit = distill.lower_condition_fit(
        head, features, options=options, seed=config.seed, sharding=_one(devices)
    )
    return Program(
        "condition fit",
        f"batch {fit.batch}, {samples} samples in memory",
        1,
        lowered,
        fit.total,
        ("--config.head.adapter=conv", f"--config.capture.num_samples={samples // 2}"),
    )


def _grafted(config, teacher: Policy) -> Policy:
    """Returns the assembled graft without arrays; the teacher if nothing is grafted."""
    options = section(config.head, assemble.HeadOptions)
    if not options.replace:
        return teacher
    head = assemble.grafted_config(teacher, options)
    grafted = dataclasses.replace(teacher.config, action_head=head)
    return surgery.abstract_policy(grafted, dtype=teacher.dtype)


def finetune_step(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """Lowers one step of Stage 2 on the configuration's mesh, in the phase that trains the most.

    Raises:
      UserError: the mesh or the batch does not fit the devices.
    """
    options = section(config.finetune, finetune.FinetuneOptions)
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch % shares:
        raise UserError(
            f"config.finetune.batch is {options.batch}, which does not divide evenly over the "
            f"mesh's {shares} data shares (data x fsdp): use a multiple of {shares}"
        )
    old = surgery.abstract_policy(teacher, dtype=dtype)
    reference = old if options.teacher_weight else None
    trainer = finetune.Trainer(_grafted(config, old), options, mesh, config.seed, reference)
    if trainer.tokens:
        capture = section(config.capture, CaptureOptions)
        samples = {k: v for k, v in cache_arrays(old, capture).items() if k in ("z", "actions")}
        batch = {
            k: jax.ShapeDtypeStruct((options.batch, *shape), jnp.dtype(kind))
            for k, (shape, kind) in samples.items()
        }
        if fixed.features_are_fixed(trainer.policy, trainer.phases):
            batch = _fixed_shapes(trainer.policy, reference, batch)
    elif options.cache_latents:
        strips = batch_shapes.strip_shapes(teacher, options.batch, 1, _frame_size(config))
        batch = {
            k: jax.ShapeDtypeStruct((options.batch, *shape), jnp.dtype(kind))
            for k, (shape, kind) in latent_arrays(old, strips).items()
        }
    else:
        batch = batch_shapes.single_shapes(teacher, options.batch, _frame_size(config))
    phase = max(trainer.phases, key=lambda phase: len(phase.trainable))
    trained = sum(math.prod(x.shape) for x in trainer.parts(phase)[0].values())
    advice = [] if options.gradient_checkpointing else ["--config.finetune.gradient_checkpointing"]
    if options.batch % (2 * options.accumulate * shares) == 0:
        advice.append(f"--config.finetune.accumulate={2 * options.accumulate}")
    if mesh.shape["fsdp"] == 1 and mesh.size % 4 == 0:
        advice.append("--config.mesh.fsdp=4")
    return Program(
        "Stage 2",
        f"batch {options.batch} of {trainer.source}, mesh "
        f"{'x'.join(str(n) for n in mesh.shape.values())}, {trained / 1e6:.1f} M train",
        mesh.size,
        trainer.lower(phase, batch),
        options.steps,
        tuple(advice),
    )


def _fixed_shapes(policy: Policy, teacher: Policy | None, batch: dict) -> dict:
    """Returns the shapes of a batch of tokens with what frozen layers compute in place of "z"."""
    heads = policy.action_head, teacher and teacher.action_head
    graph, state = nnx.split(heads)

    def found(state, z):
        return fixed.of_tokens(*nnx.merge(graph, state), z)

    return jax.eval_shape(found, state, batch["z"]) | {"actions": batch["actions"]}


def policy_call(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """Lowers the teacher's prediction of actions for one observation, on one chip."""
    policy, one = surgery.abstract_policy(teacher, dtype=dtype), _one(devices)
    graph, state = nnx.split(policy)
    head = teacher.action_head
    spacing = steps_of(head, config.evaluate.sampling_steps)
    steps = len(diffusion.make_schedule(spacing))
    obs = batch_shapes.single_shapes(teacher, 1, _frame_size(config))

    def modulations(state, t, condition):
        return nnx.merge(graph, state).action_head.modulations(t, condition)

    def step(state, x, modulations):
        return nnx.merge(graph, state).action_head.step(x, modulations, None)

    def lowered(function, *shapes):
        return jax.jit(function).lower(*parallel.shapes_on_mesh((state, *shapes), one))

    x = jax.ShapeDtypeStruct((1, head.n_actions, head.channels), jnp.float32)
    condition = jax.ShapeDtypeStruct((1, 1, head.n_actions, head.width), jnp.float32)
    group = diffusion.group_size(steps, diffusion_head.steps_at_once(head.n_actions))
    t = jax.ShapeDtypeStruct((group, 1, 1), jnp.int32)
    one_step = jax.eval_shape(
        lambda *shapes: jax.tree.map(lambda m: m[0], modulations(*shapes)), state, t, condition
    )
    return Program(
        "policy call",
        f"1 observation, {steps} sampling steps",
        1,
        PolicyCall(policy, spacing).lower(obs, one),
        loops=(
            Loop(lowered(modulations, t, condition), steps // group - 1),
            Loop(lowered(step, x, one_step), steps - 1),
        ),
    )


def parameters(config: PolicyConfig) -> int:
    """Returns the number of parameters of a policy."""
    state = nnx.state(surgery.abstract_policy(config), nnx.Param)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state))
