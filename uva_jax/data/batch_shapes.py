"""Shapes of the windows that a policy reads, for compiling programs without data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uva_jax.data.source import single_windows
from uva_jax.data.windows import WindowSpec
from uva_jax.models.policy_config import PolicyConfig

Shapes = dict[str, jax.ShapeDtypeStruct]


def strip_shapes(
    config: PolicyConfig, strips: int, strip: int, frame_size: tuple[int, int]
) -> Shapes:
    """Returns the shapes of `WindowReader.read` for a policy.

    Args:
      config: of the policy.
      strips: number of strips.
      strip: windows per strip.
      frame_size: height and width of the stored frames.
    """
    spec, lead = WindowSpec.of(config), (strips, strip)

    def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    image = array(strips, strip + spec.n_frames - 1, *frame_size, 3, dtype=jnp.uint8)
    actions = array(*lead, spec.n_actions, config.action_head.channels)
    found = {"image": image, "action": actions}
    if spec.wrist:
        found["wrist_image"] = image
    if spec.past_actions:
        found["past_action"] = actions
    if spec.text:
        found["text_latents"] = array(*lead, config.mar.text_dim)
    for i, name in enumerate(spec.states):
        # Only the width of all states together is known, and only it matters to a program.
        width = 1 if i else config.mar.proprio_dim - len(spec.states) + 1
        found[name] = array(*lead, spec.state_steps, width)
    return found


def single_shapes(config: PolicyConfig, windows: int, frame_size: tuple[int, int]) -> Shapes:
    """Returns the shapes of `single_windows` for a policy."""
    return jax.eval_shape(single_windows, strip_shapes(config, windows, 1, frame_size))
