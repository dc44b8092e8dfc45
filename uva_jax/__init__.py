"""uva_jax: graft a new action head onto a trained UVA policy, without losing what it learned."""

__version__ = "0.1.0"
