"""The defaults, which the other files in this folder change.

Each setting stands once, with type, default, comment and range: `python -m uva_jax settings` lists
them (they are declared in `uva_jax/runtime/sections*.py`). Override any on the command line:
`--config.finetune.steps=1000`.
"""

from ml_collections import ConfigDict

from uva_jax.runtime import settings


def get_config() -> ConfigDict:
    """The defaults: the published schedule (8k samples, 200 epochs; 10% of the data, 50k steps)."""
    return settings.defaults()
