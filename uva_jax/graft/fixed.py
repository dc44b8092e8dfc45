"""What frozen layers of the heads compute of the video tokens, once before Stage 2.

The memory's convolution and aggregator are copies of the teacher's. If they are frozen, their
features of a window are the same in every step, and so is the teacher's condition. Computing them
once saves a step these layers, and a batch is smaller: at full size by a factor of 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uva_jax.models.diffusion_head import DiffusionHead
from uva_jax.models.grafted_head import GraftedHead
from uva_jax.models.lora import PREFIX
from uva_jax.models.policy import Policy
from uva_jax.runtime.batches import in_batches
from uva_jax.runtime.sections_graft import FinetuneOptions
from uva_jax.storage.sample_store import Rows
from uva_jax.train.trainable import Phase

_COPIED = ("action_head/memory/conv/", "action_head/memory/aggregator/")
_BATCH = 256  # windows in one call of the program
_FEATURE, _REFERENCE = "feature", "reference"


def trunk_is_frozen(phases: tuple[Phase, ...], options: FinetuneOptions) -> bool:
    """Whether nothing before the action head trains in any phase, so that tokens can be cached."""
    trained = {path.removeprefix(PREFIX) for phase in phases for path in phase.trainable}
    return not options.dropout and all(path.startswith("action_head/") for path in trained)


def features_are_fixed(policy: Policy, phases: Sequence[Phase]) -> bool:
    """Whether no layer of `Memory.features` trains in any phase; False for an MLP head."""
    trained = (path.removeprefix(PREFIX) for phase in phases for path in phase.trainable)
    grafted = policy.config.action_head.kind == "grafted"
    return grafted and not any(path.startswith(_COPIED) for path in trained)


def of_tokens(
    head: GraftedHead, teacher: DiffusionHead | None, z: jax.Array
) -> dict[str, jax.Array]:
    """Returns what `conditions` needs of video tokens z (b, t * s, c), given the two heads.

    These are "feature0" (b, m, c), with the aggregate "feature1" (b, n, c), and with a teacher its
    condition as "reference" (b, n, width).
    """
    z = z.astype(jnp.float32)
    found = {f"{_FEATURE}{i}": x for i, x in enumerate(head.memory.features(z))}
    return found if teacher is None else found | {_REFERENCE: teacher.condition(z)}


def conditions(
    policy: Policy, teacher: Policy | None, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the condition of the policy's head, and of the teacher's if there is one.

    `batch` has "z", or the arrays of `of_tokens`.
    """
    head = policy.action_head
    if "z" in batch:
        z = batch["z"].astype(jnp.float32)
        return head.condition(z), None if teacher is None else teacher.action_head.condition(z)
    memory = head.memory.project(*(batch[k] for k in sorted(batch) if k.startswith(_FEATURE)))
    residual = head.config.cross_attention == "residual"
    return memory if residual else head.stream(memory)[-1], batch.get(_REFERENCE)


def known(
    policy: Policy,
    teacher: Policy | None,
    phases: Sequence[Phase],
    tokens: Mapping[str, np.ndarray | Rows],
) -> Mapping[str, np.ndarray | Rows]:
    """Returns cached tokens as Stage 2 reads them: if features are fixed, in the place of "z".

    Args:
      policy: the graft.
      teacher: the policy with whose outputs training compares, or None.
      phases: of the training.
      tokens: "z" (samples, t * s, c) and other arrays, which are kept.
    """
    if not features_are_fixed(policy, phases):
        return tokens
    head, other = policy.action_head, teacher and teacher.action_head
    graph, state = nnx.split((head, other))

    @jax.jit
    def run(state, z):
        return of_tokens(*nnx.merge(graph, state), z)

    z = tokens["z"]
    found = in_batches(lambda rows: run(state, jnp.asarray(z[rows])), len(z), _BATCH)
    return found | {k: v for k, v in tokens.items() if k != "z"}
