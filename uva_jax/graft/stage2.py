"""Stage 2 as a whole: selects the batches and fine-tunes the assembled graft.

`finetune.py` has the training. Batches come from the tokens of the capture, from tokens or latents
of other windows that are captured first, or from the windows themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from uva_jax.data import source
from uva_jax.data.windows import Strips
from uva_jax.graft import finetune, fixed, held_out, record
from uva_jax.graft.capture import CaptureOptions
from uva_jax.models.policy import Policy
from uva_jax.runtime.metrics import MetricsWriter
from uva_jax.storage.sample_store import SampleStore
from uva_jax.storage.site import Site


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of Stages 2 and 3. Functions are called only if their result is needed.

    Attributes:
      policy: the graft that is trained, with arrays.
      teacher: () -> the policy from which it was made.
      reader: () -> the reader of the policy's windows.
      cache: folder of the capture, or None.
      origin: the teacher's hash, which caches of tokens record.
      latents: folder of `store_latents`, or None.
    """

    policy: Policy
    teacher: Callable[[], Policy]
    reader: Callable[[], source.WindowReader]
    cache: Path | None
    origin: str
    latents: Path | None = None


def fine_tune(
    inputs: Inputs,
    options: finetune.FinetuneOptions,
    folder: Path,
    metrics: MetricsWriter,
    *,
    capture: CaptureOptions,
    mesh: Mesh,
    seed: int,
    is_primary: bool = True,
    barrier: Callable[[str], None] = lambda name: None,
) -> tuple[Policy, dict]:
    """Fine-tunes the graft; every process calls it.

    Args:
      inputs: see `Inputs`.
      options: of the training.
      folder: holds resumable states, and captured tokens or latents.
      metrics: writer of progress and messages.
      capture: options for capturing these.
      mesh: (data, fsdp, tensor).
      seed: of windows, order and draws.
      is_primary, barrier: see `Site`.

    Returns:
      the policy with averaged parameters, and metrics that JSON can hold: with `keep_best`
      "kept_step", and "held_out_error" and "held_out_error_before", of that step and of the graft
      as it was given (the means of `held_out.sample_errors`).

    Raises:
      UserError: `reuse_cache` is set, but parameters before the head train; there are too few
        windows; or `keep_best` is set, but no episode is held out.
    """
    inputs = dataclasses.replace(inputs, reader=functools.cache(inputs.reader))
    teacher = inputs.teacher() if options.teacher_weight else None
    trainer = finetune.Trainer(inputs.policy, options, mesh, seed, teacher)
    known = functools.partial(fixed.known, inputs.policy, teacher, trainer.phases)

    def captured(name: str, strips: Strips, draws: int) -> SampleStore:
        site = Site(folder / name, metrics, is_primary, barrier)
        return _captured(inputs, site, strips, capture, draws, latents=not trainer.tokens)

    if options.reuse_cache:
        cached = finetune.cached_tokens(inputs.cache / "train")
        batches = finetune.token_batches(known(cached), options, seed)
    else:
        reader = inputs.reader()
        if trainer.tokens:
            strips = _windows(reader, options, metrics, capture.strip, seed)
            cached = known(captured("tokens", strips, seed + 2).arrays(["z", "actions"]))
            batches = finetune.token_batches(cached, options, seed)
        elif options.cache_latents:
            if inputs.latents is None:
                site = Site(folder / "latents", metrics, is_primary, barrier)
                store = store_latents(inputs, options, capture, site, seed)
            else:
                store = SampleStore.open(inputs.latents)
            batches = finetune.token_batches(store.arrays(store.names), options, seed)
        else:
            strips = _windows(reader, options, metrics, 1, seed)
            batches = finetune.image_batches(reader, strips, options, seed)
    windows = None
    if options.keep_best:
        count = held_out.whole_batches(options.check_windows, mesh)
        if trainer.tokens and inputs.cache is not None:
            windows = held_out.cached_windows(inputs.cache / "held_out", count)
        else:
            strips = inputs.reader().held_out(
                seed=seed, count=count, way_out="; or set config.finetune.keep_best=False"
            )
            if trainer.tokens:
                windows = captured("tokens_held_out", strips, seed + 3).load(["z", "actions"])
            elif options.cache_latents:
                windows = captured("latents_held_out", strips, seed).load()
            else:
                windows = source.single_windows(inputs.reader().read(strips, np.arange(count)))
    count = sum(trainer.arrays[k].size for k in trainer.phases[0].trainable)
    metrics.say(
        f"{count / 1e6:.2f} M of {sum(x.size for x in trainer.arrays.values()) / 1e6:.2f} M "
        f"parameters train, on {trainer.source}"
    )
    tuned, best = trainer.run(batches, folder=folder, metrics=metrics, held_out=windows)
    found = {"trainable_parameters": count, "steps": options.steps}
    if best is not None:
        kept = int(best.step)
        error, before = (float(np.mean(x)) for x in (best.errors, best.start))
        found |= {"kept_step": kept, "held_out_error": error, "held_out_error_before": before}
        metrics.say(
            f"kept the state of step {kept} of {options.steps}: its error of action samples on "
            f"held-out windows is {error:.5f}, before fine-tuning {before:.5f}"
        )
    return tuned, found


def store_latents(
    inputs: Inputs,
    options: finetune.FinetuneOptions,
    capture: CaptureOptions,
    site: Site,
    seed: int,
) -> SampleStore:
    """Encodes the windows that `options.data_fraction` selects; every process calls it.

    Args:
      inputs: its teacher encodes frames.
      options: of the training.
      capture: strips and batches.
      site: the cache's folder, metrics and processes.
      seed: of the choice of episodes and the order.

    Returns:
      a cache of `capture.latent_strips`.
    """
    strips = _windows(inputs.reader(), options, site.metrics, capture.strip, seed)
    return _captured(inputs, site, strips, capture, seed, latents=True)


def _captured(inputs, site, strips: Strips, capture, draws: int, *, latents: bool) -> SampleStore:
    samples, strip = strips.current.size, strips.current.shape[1]
    return record.capture_cache(
        site,
        inputs.teacher(),
        strips,
        inputs.reader(),
        dataclasses.replace(capture, num_samples=samples, strip=strip, blocks=False),
        seed=draws,
        origin=inputs.origin,
        latents=latents,
    )


def _windows(reader, options, metrics, strip: int, seed: int) -> Strips:
    """Returns all windows of the episodes that `data_fraction` selects, in strips."""
    mask = finetune.chosen_episodes(reader.buffer, reader.options, options, seed)
    strips = reader.strips(mask, strip=strip, seed=seed)
    metrics.say(
        f"{int(mask.sum())} of {reader.buffer.n_episodes} episodes, {strips.current.size} windows"
    )
    return strips
