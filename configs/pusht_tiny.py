"""The default: graft the embedded small PushT policy, from checkpoint to report, on two CPU cores.

python -m uva_jax.main --config configs/pusht_tiny.py --workdir runs/tiny
"""

from configs import common


def get_config():
    config = common.get_config()
    config.data.mirror = "pusht"
    config.capture.num_samples = 8192
    config.capture.strip = 13  # 16 frames give 13 windows
    config.capture.batch = 4
    config.capture.encode_frames = 16
    # A small head on a CPU: fewer, larger steps than the published schedule.
    config.distill.epochs = 10
    config.distill.lr = 1e-3
    config.distill.block_epochs = 1
    config.distill.block_lr = 2e-5
    # Everything before the head is frozen, so Stage 2 trains on cached tokens. The teacher has
    # converged on many more windows, so the data alone would worsen samples while the training loss
    # falls; the distance to the teacher's output prevents it.
    config.finetune.freeze = ("mar", "action_head/memory/conv", "action_head/memory/aggregator")
    config.finetune.reuse_cache = True
    config.finetune.steps = 300
    config.finetune.steps_per_call = 10
    config.finetune.batch = 64
    config.finetune.lr = 1e-5
    config.finetune.teacher_weight = 100.0
    config.finetune.x0_weight = 0.0
    config.finetune.warmup = 30
    config.finetune.ema.max_value = 0.99
    config.finetune.check_every = 60
    config.shorten.evaluations = 1
    config.shorten.epochs = 24
    config.shorten.lr = 1e-3
    config.shorten.batch = 128
    config.evaluate.windows = 128
    return config
