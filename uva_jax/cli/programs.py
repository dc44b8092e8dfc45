"""The pipeline's programs, lowered from shapes alone, for devices that need not be there.

Each function gives what one stage runs again and again, as the stage itself makes it: the same
jitted functions, the same meshes and shardings, with shapes in the place of arrays.
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
from jax.sharding import PartitionSpec as P

from uva_jax.data.replay_buffer import ReplayBuffer
from uva_jax.data.source import DataOptions, WindowSpec
from uva_jax.envs.pusht import IMAGE_SIZE
from uva_jax.graft import assemble, distill, finetune
from uva_jax.graft.capture import CaptureOptions, make_capture
from uva_jax.models import diffusion, surgery
from uva_jax.models.lora import init_lora
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime import parallel
from uva_jax.runtime import settings as settings
from uva_jax.runtime.errors import UserError
from uva_jax.train import loop
from uva_jax.train.optim import OptimOptions, loop_optimizer, make_optimizer

Devices = Sequence[jax.Device]


class Loop(NamedTuple):
    """The body of a program's loop. The compiler counts it once; `more` is how often it runs on."""

    body: jax.stages.Lowered
    more: int


class Program(NamedTuple):
    """One program to compile: what runs on how many chips, and how often."""

    name: str
    about: str
    chips: int
    lowered: jax.stages.Lowered
    steps: int = 0  # of the stage; 0: it is no stage
    advice: tuple[str, ...] = ()  # what to change where it does not fit
    loop: Loop | None = None


def _place(tree, shardings):
    """Shapes with shardings (one for all, or a tree of them)."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda x: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _array(sharding, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _key(sharding) -> jax.ShapeDtypeStruct:
    return _place(jax.eval_shape(lambda: jax.random.key(0)), sharding)


def _frame_size(config) -> tuple[int, int]:
    """Height and width of the data's frames; PushT's where the data is not here yet."""
    path = Path(config.data.path).expanduser()
    if settings.section(config.data, DataOptions).embedded or not path.exists():
        return IMAGE_SIZE, IMAGE_SIZE
    return ReplayBuffer.open(path).shape(config.data.image_key)[1:3]


def _windows(config, teacher: PolicyConfig, frames: tuple, lead: tuple, rows) -> dict:
    """What `WindowReader.read` gives: images of shape `frames`, all else led by `lead`."""
    spec = WindowSpec.of(teacher)
    actions = _array(rows, (*lead, spec.n_actions, teacher.action_head.channels), jnp.float32)
    image = _array(rows, (*frames, *_frame_size(config), 3), jnp.uint8)
    batch = {"image": image, "action": actions}
    if spec.wrist:
        batch["wrist_image"] = image
    if spec.past_actions:
        batch["past_action"] = actions
    if spec.text:
        batch["text_latents"] = _array(rows, (*lead, teacher.mar.text_dim), jnp.float32)
    for i, name in enumerate(spec.states):
        # Only the width of all states together is known, and only that matters here.
        width = 1 if i else teacher.mar.proprio_dim - len(spec.states) + 1
        batch[name] = _array(rows, (*lead, spec.state_steps, width), jnp.float32)
    return batch


def capture_step(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """One step of the capture, mapped over all chips."""
    options = settings.section(config.capture, CaptureOptions)
    mesh = parallel.make_mesh(devices=devices)
    policy = surgery.abstract_policy(teacher, dtype=dtype)
    whole, rows = parallel.replicated(mesh), NamedSharding(mesh, P(mesh.axis_names))
    strips = options.batch * mesh.size
    frames = options.strip + teacher.mar.n_frames - 1
    run = make_capture(policy, mesh, blocks=options.blocks, encode_frames=options.encode_frames)
    per_step = strips * options.strip
    mine, size = options.batch * frames, options.encode_frames
    return Program(
        "capture",
        f"{options.batch * options.strip} windows a chip",
        mesh.size,
        run.lower(
            _place(nnx.state(policy), whole),
            _windows(config, teacher, (strips, frames), (strips, options.strip), rows),
            _array(rows, (strips, options.strip), jnp.int32),
            _key(whole),
        ),
        sum(math.ceil(n / per_step) for n in (options.num_samples, options.held_out)),
        (
            f"--config.capture.batch={max(1, options.batch // 2)}",
            f"--config.capture.encode_frames={max(1, (size or mine) // 4)}",
        ),
        _encoding(policy, (size, *_frame_size(config), 3), -(-mine // size) - 1, devices)
        if 0 < size < mine
        else None,
    )


def _encoding(policy, frames: tuple[int, ...], more: int, devices: Devices) -> Loop:
    """The VAE's loop over parts of a batch."""
    graph, state = nnx.split(policy)
    one = parallel.replicated(parallel.make_mesh(devices=devices[:1]))

    def encode(state, frames):
        policy = nnx.merge(graph, state)
        return policy.vae.encode(policy.preprocess(frames))

    return Loop(jax.jit(encode).lower(_place(state, one), _array(one, frames, jnp.uint8)), more)


def condition_fit(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """One step of the condition fit, on one chip, with all samples' features in its memory."""
    del dtype  # Stage 1 computes in float32
    options = settings.section(config.distill, distill.DistillOptions)
    abstract = surgery.abstract_policy(teacher)
    head_config = assemble.grafted_config(
        abstract, settings.section(config.head, assemble.HeadOptions)
    )
    if head_config.cross_attention != "condition":
        raise UserError("the condition fit needs config.head.cross_attention='condition'")
    grafted = dataclasses.replace(teacher, action_head=head_config)
    head = surgery.abstract_policy(grafted).action_head
    one = parallel.replicated(parallel.make_mesh(devices=devices[:1]))
    samples, tokens = config.capture.num_samples, teacher.mar.n_tokens
    z = jax.ShapeDtypeStruct((samples, tokens, head_config.z_channels), jnp.float32)
    features = nnx.eval_shape(lambda head, z: head.memory.features(z), head, z)
    rows = (samples, head_config.n_actions, head_config.width)
    data = {f"feature{i}": _array(one, x.shape, jnp.bfloat16) for i, x in enumerate(features)}
    data["condition"] = _array(one, rows, jnp.bfloat16)
    arrays = _place(surgery.shapes(head), one)
    params = {k: v for k, v in arrays.items() if distill.learnt_by_cross_attention(k)}
    batch = min(options.batch, samples)
    total = options.epochs * (samples // batch)
    optimizer = make_optimizer(
        OptimOptions(
            lr=options.lr,
            warmup_steps=0,
            total_steps=total,
            weight_decay=options.weight_decay,
            clip_norm=options.clip_norm or None,
        )
    )
    moments = _place(jax.eval_shape(optimizer.init, params), one)

    def advance(arrays, *args):
        loss = distill.condition_loss(head, arrays, options.loss["cross_attn"])
        return distill.make_advance(loss, optimizer, config.seed)(*args)

    return Program(
        "condition fit",
        f"batch {batch}, {samples} samples in memory",
        1,
        jax.jit(advance).lower(
            arrays,
            (params, moments),
            data,
            _array(one, (1, batch), jnp.int32),
            _array(one, (1,), jnp.int32),
        ),
        total,
        ("--config.head.adapter=conv", f"--config.capture.num_samples={samples // 2}"),
    )


def finetune_step(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """One step of Stage 2 on the configuration's mesh, in the phase that trains the most.

    Raises:
      UserError: the mesh or the batch does not fit the devices.
    """
    options = settings.section(config.finetune, finetune.FinetuneOptions)
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if options.batch % shares:
        raise UserError(
            f"config.finetune.batch is {options.batch}, which cannot be dealt evenly to the mesh's "
            f"{shares} data shares (data x fsdp): use a multiple"
        )
    old = surgery.abstract_policy(teacher, dtype=dtype)
    head = assemble.grafted_config(old, settings.section(config.head, assemble.HeadOptions))
    policy = surgery.abstract_policy(dataclasses.replace(teacher, action_head=head), dtype=dtype)
    reference = old if options.teacher_weight else None
    arrays = surgery.shapes(policy)
    if options.use_lora:
        arrays |= jax.eval_shape(
            lambda x: init_lora(x, options.lora_targets, options.lora_rank, jax.random.key(0)),
            arrays,
        )
    phases = finetune.plan_phases(arrays, options)
    tokens = finetune.trunk_is_frozen(phases, options)
    finetune.check_reuse(phases, options)
    arrays = _place(arrays, parallel.shardings_for(arrays, mesh))
    params = {k: arrays[k] for k in max((p.trainable for p in phases), key=len)}
    moments = jax.eval_shape(loop_optimizer(options).init, params)
    moments = _place(moments, parallel.shardings_for(moments, mesh))
    state = loop.LoopState(params, params, moments)
    rows, whole = parallel.batch_sharding(mesh, axis=1), parallel.replicated(mesh)
    lead = (1, options.batch)  # one step a call
    if tokens:
        z = (*lead, teacher.mar.n_tokens, head.z_channels)
        batch = {"z": _array(rows, z, jnp.dtype(config.capture.dtype))}
        batch["actions"] = _array(rows, (*lead, head.n_actions, head.channels), jnp.float32)
    else:
        batch = _windows(config, teacher, (*lead, teacher.mar.n_frames), lead, rows)
    loss = finetune.loss_on_tokens if tokens else finetune.loss_on_images
    step = loop.make_steps(
        finetune.graft_loss(policy, loss, options, reference),
        options,
        mesh,
        jax.tree.map(lambda x: x.sharding, state),
    )
    frozen = {k: v for k, v in arrays.items() if k not in params}
    if reference is not None:
        held = finetune.teacher_arrays(surgery.shapes(reference), phases)
        frozen |= _place(held, parallel.shardings_for(held, mesh))
    trained = sum(math.prod(x.shape) for x in params.values())
    advice = [] if options.gradient_checkpointing else ["--config.finetune.gradient_checkpointing"]
    if options.batch % (2 * options.accumulate * shares) == 0:
        advice.append(f"--config.finetune.accumulate={2 * options.accumulate}")
    if mesh.shape["fsdp"] == 1 and mesh.size % 4 == 0:
        advice.append("--config.mesh.fsdp=4")
    return Program(
        "Stage 2",
        f"batch {options.batch} of {'tokens' if tokens else 'frames'}, mesh "
        f"{'x'.join(str(n) for n in mesh.shape.values())}, {trained / 1e6:.1f} M train",
        mesh.size,
        step.lower(state, frozen, batch, _array(whole, (), jnp.int32), _key(whole)),
        options.steps,
        tuple(advice),
    )


def policy_call(config, teacher: PolicyConfig, devices: Devices, dtype) -> Program:
    """The teacher's `predict_action` for one observation, on one chip."""
    policy = surgery.abstract_policy(teacher, dtype=dtype)
    graph, state = nnx.split(policy)
    one = parallel.replicated(parallel.make_mesh(devices=devices[:1]))
    head, state = teacher.action_head, _place(state, one)
    spacing = config.evaluate.sampling_steps or head.sampling_steps
    steps = len(diffusion.make_schedule(spacing, 1000))

    def act(state, obs, key):
        policy = nnx.merge(graph, state)
        return policy.predict_action(obs, key=key, sampling_steps=spacing)

    def denoise(state, x, t, condition):
        return nnx.merge(graph, state).action_head.denoise(x, t, condition)

    obs = _windows(config, teacher, (1, teacher.mar.n_frames), (1,), one)
    del obs["action"]
    body = jax.jit(denoise).lower(
        state,
        _array(one, (1, head.n_actions, head.channels), jnp.float32),
        _array(one, (1,), jnp.int32),
        _array(one, (1, head.n_actions, head.width), jnp.float32),
    )
    return Program(
        "policy call",
        f"1 observation, {steps} sampling steps",
        1,
        jax.jit(act).lower(state, obs, _key(one)),
        loop=Loop(body, steps - 1),
    )


def parameters(config: PolicyConfig) -> int:
    """How many parameters a policy has."""
    state = nnx.state(surgery.abstract_policy(config), nnx.Param)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(state))
