"""Checks heads, schedules, VAEs and whole policies against their files in the golden format."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert import from_torch, infer
from convert.checks.compare import Checks
from convert.checks.golden import SAMPLED, SINGLE, Golden, filled, load_module
from uva_jax.models import diffusion, losses, mar
from uva_jax.models.frames import frame_indices
from uva_jax.models.mlp_head import MLPHead
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import MLPHeadConfig
from uva_jax.models.vae import VAE, Level

_TABLES = 1e-12  # relative, for float64 schedules
_LOSS_PARTS = {"diffloss": "video", "diffactloss": "act"}


# ---- action heads and schedules ----


def action_heads(golden: Golden, checks: Checks) -> None:
    """Checks the four aggregators with their networks, and guidance in one of them."""
    facts = golden.facts
    z, target = jnp.asarray(golden["in/z_f16"]), jnp.asarray(golden["in/target"])
    batch, n_actions, channels = target.shape
    frames = 4
    side = int(np.sqrt(z.shape[1] // frames))
    for kind, entries in facts["fill"].items():
        if not isinstance(entries, list):
            continue
        config = MLPHeadConfig(
            channels=channels,
            z_channels=facts["z_channels"],
            width=facts["width"],
            depth=facts["depth"],
            aggregator=kind,
            n_actions=n_actions,
            n_frames=frames,
            grid=(side, side),
            sampling_steps=str(facts["act_diff_testing_steps"]),
        )
        head = load_module(
            functools.partial(_make_head, config),
            filled(entries),
            "model.diffactloss.",
            "action_head/",
        )
        c = head.aggregate(z)
        checks.compare(f"{kind}/c", c, golden[f"{kind}/c"], golden.bound(f"{kind}/c"))
        t = jnp.asarray(golden[f"{kind}/t"], jnp.int32).reshape(batch, n_actions)
        noise = jnp.asarray(golden[f"{kind}/noise"]).reshape(target.shape)
        rows = jax.jit(MLPHead.loss)(head, target, z, t=t, noise=noise)
        # These weights have no float64 results, so the general bounds of the format apply.
        for name in ("mse", "vb"):
            key = f"{kind}/{name}"
            bound = np.maximum(golden.bound(key), SAMPLED * np.abs(golden[key]) * (name == "vb"))
            checks.compare(key, rows[name].reshape(-1), golden[key], bound)
        key = f"{kind}/loss"
        checks.compare(key, rows["loss"].mean(), golden[key], golden.bound(key))
        noise = rearrange(golden[f"{kind}/sample/noise0"], "k (b n) c -> k b n c", b=batch)
        sample = functools.partial(MLPHead.sample, temperature=facts["temperature"])
        key = f"{kind}/sample/out"
        got = jax.jit(sample)(head, z, noise=jnp.asarray(noise))
        checks.compare(key, got, golden[key], golden.bound(key, sampled=True))
        if kind == "fc2" and "cfg/out_scale3" in golden:
            _guidance(golden, checks, head)


def _make_head(config, rngs):
    return MLPHead(config, rngs=rngs)


def _guidance(golden: Golden, checks: Checks, head: MLPHead) -> None:
    x, c, t = (jnp.asarray(golden[f"cfg/{name}"]) for name in ("x", "c", "t"))
    modulations = head.modulations(t.astype(jnp.int32), head.net.cond_embed(c[:, None]))
    got = head.guided(x[:, None], modulations, None, 3.0)
    key = "cfg/out_scale3"
    checks.compare(key, got[:, 0], golden[key], golden.bound(key))


def diffusion_schedules(golden: Golden, checks: Checks) -> None:
    """Checks every float64 table of every respacing."""
    for name in golden.children("f64/"):
        if name.startswith("train"):
            schedule = diffusion.make_schedule("", int(name.removeprefix("train")))
        else:
            schedule = diffusion.make_schedule(name.removeprefix("steps_"), 1000)
        for key in golden.keys(f"f64/{name}/"):
            want = golden[key]
            got = getattr(schedule, key.rsplit("/", 1)[1])
            checks.compare(key, got, want, _TABLES * np.maximum(np.abs(want), 1.0))


# ---- VAEs ----


def vae(golden: Golden, checks: Checks) -> None:
    """Checks encoder, sample and decoder at every recorded size, and recorded stages."""
    if "fill" in golden.facts:
        tensors = filled(golden.facts["fill"])
    else:
        tensors = {key.removeprefix("param/"): golden[key] for key in golden.keys("param/")}
    shapes = {f"vae_model.{name}": value.shape for name, value in tensors.items()}
    config = infer.infer_vae(shapes, golden.name)
    module = load_module(lambda rngs: VAE(config, rngs=rngs), tensors, "vae_model.", "vae/")
    del tensors
    for size in golden.children("img"):
        _vae_size(golden, checks, module, f"img{size}")


@jax.jit
def _vae_run(module: VAE, image, eps, decode_in):
    encoder = module.encoder.stages(image)
    mean, logvar = module.encode(image)
    unscaled = decode_in / module.config.scale_factor
    # The record is from before the attention after the last residual block of the deepest level.
    for i, level in enumerate(module.encoder.down):
        if len(level.attn) and i:
            encoder[f"level{i}"] = _before_attention(level, encoder[f"level{i - 1}_downsample"])
    return {
        "encoder": encoder,
        "decoder": module.decoder.stages(module.post_quant_conv(unscaled)),
        "moments_before_clamp": module.quant_conv(encoder["out"]),
        "mean": mean,
        "logvar": logvar,
        "latent_scaled": module.sample(mean, logvar, eps),
        "decode_out": module.decode(decode_in),
    }


def _before_attention(level: Level, x: jax.Array) -> jax.Array:
    for i, block in enumerate(level.block):
        x = block(x if i == 0 else level.attn[i - 1](x))
    return x


def _vae_size(golden: Golden, checks: Checks, module: VAE, prefix: str) -> None:
    image = golden[f"{prefix}/image_int8"].astype(np.float32) / np.float32(127)
    eps, latents = (
        jnp.asarray(rearrange(golden[f"{prefix}/{name}"], "n c h w -> n h w c"))
        for name in ("eps", "decode_in")
    )
    # decode_in is the input of the decoder, already divided by the scale.
    latents = latents * module.config.scale_factor
    got = _vae_run(module, jnp.asarray(rearrange(image, "c h w -> 1 h w c")), eps, latents)

    def compare(name, value, stride=1):
        key = f"{prefix}/{name}"
        value = rearrange(np.asarray(value), "n h w c -> n c h w")[..., ::stride, ::stride]
        checks.compare(key, value, golden[key], golden.bound(key))

    for name in ("moments_before_clamp", "mean", "logvar", "latent_scaled"):
        compare(name, got[name])
    for key in golden.keys(f"{prefix}/decode_out"):
        name = key.removeprefix(f"{prefix}/")
        if name == "decode_out_meanstd":
            out = np.asarray(got["decode_out"], np.float64)
            found = np.array([out.mean(), out.std(ddof=1), np.abs(out).max()])
            checks.compare(key, found, golden[key], golden.bound(key))
        else:
            compare(name, got["decode_out"], int(name.partition("_stride")[2] or 1))
    for key in golden.keys(f"{prefix}/stage/"):
        side, stage = key.rsplit("/", 1)[1].split("_", 1)
        maps = got["encoder" if side == "enc" else "decoder"]
        stage = stage.removesuffix("_last_resblock")
        value = rearrange(np.asarray(maps[stage]), "n h w c -> n c h w")
        if value.shape[-1] > 8:  # wider maps are subsampled in the file
            value = value[:, ::2, ::2, ::2]
        checks.compare(key, value, golden[key], golden.bound(key))


# ---- a whole policy ----


def end_to_end(golden: Golden, checks: Checks, checkpoint: Path) -> None:
    """Checks predict_action, every training loss, and decoding, with the fixture checkpoint."""
    policy, _ = from_torch.convert_checkpoint(checkpoint)
    _predict(golden, checks, policy)
    for mode in golden.children("loss/"):
        _batch_loss(golden, checks, policy, mode)
    latents = jnp.asarray(rearrange(golden["decode/latents"], "t c h w -> t h w c"))
    decoded = np.asarray(jax.jit(VAE.decode)(policy.vae, latents))
    decoded = rearrange(decoded, "t h w c -> t c h w")
    key = "decode/float_stride4"
    checks.compare(key, decoded[..., ::4, ::4], golden[key], golden.bound(key))
    # Pixels are truncated, so a value belongs to [p, p + 1); the error is the distance to that.
    key = "decode/uint8_stride2"
    values = ((1 + np.clip(decoded, -1, 1)) * np.float32(127.5))[..., ::2, ::2]
    pixels = golden[key].astype(np.float32)
    outside = np.maximum(np.maximum(pixels - values, values - (pixels + 1)), 0)
    checks.compare(key, outside, np.zeros_like(outside), SINGLE * 255)


def _predict(golden: Golden, checks: Checks, policy: Policy) -> None:
    images = rearrange(golden["predict/image_uint8"], "b t c h w -> b t h w c")
    picks = np.array(frame_indices(images.shape[1], policy.config.mar.n_frames))
    frames = policy.preprocess(jnp.asarray(images[:, picks]))
    key = "predict/vae_input_stride8"
    got = rearrange(frames, "b t h w c -> b c t h w")[..., ::8, ::8]
    checks.compare(key, got, golden[key], golden.bound(key))
    eps = jnp.asarray(rearrange(golden["predict/noise0"], "b t c h w -> b t h w c"))
    noise = rearrange(golden["predict/noise1"], "k (b n) c -> k b n c", b=len(images))
    cond = jax.jit(Policy.encode_frames)(policy, frames, eps)
    key = "predict/cond_latents"
    got = rearrange(cond, "b t h w c -> b t c h w")
    checks.compare(key, got, golden[key], golden.bound(key))
    act = jax.jit(Policy.predict_action)
    result = act(policy, {"image": jnp.asarray(images)}, vae_eps=eps, noise=jnp.asarray(noise))
    for name in ("action", "action_pred"):
        key = f"predict/{name}"
        checks.compare(key, result[name], golden[key], golden.bound(key, sampled=True))


def _batch_loss(golden: Golden, checks: Checks, policy: Policy, mode: str) -> None:
    prefix = f"loss/{mode}"
    images = rearrange(golden["loss/image_uint8"], "b t c h w -> b t h w c")
    batch = len(images)
    orders, rate = jnp.asarray(golden[f"{prefix}/orders"]), golden[f"{prefix}/mask_rate"]
    draws = {"mask": mar.ordered_mask(orders, rate, policy.config.mar.n_frames)}
    for name, part in (("eps_target", "target"), ("eps_cond", "cond")):
        eps = golden[f"{prefix}/vae_noise_{part}"]
        draws[name] = jnp.asarray(rearrange(eps, "(b t) c h w -> b t h w c", b=batch))
    heads = [head for head in _LOSS_PARTS if f"{prefix}/{head}/t" in golden]
    for head in heads:
        t, noise = (golden[f"{prefix}/{head}/{name}"] for name in ("t", "noise"))
        name = _LOSS_PARTS[head]
        draws[f"t/{name}"] = jnp.asarray(t, jnp.int32).reshape(batch, -1)
        draws[f"noise/{name}"] = jnp.asarray(rearrange(noise, "(b n) c -> b n c", b=batch))

    def loss(policy, images, actions, draws):
        data = {"image": images, "action": actions}
        target, cond, nactions = losses.encode_batch(policy, data, draws=draws)
        encoded = {"target_latents": target, "cond_latents": cond, "nactions": nactions}
        total, parts = losses.batch_loss(policy, data, task_mode=mode, draws=draws, train=False)
        return {"loss": total} | encoded | parts

    parts = jax.jit(loss)(policy, jnp.asarray(images), jnp.asarray(golden["loss/action"]), draws)
    for name in ("target_latents", "cond_latents"):
        key = f"{prefix}/{name}"
        got = rearrange(parts[name], "b t h w c -> b t c h w")
        checks.compare(key, got, golden[key], golden.bound(key))
    for head in heads:
        rows = parts[f"rows/{_LOSS_PARTS[head]}"]
        for name in ("mse", "vb"):
            key = f"{prefix}/{head}/per_row_{name}"
            bound = np.maximum(golden.bound(key), SAMPLED * np.abs(golden[key]) * (name == "vb"))
            checks.compare(key, rows[name].reshape(-1), golden[key], bound)
        key = f"{prefix}/{head}/target"
        if key in golden:
            got = rearrange(parts["nactions"], "b n c -> (b n) c")
            checks.compare(key, got, golden[key], golden.bound(key))
    for name in ("loss", "video_loss", "act_loss"):
        key = f"{prefix}/{name}"
        checks.compare(key, parts[name], golden[key], golden.bound(key))
