"""Checks the transformer, its heads and the token sampler against a mar_<task> file.

The comparison covers each training mode with its rows, every block, gradients, the heads' networks
and sampling loops, the full token sampler, and random replacement in training.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert import rules
from convert.checks.compare import Checks
from convert.checks.golden import SAMPLED, Golden, mar_policy
from uva_jax.models import losses, mar, surgery
from uva_jax.models.policy import Policy
from uva_jax.models.token_sampler import sample_tokens

HEADS = {
    "video": "video_head",
    "wrist": "wrist_head",
    "act": "action_head",
    "prop": "proprio_head",
}
ROW_SCALARS = ("mse", "vb", "loss")


def check(golden: Golden, checks: Checks) -> None:
    """Runs every check of one mar_<task> file."""
    policy = mar_policy(golden)
    inputs = _Inputs(golden, policy)
    for mode in golden.children("fwd/"):
        _forward(golden, checks, policy, inputs, mode)
    _gradients(golden, checks, policy, inputs)
    for head in golden.children("net/"):
        _net(golden, checks, policy, head)
    for head in golden.children("sample/"):
        _sample(golden, checks, policy, head)
    for run in golden.children("tokens/"):
        _tokens(golden, checks, policy, inputs, run)
    _replacements(golden, checks, inputs)


class _Inputs:
    """The file's inputs in this project's layout."""

    def __init__(self, golden: Golden, policy: Policy):
        config = policy.config
        self.target, self.cond = (_last(golden[f"in/{k}"]) for k in ("z", "cond"))
        self.nactions = jnp.asarray(golden["in/nactions"])
        self.wrist_target = self.proprio_target = None
        self.streams: dict[str, jax.Array] = {}
        if config.mar.text_dim:
            self.streams["text_latents"] = jnp.asarray(golden["in/text_latents"])
        if config.mar.history_action:
            self.streams["history_nactions"] = jnp.asarray(golden["in/history_nactions"])
        if config.mar.proprio_dim:
            keys = [f"in/prop/{key}" for key in config.proprio_keys]
            self.streams["proprio"] = jnp.concatenate([golden[key] for key in keys], axis=-1)
            targets = [golden[f"{key}_pred"] for key in keys if f"{key}_pred" in golden]
            if targets:
                self.proprio_target = jnp.concatenate(targets, axis=-1)
        if config.mar.proprio_image:
            image = _last(golden["in/prop/second_image_z"])
            self.streams["proprio_tokens"] = mar.patchify(image, config.patch_size)
        if config.mar.wrist:
            self.wrist_target = _last(golden["in/prop/pred_second_image_z"])

    def first(self, batch: int) -> dict[str, jax.Array]:
        """Returns the further inputs of the first `batch` samples."""
        return {name: value[:batch] for name, value in self.streams.items()}


def _last(latents: np.ndarray) -> jax.Array:
    return jnp.asarray(rearrange(latents, "b t c h w -> b t h w c"))


def _draws(golden: Golden, prefix: str, batch: int) -> dict[str, jax.Array]:
    """Returns the recorded draws of a training mode for `losses.latent_loss`."""
    draws = {"mask": jnp.asarray(golden[f"{prefix}/mask"], jnp.float32)}
    for head in HEADS:
        if f"{prefix}/{head}/t" in golden:
            for name in ("t", "noise"):
                rows = jnp.asarray(golden[f"{prefix}/{head}/{name}"])
                rows = rows.astype(jnp.int32) if name == "t" else rows
                draws[f"{name}/{head}"] = rearrange(rows, "(b n) ... -> b n ...", b=batch)
    return draws


@functools.partial(jax.jit, static_argnames=("mode",))
def _loss(policy, inputs: dict, draws: dict, *, mode: str):
    return losses.latent_loss(
        policy,
        inputs["target"],
        inputs["cond"],
        inputs["nactions"],
        task_mode=mode,
        draws=draws,
        streams=inputs["streams"],
        wrist_target=inputs["wrist_target"],
        proprio_target=inputs["proprio_target"],
        train=False,
    )


def _stages(policy: Policy, inputs: _Inputs, draws: dict, mode: str) -> dict[str, jax.Array]:
    """Returns the outputs of encoder, decoder and every block by the names of the format."""

    def run(policy, target, wrist_target, cond, nactions, mask, streams):
        module, patch, stages = policy.mar, policy.config.patch_size, {}
        wrist = None if wrist_target is None else mar.patchify(wrist_target, patch)
        x = module.embed(
            mar.patchify(target, patch),
            mask,
            mar.patchify(cond, patch),
            task_mode=mode,
            nactions=nactions,
            wrist_tokens=wrist,
            **streams,
        )
        stages["z_proj_ln_in"] = x
        encoder_out = module.encode(x)
        x = module.z_proj_ln(x)
        for i, block in enumerate(module.encoder_blocks):
            x = stages[f"encoder_block{i}"] = block(x)
        x = module.decoder_input(encoder_out)
        for i, block in enumerate(module.decoder_blocks):
            x = stages[f"decoder_block{i}"] = block(x)
        return stages | {"encoder_out": encoder_out, "decoder_out": module.decode(encoder_out)}

    return jax.jit(run)(
        policy,
        inputs.target,
        inputs.wrist_target,
        inputs.cond,
        inputs.nactions,
        draws["mask"],
        inputs.streams,
    )


def _forward(golden: Golden, checks: Checks, policy: Policy, inputs: _Inputs, mode: str) -> None:
    prefix = f"fwd/{mode}"
    draws = _draws(golden, prefix, len(inputs.cond))
    orders, rate = jnp.asarray(golden[f"{prefix}/orders"]), golden[f"{prefix}/mask_rate"]
    mask = mar.ordered_mask(orders, rate, policy.config.mar.n_frames)
    checks.compare(f"{prefix}/mask", mask, golden[f"{prefix}/mask"], 0.0)
    stages = _stages(policy, inputs, draws, mode)
    for key in golden.keys(f"{prefix}/"):
        name = key.removeprefix(f"{prefix}/")
        if name.startswith("tokens_stride"):
            folder, stage = name.split("/")
            step = int(folder.removeprefix("tokens_stride"))
        else:
            stage, _, step = name.partition("_stride")
            step = int(step or 1)
        if stage in stages:
            checks.compare(key, stages[stage][:, ::step], golden[key], golden.bound(key))
    if not any(name.startswith("t/") for name in draws):
        return  # the heads' draws of this mode are not recorded
    loss, parts = _loss(policy, vars(inputs), draws, mode=mode)
    for name, value in [("loss", loss), *((k, parts[k]) for k in ("video_loss", "act_loss"))]:
        key = f"{prefix}/{name}"
        if key in golden:
            checks.compare(key, value, golden[key], golden.bound(key))
    for head, attribute in HEADS.items():
        if f"rows/{head}" not in parts:
            continue
        if f"{prefix}/{head}/c" in golden:
            c = getattr(policy, attribute).aggregate(parts["z"])
            key = f"{prefix}/{head}/c"
            checks.compare(key, rearrange(c, "b n c -> (b n) c"), golden[key], golden.bound(key))
        for name in ROW_SCALARS:
            key = f"{prefix}/{head}/{name}"
            if key in golden:
                rows = np.asarray(parts[f"rows/{head}"][name]).reshape(-1)
                checks.compare(key, rows, golden[key], row_bound(golden, key))


def row_bound(golden: Golden, key: str) -> np.ndarray | float:
    """Returns the bound of per-row losses; at t = 0, where float32 cancels, 5e-4 of the value."""
    bound = golden.bound(key)
    if key.endswith("mse"):
        return bound
    first = golden[f"{key.rsplit('/', 1)[0]}/t"] == 0
    return np.where(first, np.maximum(bound, SAMPLED * np.abs(golden[key])), bound)


def _gradients(golden: Golden, checks: Checks, policy: Policy, inputs: _Inputs) -> None:
    if not golden.keys("grad/"):
        return
    mode = "full_dynamic_model"
    draws = _draws(golden, f"fwd/{mode}", len(inputs.cond))
    flat = surgery.flatten(policy)
    trained = {k: v for k, v in flat.items() if not k.startswith("vae/")}

    def loss(arrays):
        return _loss(surgery.replace(policy, flat | arrays), vars(inputs), draws, mode=mode)[0]

    grads = jax.jit(jax.grad(loss))(trained)
    for key in golden.keys("grad/"):
        path, layout = rules.to_flax("model." + key.removeprefix("grad/"))
        gradient = layout.inverse(np.asarray(grads[path], np.float64)).reshape(-1)
        wave = np.sin(0.37 * np.arange(gradient.size))
        got = np.array([np.linalg.norm(gradient), gradient @ wave])
        # The dot product is a sum with cancellation, so its scale is that of the norm.
        checks.compare(key, got, golden[key], golden.bound(key))


def _net(golden: Golden, checks: Checks, policy: Policy, head: str) -> None:
    net, prefix = getattr(policy, HEADS[head]).net, f"net/{head}"
    x, t, c = (jnp.asarray(golden[f"{prefix}/{name}"]) for name in ("x", "t", "c"))
    got = net.activations(x, t.astype(jnp.int32), net.cond_embed(c))
    found = {"out": got["out"], "time_embed": got["time_embed"]}
    found |= {f"res_block{i}": h for i, h in enumerate(got["h"][1:])}
    for name, value in found.items():
        key = f"{prefix}/{name}"
        if key in golden:
            checks.compare(key, value, golden[key], golden.bound(key))


def _sample(golden: Golden, checks: Checks, policy: Policy, head: str) -> None:
    module, prefix = getattr(policy, HEADS[head]), f"sample/{head}"
    z = jnp.asarray(golden["fwd/full_dynamic_model/decoder_out"])
    if module.aggregator is None:
        z = z[:, :: len(z) * z.shape[1] // golden[f"{prefix}/out"].shape[0]]
    noise = rearrange(jnp.asarray(golden[f"{prefix}/noise0"]), "k (b n) c -> k b n c", b=len(z))
    sample = jax.jit(functools.partial(_sample_head, temperature=golden.facts["temperature"]))
    out, steps = sample(module, z, noise)
    out = out if golden[f"{prefix}/out"].ndim == 3 else rearrange(out, "b n c -> (b n) c")
    compared = {"out": out}
    for name in ("x", "pred_x0"):
        compared[f"steps_{name}"] = rearrange(steps[name], "k b n c -> k (b n) c")
    for name, value in compared.items():
        key = f"{prefix}/{name}"
        checks.compare(key, value, golden[key], golden.bound(key, sampled=True))


def _sample_head(module, z, noise, *, temperature):
    return module.sample(z, noise=noise, temperature=temperature, return_steps=True)


def _tokens(golden: Golden, checks: Checks, policy: Policy, inputs: _Inputs, run: str) -> None:
    prefix, (mode, count) = f"tokens/{run}", run.rsplit("_iter", 1)
    orders = jnp.asarray(golden[f"{prefix}/orders"], jnp.int32)
    batch = len(orders)
    noises = []
    while f"{prefix}/noise{len(noises)}" in golden:
        noise = jnp.asarray(golden[f"{prefix}/noise{len(noises)}"])
        noises.append(rearrange(noise, "k (b n) c -> k b n c", b=batch))

    def sample(policy, cond, target, nactions, streams, orders, noises):
        return sample_tokens(
            policy,
            cond,
            task_mode=mode,
            num_iter=int(count),
            temperature=golden.facts["temperature"],
            target=target,
            nactions=nactions,
            streams=streams,
            orders=orders,
            noises=noises,
        )

    got = jax.jit(sample)(
        policy,
        inputs.cond[:batch],
        inputs.target[:batch],
        inputs.nactions[:batch],
        inputs.first(batch),
        orders,
        noises,
    )
    key = f"{prefix}/actions"
    checks.compare(key, got["actions"], golden[key], golden.bound(key, sampled=True))
    key = f"{prefix}/latents"
    if key in golden:
        # With a wrist camera the original returns only that camera's latents.
        latents = got["wrist_latents" if policy.config.mar.wrist else "latents"]
        latents = rearrange(latents, "b t h w c -> (b t) c h w")
        checks.compare(key, latents, golden[key], golden.bound(key, sampled=True))


def _replacements(golden: Golden, checks: Checks, inputs: _Inputs) -> None:
    """Checks random removal of text and history actions, and a missing action history."""
    key = "train_drop/encoder_out_stride8"
    if key in golden:
        # The file was made without dropout and with half of the texts removed.
        policy = mar_policy(golden, attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.5)
        draw = jnp.asarray(golden["train_drop/uniform0"])
        name = "history" if policy.config.mar.history_action else "text"
        got = _encode(policy, inputs, uniforms={name: draw}, key=jax.random.key(0))
        checks.compare(key, got[:, ::8], golden[key], golden.bound(key))
    key = "no_history/encoder_out_stride8"
    if key in golden:
        got = _encode(mar_policy(golden), inputs, history_nactions=None)
        checks.compare(key, got[:, ::8], golden[key], golden.bound(key))


def _encode(policy: Policy, inputs: _Inputs, **changes) -> jax.Array:
    """Returns the encoder's output in mode policy_model."""
    cond = mar.patchify(inputs.cond, policy.config.patch_size)
    streams = inputs.streams | changes
    return policy.mar.encode(
        policy.mar.embed(None, None, cond, task_mode="policy_model", **streams)
    )
