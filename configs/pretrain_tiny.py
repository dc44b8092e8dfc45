"""Train a small PushT policy from random weights on the embedded data: about 2 hours, 2 cores.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python -m uva_jax.main --config configs/pretrain_tiny.py --workdir runs/own --stage pretrain

It writes `policy` and `policy.ckpt` to `runs/own/pretrain`; the checkpoint is for PyTorch and as a
teacher to graft (`--config.teacher.checkpoint`). Two devices, one per core, are faster than two
threads on one; huge pages save half a million page faults per second.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.data.mirror = "pusht"
    p = config.pretrain
    p.from_scratch = True
    p.save_dtype = "bfloat16"
    p.model.update(
        image_size=64,
        vae_width=32,
        vae_multipliers=(1, 1, 1, 1, 2),
        width=128,
        depth=3,
        heads=4,
        dropout=0.0,
        video_head=(128, 3),
        action_head=(256, 3),
    )
    v = p.vae_training
    v.steps, v.rarity, v.frames = 1500, 1.0, 200_000
    v.decoder_steps, v.decoder_rarity = 1000, 2.0
    p.readout, p.readout_angles = "state", (4,)
    p.modes = {"policy_model": 0.6, "full_dynamic_model": 0.4}
    p.noise_draws = 2
    p.steps, p.batch, p.lr, p.warmup = 16_000, 64, 1e-3, 300
    p.progress_share, p.progress_start = 0.35, 0.5
    p.matmul_precision, p.ema.max_value = "bfloat16", 0.9995
    p.score.every, p.checkpoint_every = 4000, 1000
    return config
