"""uva_jax: graft a new action head onto a trained UVA policy, without losing what it learned."""

__version__ = "0.1.0"


def load(name: str, *, weights: str = "ema"):
    """Loads a policy: `load("embedded").actor(sampling_steps=10)` acts (see `models/actor.py`).

    Args:
      name: a policy folder, a UVA checkpoint (.ckpt), or "embedded".
      weights: of a checkpoint: "ema" or "model".

    Returns:
      a `models.policy.Policy`.

    Raises:
      UserError: the path does not exist or is not a policy.
    """
    # Imported here, because every command imports this module and not all need jax.
    from uva_jax.pipeline.inputs import any_policy

    return any_policy(name, weights)
