"""Full size: graft the published `umi_multitask.ckpt` (language, state, poses in 10 numbers).

    python -m convert latents prepared_data/language_latents.pkl data/umi_latents.npz
    python -m uva_jax.main --config configs/umi_multi.py --workdir runs/umi

The checkpoint has no language tower: its latents come from a file, one vector by task. The data is
a replay buffer whose frames are taken at the policy's rate. There is no simulator of the real
world: the graft is judged by its actions on held-out windows.
"""

from configs import pusht


def get_config():
    config = pusht.get_config()
    config.teacher.checkpoint = "pretrained_models/umi_multitask.ckpt"
    config.data.path = "data/umi.zarr"
    config.data.image_key = "camera0_rgb"
    config.data.language = "data/umi_latents.npz"
    config.evaluate.simulator = ""
    return config
