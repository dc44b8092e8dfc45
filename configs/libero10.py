"""Full size: graft the published `libero10.ckpt`, which is conditioned on language.

    python -m uva_jax import --kind libero data/libero_10 --out data/libero_10.zarr
    python -m uva_jax.main --config configs/libero10.py --workdir runs/libero10

The task sentences are those of the files' names; their latents come from the language tower in
the checkpoint and CLIP's vocabulary (`config.data.vocabulary`), or from a file of latents
(`config.data.language`).
`--stage pretrain` trains such a policy on the same recording, from MAR's weights and its KL-VAE
(`config.pretrain.mar`, `config.pretrain.vae`); it needs the file of latents.
Without Libero installed, the graft is evaluated by its actions on held-out windows; with it, set
`config.evaluate.simulator=libero`, `simulator_files=data/libero_10`, `start_seed=1000000`,
`num_seeds=30` and `max_steps=500`, as upstream.
"""

from configs import pusht


def get_config():
    config = pusht.get_config()
    config.teacher.checkpoint = "pretrained_models/libero10.ckpt"
    config.data.path = "data/libero_10.zarr"
    config.data.image_key = "agentview_rgb"
    config.pretrain.model.task, config.pretrain.model.text_dim = "libero10", 512
    config.evaluate.simulator = ""
    return config
