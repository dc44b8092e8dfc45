"""Full size: graft the published `umi_multitask.ckpt` (language, state, poses in 10 numbers).

    python -m convert latents prepared_data/language_latents.pkl data/umi_latents.npz
    python -m uva_jax import --kind zarr cup.zarr.zip towel.zarr.zip --task cup \\
        --task towel --out data/umi.zarr
    python -m uva_jax.main --config configs/umi_multi.py --workdir runs/umi

The checkpoint has no language tower: its language latents come from a file. The data are UMI's
recordings, with JPEG XL converted to a codec that reads fast; poses and actions are relative to
each window's current step. There is no simulator: the graft is evaluated by its actions on held-out
windows.
"""

from configs import pusht


def get_config():
    config = pusht.get_config()
    config.teacher.checkpoint = "pretrained_models/umi_multitask.ckpt"
    config.data.path = "data/umi.zarr"
    config.data.layout = "umi"
    config.data.image_key = "camera0_rgb"
    config.data.pad_after = config.data.horizon // 2  # any step can be a current step
    config.data.language = "data/umi_latents.npz"
    config.evaluate.simulator = ""
    return config
