"""Records `teacher_reference.npz`: outputs of the original's modules on the embedded checkpoint.

    python tests/goldens/record_teacher.py UPSTREAM [OUT]

UPSTREAM is a checkout of github.com/ShuangLI59/unified_video_action; its modules need torch, timm
with torchvision, scipy, tqdm and einops, and reading the checkpoint needs ml_dtypes. Frames and
noise are those of the existing file. It runs in float32 with one thread; three constants of
upstream for 256 px are set for 64. The tests only read the record.
"""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from einops import rearrange

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE.parents[1] / "uva_jax" / "assets" / "uva_pusht_tiny.ckpt"
REFERENCE = HERE / "teacher_reference.npz"
GIVEN = ("in/frames_uint8", "vae/eps", "policy/noise_10", "policy/noise_100", "video/noise_10")
SIDE, WIDTH, LATENT_SCALE, TEMPERATURE = 64, 128, 0.2325, 0.95


def build(state: dict[str, torch.Tensor]):
    """Makes upstream's MAR and the VAE's parts with these weights."""
    from unified_video_action.model.autoregressive.mar_con_unified import MAR
    from unified_video_action.vae import vaekl

    mar = MAR(
        img_size=SIDE,
        encoder_embed_dim=WIDTH,
        encoder_depth=3,
        encoder_num_heads=4,
        decoder_embed_dim=WIDTH,
        decoder_depth=3,
        decoder_num_heads=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        attn_dropout=0.0,
        proj_dropout=0.0,
        diffloss_d=3,
        diffloss_w=WIDTH,
        diffloss_act_d=3,
        diffloss_act_w=2 * WIDTH,
        action_model_params={"predict_action": True, "act_model_type": "conv_fc"},
        task_name="pusht",
        different_history_freq=False,
        use_history_action=False,
        action_mask_ratio=0.5,
        use_proprioception=False,
        predict_wrist_img=False,
        predict_proprioception=False,
        shape_meta={"action": {"shape": [2]}},
        language_emb_model=None,
    )
    # For 64 px: 16 tokens per frame, so that an action spans 4 tokens and conv_fc has a 4x4 grid.
    mar.buffer_size_action = mar.diffactloss.w = mar.diffactloss.h = 4
    sizes = {"ch": 32, "ch_mult": (1, 1, 1, 1, 2), "z_channels": 16}
    vae = torch.nn.Module()
    vae.encoder, vae.decoder = vaekl.Encoder(**sizes), vaekl.Decoder(**sizes)
    vae.quant_conv = torch.nn.Conv2d(32, 32, 1)
    vae.post_quant_conv = torch.nn.Conv2d(16, 16, 1)
    for module, prefix in ((mar, "model."), (vae, "vae_model.")):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(own)
        module.eval()
    return mar, vae


def sample(net, noise: torch.Tensor, steps: int, clip: bool, condition: torch.Tensor):
    """Runs upstream's sampling loop with given noise (steps + 1, rows, channels)."""
    from unified_video_action.model.autoregressive import diffusion

    process = diffusion.create_diffusion(timestep_respacing=str(steps), noise_schedule="cosine")
    later = iter(noise[1:])
    with mock.patch.object(torch, "randn_like", lambda x: next(later)):
        return process.p_sample_loop(
            net.forward,
            noise[0].shape,
            noise[0],
            clip_denoised=clip,
            model_kwargs={"c": condition},
            progress=False,
            temperature=TEMPERATURE,
            device="cpu",
        )


def record(state: dict[str, torch.Tensor], given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns all arrays of the reference file."""
    mar, vae = build(state)
    head, noises = mar.diffactloss, {k: torch.from_numpy(given[k]).float() for k in GIVEN[1:]}
    frames = rearrange(torch.from_numpy(given[GIVEN[0]])[:, 3::4], "b t h w c -> (b t) c h w")
    resized = torch.nn.functional.interpolate(frames / 255, (SIDE, SIDE), mode="bilinear") * 2 - 1
    found = {"in/resized_stride4": resized[..., ::4, ::4]}
    # Contiguous: torch's GroupNorm is inexact on channels-last maps.
    mean, logvar = vae.quant_conv(vae.encoder(resized.contiguous())).chunk(2, dim=1)
    found["vae/mean"], found["vae/logvar"] = mean, logvar.clamp(-30, 20)
    latents = (mean + torch.exp(0.5 * logvar) * noises["vae/eps"]) * LATENT_SCALE
    found["vae/latent_scaled"] = latents
    decoded = vae.decoder(vae.post_quant_conv(mean))
    found["vae/decoded_of_mean_stride2"] = decoded[..., ::2, ::2]

    history = rearrange(latents, "(b t) c h w -> b t (h w) c", t=4)
    mask = torch.ones(history.shape[:3])

    def video_tokens(mode):
        hidden = torch.zeros_like(history)
        x = mar.forward_mae_encoder(hidden, mask, history, task_mode=mode)
        return mar.forward_mae_decoder(x, mask)

    z = found["policy/decoder_out"] = video_tokens("policy_model")
    x = head.fc(head.conv(rearrange(z, "b (t h w) c -> (b t) c h w", t=4, h=4)).flatten(1))
    x = head.interpolate(rearrange(x, "(b t) c -> b c t", t=4))
    condition = found["policy/condition"] = head.refine(rearrange(x, "b c a -> b a c"))
    scale, offset = (state[f"normalizer.params_dict.action.{k}"] for k in ("scale", "offset"))
    for steps in (10, 100):
        noise = noises[f"policy/noise_{steps}"]
        rows = sample(head.net, noise, steps, True, condition.flatten(0, 1))
        actions = found[f"policy/action_normalised_{steps}"] = rows.reshape(-1, 16, 2)
        found[f"policy/action_{steps}"] = (actions - offset) / scale
    z = found["video/decoder_out"] = video_tokens("full_dynamic_model")
    rows = sample(mar.diffloss.net, noises["video/noise_10"], 10, False, z.flatten(0, 1))
    found["video/latents_10"] = rearrange(rows, "(b t h w) c -> (b t) c h w", t=4, h=4, w=4)
    return {k: given[k] for k in GIVEN} | {k: v.numpy() for k, v in found.items()}


def main(upstream: str, out: str = str(REFERENCE)) -> None:
    sys.path[:0] = [str(Path(upstream)), str(HERE.parents[1])]
    from convert.formats.torch_file import read

    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *_, **__: self  # upstream asks for it by name
    held = read(CHECKPOINT).state_dict("ema_model")
    state = {k: torch.from_numpy(v.numpy().astype(np.float32)) for k, v in held.items()}
    with np.load(REFERENCE) as arrays:
        given = {k: arrays[k] for k in GIVEN}
    with torch.no_grad():
        found = record(state, given)
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
