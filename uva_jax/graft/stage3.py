"""Stage 3 as a whole: finds the video tokens of the fine-tuned policy and shortens its head.

`shorten.py` has the training. The tokens are those of the capture if Stage 2 has left everything
before the head as it was, and are captured again otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from uva_jax.graft import record
from uva_jax.graft.assemble import assemble
from uva_jax.graft.capture import CaptureOptions
from uva_jax.graft.finetune import cached_tokens
from uva_jax.graft.shorten import shorten_head
from uva_jax.graft.stage2 import Inputs
from uva_jax.models import surgery
from uva_jax.models.policy import Policy
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.runtime.sections_graft import ShortenOptions
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site


def shorten(
    inputs: Inputs,
    options: ShortenOptions,
    folder: Path,
    metrics: MetricsWriter,
    *,
    capture: CaptureOptions,
    seed: int,
    is_primary: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> tuple[Policy, dict]:
    """Shortens the head of the fine-tuned policy; every process calls it.

    Args:
      inputs: see `stage2.Inputs`; its policy is the fine-tuned graft, in float32.
      options: of the training.
      folder: holds samples, resumable states and captured tokens.
      metrics: writer of progress and messages.
      capture: options for capturing tokens.
      seed: of windows, order and draws.
      is_primary, barrier: see `Site`.

    Returns:
      the policy and the figures of `shorten_head`.
    """
    cache, teacher = inputs.cache, inputs.teacher()
    if cache is None or not _same_tokens(inputs.policy, teacher):
        cache = folder / "activations"
        record.capture_activations(
            assemble(inputs.policy, teacher.action_head),
            inputs.reader(),
            dataclasses.replace(capture, blocks=False),
            cache,
            metrics,
            seed=seed,
            origin=f"{inputs.origin}, fine-tuned",
            is_primary=is_primary,
            barrier=barrier,
        )
    train = cached_tokens(cache / "train")
    held_out = SampleStore.open(cache / "held_out").load(["z", "actions"])
    site = Site(folder, metrics, is_primary, barrier)
    return shorten_head(inputs.policy, train, held_out, options, seed=seed, site=site)


def _same_tokens(policy: Policy, teacher: Policy) -> bool:
    """Whether two policies give the same video tokens: equal parameters before the head."""
    ours, theirs = surgery.flatten(policy), surgery.flatten(teacher)
    return all(
        np.array_equal(ours[path], x)
        for path, x in theirs.items()
        if not path.startswith("action_head/")
    )
