"""`bench capture`: times the capture of the teacher's activations, here and in PyTorch.

The capture takes windows in strips of neighbours, which share encoded frames if the configuration
says so. In PyTorch every window encodes its own frames, or they are shared in the same way. Both
compute the blocks' activations, to the end in the device's memory; writing them is not measured.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from uva_jax.cli import bench_turns
from uva_jax.cli.bench_models import (
    policy_config,
    random_actions,
    random_frames,
    random_policy,
    settings,
)
from uva_jax.cli.bench_turns import COMPILED, OURS, TORCH, Row, Work
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.sections_graft import CaptureOptions
from uva_jax.runtime.settings import section

WINDOW = "a window"
SHARED, APART = "frames shared", "frames apart"


def options_of(size: str, strips: int | None) -> CaptureOptions:
    """Returns the options of a size's configuration, with another number of strips if given."""
    options = section(settings(size).capture, CaptureOptions)
    return dataclasses.replace(options, batch=strips or options.batch)


def _batch(config: PolicyConfig, strips: int, strip: int) -> dict[str, np.ndarray]:
    return {
        "image": random_frames(strips, strip + config.mar.n_frames - 1),
        "action": random_actions(config, strips, strip),
    }


def build(backend: str, *, size: str, dtype: str, strips: int | None, frames: str):
    """Returns the capture of a batch of strips; see `bench_turns.measure`."""
    config, options = policy_config(size, "teacher"), options_of(size, strips)
    if backend == OURS:
        return {WINDOW: _ours(config, options, dtype)}
    from convert.torch import capturing

    data, shared = _batch(config, options.batch, options.strip), frames == SHARED
    windows = options.batch * options.strip
    run, count = capturing.capture(config, data, dtype, shared, backend == COMPILED)
    return {WINDOW: Work(run, count / windows, windows)}


def _ours(config: PolicyConfig, options: CaptureOptions, dtype: str) -> Work:
    import jax
    from flax import nnx

    from uva_jax.cli.flops import flops
    from uva_jax.graft.capture import Capture
    from uva_jax.runtime import parallel

    policy = random_policy(config, dtype)
    capture = Capture(policy, options, jax.devices())
    state = jax.device_put(nnx.state(policy), parallel.replicated(capture.mesh))
    data, key = _batch(config, capture.strips, options.strip), jax.random.key(0)
    windows = capture.strips * options.strip
    samples = np.arange(windows, dtype=np.int32).reshape(capture.strips, options.strip)

    def run():
        arrays = parallel.shard_batch(capture.mesh, (data, samples))
        return jax.block_until_ready(capture.run(state, *arrays, key))

    return Work(run, flops(capture.run, state, data, samples, key) / windows, windows)


def bench_capture(size: str, dtype: str, strips: int | None, compiled: bool) -> dict:
    """Measures the capture of a teacher's activations.

    Args:
      size: of the teacher, "tiny" or "pusht".
      dtype: of products, "float32" or "bfloat16".
      strips: of a step on each device; None: `capture.batch` of the configuration.
      compiled: also measure `torch.compile`.

    Returns:
      the result of `bench_turns.measure`, and the arguments.

    Raises:
      UserError: a process failed.
    """
    given, options = {"size": size, "dtype": dtype, "strips": strips}, options_of(size, strips)
    backends = bench_turns.torch_backends(compiled)
    kinds = (APART, SHARED) if options.strip > 1 else (APART,)
    pairs = [(OURS, SHARED if options.strip > 1 else APART)]
    pairs += [(backend, frames) for frames in kinds for backend in backends]
    rows = [Row(frames, backend, given | {"frames": frames}) for backend, frames in pairs]
    found = {"strips": options.batch, "strip": options.strip}
    return given | found | bench_turns.measure(__name__, rows)


def table(result: dict) -> str:
    """Formats the result of `bench_capture`; speeds are relative to PyTorch's, frames apart."""
    torch = bench_turns.row_of(result, TORCH, APART)
    found = [
        f"{result['size']}: the capture of {result['strips']} strip(s) of {result['strip']} "
        f"window(s) in {result['dtype']}, by window",
        *bench_turns.lines(result, {WINDOW: bench_turns.seconds(torch, WINDOW)}),
    ]
    for row in result["rows"]:
        speed = 1 / bench_turns.seconds(row, WINDOW)
        found.append(f"{row['backend']} {row['name']}: {speed:,.1f} windows/s")
    return "\n".join(found)
