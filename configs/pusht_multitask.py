"""Full size: graft the published `pusht_multitask.ckpt` (PushT-M: a new goal in every episode).

    python -m uva_jax.main --config configs/pusht_multitask.py --workdir runs/pusht_multitask

Like `configs/pusht.py`, on the data of PushT-M and with a random goal for every rollout.
"""

from configs import pusht


def get_config():
    config = pusht.get_config()
    config.teacher.checkpoint = "pretrained_models/pusht_multitask.ckpt"
    config.data.path = "data/pusht_multitask"
    config.evaluate.simulator = "pusht_multitask"
    return config
