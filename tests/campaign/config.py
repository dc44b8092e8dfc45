"""A configuration of seconds per stage: a policy is trained from random weights and grafted.

python -m uva_jax.main --config tests/campaign/config.py --workdir DIR --stage pretrain
"""

from configs import common

EPISODES = 3
STEPS = 12  # of every loop: enough for kills to fall between resumable states
EVERY = 3  # steps between those states


def get_config():
    config = common.get_config()
    config.data.update(max_episodes=EPISODES, mirror="pusht", val_ratio=0.3)
    p, loop = config.pretrain, {"steps": STEPS, "warmup": 2, "checkpoint_every": EVERY}
    p.from_scratch = True
    p.model.update(image_size=8, vae_width=32, vae_multipliers=(1, 1), width=32, depth=1)
    p.model.update(heads=2, dropout=0.0, video_head=(32, 1), action_head=(32, 2))
    p.vae_training.update(batch=8, frames=64, decode_every=2, log_every=2, **loop)
    p.vae_training.decoder_steps = STEPS // 2
    p.readout, p.readout_angles, p.judge_windows = "state", (4,), 8
    p.modes = {"full_dynamic_model": 1.0}
    p.update(batch=8, steps_per_call=2, log_every=2, **loop)
    config.head.num_heads = config.head.self_attn_heads = 4
    config.capture.update(num_samples=96, held_out=24, strip=2, batch=2)
    config.distill.update(epochs=1, batch=8, lr=1e-3, warmup=2, log_every=2)
    config.distill.update(checkpoint_every=EVERY, sampling_steps="4")
    config.finetune.update(batch=8, log_every=3, reuse_cache=True, freeze=("mar",), **loop)
    config.finetune.update(check_windows=8)
    config.evaluate.update(num_seeds=2, max_steps=16, sampling_steps="4", videos=1, workers=1)
    config.evaluate.update(windows=6, draws=2)
    return config
