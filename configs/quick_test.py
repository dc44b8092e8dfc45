"""A quick test: Stage 2 alone from given operators, in under a minute on two CPU cores.

python -m uva_jax.main --config configs/quick_test.py:runs/tiny/operators \\
    --workdir runs/quick --stage convert,finetune

The operators are those of `configs/pusht_tiny.py`, or others for the same head; the data are a few
of its demonstrations. It shows that weights load and that the loss falls, but does not make a good
policy.
"""

from pathlib import Path

from configs import pusht_tiny
from uva_jax.runtime.errors import UserError


def get_config(operators: str = "runs/tiny/operators"):
    """Returns the configuration; `operators` is a folder with cross_attn/, self_attn/, mlp/."""
    config = pusht_tiny.get_config()  # the head must be the one that the operators were made for
    families = [
        f for f in config.head.init_paths if (Path(operators) / f / "operator.json").exists()
    ]
    if not families:
        raise UserError(
            f"{operators} holds no operators: run configs/pusht_tiny.py first, or name a folder "
            "that distillation wrote, as in --config configs/quick_test.py:runs/tiny/operators"
        )
    for family in families:
        config.head.init_paths[family] = str(Path(operators) / family)
    config.data.max_episodes = 12
    # Its own data, because there is no cache of another run.
    config.finetune.reuse_cache = False
    config.finetune.data_fraction = 0.1
    config.finetune.steps = 30
    config.finetune.warmup = 5
    config.finetune.batch = 32
    config.finetune.log_every = 10
    config.finetune.check_every = 15
    config.finetune.check_windows = 32
    config.shorten.evaluations = 0
    return config
