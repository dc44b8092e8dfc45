"""The defaults, which the other files in this folder change.

`uva_jax/runtime/sections*.py` declare each setting once with type, default, comment and range, and
`python -m uva_jax settings` lists them. Override any on the command line:
`--config.finetune.steps=1000`.
"""

from ml_collections import ConfigDict

from uva_jax.runtime import settings


def get_config() -> ConfigDict:
    """Returns the published schedule (8k samples, 200 epochs; 10% of the data, 50k steps)."""
    return settings.defaults()
