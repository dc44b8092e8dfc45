"""`verify CKPT`: compares the checkpoint in torch and in Flax on the same random inputs.

The input of each part is torch's output of the part before, so that a failed line names the part.
The torch side is `torch/reference.py`, into which the checkpoint must load with strict=True.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from convert import rules
from convert.checks.compare import Check, Checks
from convert.checks.golden import SAMPLED, SINGLE
from convert.formats import torch_file
from convert.from_torch import convert_open
from convert.state_dicts import state_tensors
from uva_jax.models import diffusion, mar
from uva_jax.models.policy import Policy
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.models.text_tower import attention_mask
from uva_jax.runtime.errors import UserError

try:
    import torch
except ImportError:  # optional; verify_checkpoint checks for it
    torch = None
else:
    from convert.torch.reference import Policy as TorchPolicy

_BATCH = 2
_HEADS = {
    "diffloss": "video_head",
    "diffloss_wrist": "wrist_head",
    "diffactloss": "action_head",
    "diffproploss": "proprio_head",
}
_HEADER = f"{'part':<44} {'max error':>10} {'relative':>10} {'bound':>10}"


def verify_checkpoint(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    seed: int = 0,
    show: Callable[[str], None] = print,
    architecture: PolicyConfig | None = None,
) -> list[Check]:
    """Compares torch and Flax part by part and shows a table.

    Args:
      path: the checkpoint.
      weights: "ema" or "model".
      seed: of the inputs.
      show: is called with each line.
      architecture: for a file without cfg.

    Returns:
      the checks; those that are not `ok` have failed.

    Raises:
      UserError: torch is not installed, or the checkpoint cannot be converted.
    """
    if torch is None:
        raise UserError(
            "verify CKPT needs PyTorch, which is not installed: install it with "
            "pip install 'uva_jax[torch]'"
        )
    checkpoint = torch_file.read(path)
    policy, _ = convert_open(checkpoint, weights=weights, architecture=architecture)
    tensors = state_tensors(checkpoint, weights)
    show(_HEADER)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        comparison = _Comparison(policy, _reference(policy, tensors), seed, show)
        comparison.vae()
        comparison.transformer("policy_model")
        if policy.video_head is not None:
            comparison.transformer("full_dynamic_model")
        if policy.text_model is not None:
            comparison.text_tower()
        comparison.normalizer()
    show(comparison.checks.summary())
    return comparison.checks.results


def _reference(policy: Policy, tensors):
    """Returns the torch policy with the checkpoint's tensors, loaded with strict=True."""
    model = TorchPolicy(policy.config).eval()
    state = {
        name: torch.from_numpy(tensor.numpy().astype(np.float32))
        for name, tensor in tensors.items()
        if not rules.ignored(name) or name == "_dummy_variable"
    }
    state.setdefault("_dummy_variable", torch.zeros(0))
    model.load_state_dict(state, strict=True)
    return model


# These are compiled once for every block, mode and head of the same shapes.


@jax.jit
def _encode_frames(vae, pixels):
    return vae.encoder.stages(pixels), vae.encode(pixels)


@jax.jit
def _decode_latents(vae, latents):
    return vae.decoder.stages(latents)


@functools.partial(jax.jit, static_argnames="task_mode")
def _embed(module, tokens, mask, cond, *, task_mode, **streams):
    return module.embed(tokens, mask, cond, task_mode=task_mode, **streams)


_run_layer = jax.jit(lambda layer, x, seen: layer(x, seen))
_run_block = jax.jit(lambda block, x: block(x))
_encode = jax.jit(lambda module, x: module.encode(x))
_decode = jax.jit(lambda module, x: module.decode(x))
_activations = jax.jit(lambda net, x, t, c: net.activations(x, t, net.cond_embed(c)))
_denoise = jax.jit(lambda head, x, t, condition: head.denoise(x, t, condition))
_sample = jax.jit(lambda head, z, noise, temp: head.sample(z, noise=noise, temperature=temp))


class _Comparison:
    """Both policies, their common inputs, and the checks so far."""

    def __init__(self, policy: Policy, reference, seed: int, show: Callable[[str], None]):
        self.policy, self.reference, self.show = policy, reference, show
        self.random = np.random.default_rng(seed)
        self.checks = Checks()
        self.cond: np.ndarray | None = None  # (b, t, s, c) tokens of the history

    def compare(self, part: str, got, want, relative: float = SINGLE) -> None:
        want = want.numpy() if hasattr(want, "numpy") else np.asarray(want)
        scale = max(float(np.abs(want).max(initial=0.0)), 1e-30)
        check = self.checks.compare(part, got, want, relative * scale)
        self.show(
            f"{part:<44} {check.error:>10.2e} {check.error / scale:>10.2e} {relative:>10.0e} "
            f"{'ok' if check.ok else 'FAIL'}"
        )

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape, dtype=np.float32)

    def vae(self) -> None:
        config, vae, torch_vae = self.policy.config, self.policy.vae, self.reference.vae_model
        frames = config.mar.n_frames
        size = config.image_size
        images = self.random.integers(0, 256, (_BATCH * frames, size, size, 3), dtype=np.uint8)
        pixels = np.asarray(self.policy.preprocess(jnp.asarray(images)))
        nchw = _torch(rearrange(pixels, "n h w c -> n c h w"))
        stages, moments = _encode_frames(vae, pixels)
        for name, want in torch_vae.encoder.stages(nchw).items():
            self.compare(f"vae.encoder.{name}", _maps(stages[name]), want)
        mean, logvar = torch_vae.encode(nchw)
        for name, value, want in zip(("mean", "logvar"), moments, (mean, logvar), strict=True):
            self.compare(f"vae.{name}", _maps(value), want)
        eps = self.normal(*mean.shape)
        latents = (mean + (0.5 * logvar).exp() * _torch(eps)).numpy() * config.vae.scale_factor
        scaled = vae.sample(
            *(
                jnp.asarray(rearrange(x, "n c h w -> n h w c"))
                for x in (mean.numpy(), logvar.numpy(), eps)
            )
        )
        self.compare("vae.latents", _maps(scaled), latents)
        inside = torch_vae.post_quant_conv(_torch(latents) / config.vae.scale_factor)
        nhwc = jnp.asarray(rearrange(inside.numpy(), "n c h w -> n h w c"))
        got = _decode_latents(vae, nhwc)
        for name, want in torch_vae.decoder.stages(inside).items():
            self.compare(f"vae.decoder.{name}", _maps(got[name]), want)
        latents = rearrange(latents, "(b t) c h w -> b t h w c", b=_BATCH)
        self.cond = np.asarray(mar.patchify(jnp.asarray(latents), config.patch_size))

    def streams(self) -> dict[str, np.ndarray]:
        """Returns random values for every further input of the policy."""
        c = self.policy.config.mar
        tokens = (_BATCH, c.n_frames, c.tokens_per_frame, c.token_dim)
        streams = {}
        if c.text_dim:
            streams["text_latents"] = self.normal(_BATCH, c.text_dim)
        if c.history_action:
            streams["history_nactions"] = self.normal(_BATCH, c.n_actions, c.action_dim)
        if c.proprio_dim:
            streams["proprio"] = self.normal(_BATCH, c.proprio_steps, c.proprio_dim)
            if c.proprio_image:
                streams["proprio_tokens"] = self.normal(*tokens)
        if c.wrist:
            streams["wrist_tokens"] = self.normal(*tokens)
        return streams

    def transformer(self, mode: str) -> None:
        """Compares encoder and decoder, block by block, and the heads of the mode."""
        module, streams = self.policy.mar, self.streams()
        tokens = self.normal(*self.cond.shape)
        mask = (self.random.random(self.cond.shape[:3]) < 0.8).astype(np.float32)
        want = self.reference.model.stages(
            mode,
            *map(_torch, (tokens, mask, self.cond)),
            {k: _torch(v) for k, v in streams.items()},
        )
        want = {name: value.numpy() for name, value in want.items()}
        embed = jax.jit(lambda m, *args, **kwargs: m.embed(*args, task_mode=mode, **kwargs))
        self.compare(
            f"{mode}.embed", embed(module, tokens, mask, self.cond, **streams), want["embed"]
        )
        embedded, encoded = (jnp.asarray(want[name]) for name in ("embed", "encoder_out"))
        blocks = {
            "encoder": (module.z_proj_ln(embedded), module.encoder_blocks),
            "decoder": (module.decoder_input(encoded), module.decoder_blocks),
        }
        for side, (x, layers) in blocks.items():
            for i, block in enumerate(layers):
                name = f"{side}_block{i}"
                self.compare(f"{mode}.{name}", _run_block(block, x), want[name])
                x = jnp.asarray(want[name])
            if side == "encoder":
                got = _encode(module, embedded)
                self.compare(f"{mode}.encoder_out", got, want["encoder_out"])
        got = _decode(module, encoded)
        self.compare(f"{mode}.decoder_out", got, want["decoder_out"])
        used = (
            ("diffactloss", "diffproploss")
            if mode == "policy_model"
            else ("diffloss", "diffloss_wrist")
        )
        for name in used:
            if getattr(self.policy, _HEADS[name]) is not None:
                self.head(name, want["decoder_out"])

    def head(self, name: str, z: np.ndarray) -> None:
        """Compares condition, denoising at several timesteps, and the sampling loop."""
        head, torch_head = getattr(self.policy, _HEADS[name]), getattr(self.reference.model, name)
        config, title = head.config, _HEADS[name]
        if config.kind == "mlp":
            c = torch_head.rows(_torch(z))
            if config.aggregator is not None:
                self.compare(f"{title}.{config.aggregator}", head.aggregate(jnp.asarray(z)), c)
        else:
            c = torch_head.condition(_torch(z))
            self.compare(
                f"{title}.memory", head.memory(jnp.asarray(z)), torch_head.memory(_torch(z))
            )
            self.compare(f"{title}.condition", head.condition(jnp.asarray(z)), c)
        n_rows = z.shape[1] if name in ("diffloss", "diffloss_wrist") else config.n_actions
        x = self.normal(_BATCH, n_rows, config.channels)
        for t in (0, 250, 999):
            steps = np.full(_BATCH, t)
            if config.kind == "mlp":
                want = torch_head.net.stages(_torch(x), _torch(steps), c)
                got = _activations(head.net, x, steps, c.numpy())
                found = {f"res_block{i}": h for i, h in enumerate(got["h"][1:])}
                found |= {"time_embed": got["time_embed"], "out": got["out"]}
            else:
                want = {"out": torch_head.denoise(_torch(x), _torch(steps), c)}
                found = {"out": _denoise(head, x, steps, c.numpy())}
            for part, value in want.items():
                self.compare(f"{title}.t{t}.{part}", found[part], value)
        steps = len(diffusion.make_schedule(config.sampling_steps, 1000))
        noise = self.normal(steps + 1, *x.shape)
        temperature = self.policy.config.temperature
        want = torch_head.sample(_torch(z), temperature, noise=_torch(noise))
        got = _sample(head, z, noise, temperature)
        self.compare(f"{title}.sample", got, want, SAMPLED)

    def text_tower(self) -> None:
        """Compares the language tower, layer by layer, on sentences of several lengths."""
        tower = self.policy.text_model
        length, end = tower.config.max_length, tower.config.vocab_size - 1
        lengths = self.random.integers(2, length, (_BATCH, 1))
        mask = (np.arange(length) < lengths).astype(np.int32)
        words = self.random.integers(0, end, mask.shape)
        tokens = np.where(np.arange(length) < lengths - 1, words, end)
        want = self.reference.text_model.stages(_torch(tokens), _torch(mask))
        seen = attention_mask(jnp.asarray(mask))
        self.compare("text_model.embed", tower.embed(jnp.asarray(tokens)), want["embed"])
        x = jnp.asarray(want["embed"].numpy())
        for i, layer in enumerate(tower.layers):
            self.compare(f"text_model.layer{i}", _run_layer(layer, x, seen), want[f"layer{i}"])
            x = jnp.asarray(want[f"layer{i}"].numpy())
        got = tower.pool(x, jnp.asarray(tokens))
        self.compare("text_model.text_embeds", got, want["text_embeds"])

    def normalizer(self) -> None:
        """Compares scales and offsets, which must be equal."""
        for name, _ in self.policy.config.normalizer_fields:
            field = self.reference.normalizer.params_dict[name]
            for part in ("scale", "offset"):
                got = self.policy.normalizer[name][part][...]
                self.compare(f"normalizer.{name}.{part}", got, getattr(field, part), 0.0)


def _torch(array):
    return (
        array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array, order="C"))
    )


def _maps(x) -> np.ndarray:
    return rearrange(np.asarray(x), "n h w c -> n c h w")
