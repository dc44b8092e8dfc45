"""The default: graft the embedded small PushT policy, from checkpoint to report, on two CPU cores.

    python -m uva_jax.main --config configs/pusht_tiny.py --workdir runs/tiny
"""

from configs import common


def get_config():
    config = common.get_config()
    config.data.mirror = "pusht"
    config.capture.num_samples = 16_384
    config.capture.strip = 13
    config.capture.batch = 4
    config.evaluate.sampling_steps = "10"
    return config
