"""Opens data for a policy with the reader of its layout."""

from __future__ import annotations

from uva_jax.data.replay_buffer import Progress
from uva_jax.data.source import DataOptions, WindowReader, open_buffer
from uva_jax.data.umi import UmiReader
from uva_jax.data.windows import WindowSpec
from uva_jax.models.policy import Policy
from uva_jax.runtime.errors import UserError

READERS = {"": WindowReader, "umi": UmiReader}  # by `config.data.layout`


def open_reader(
    options: DataOptions,
    policy: Policy,
    *,
    spec: WindowSpec | None = None,
    progress: Progress | None = None,
) -> WindowReader:
    """Opens the data of `config.data`, rendering the embedded demonstrations on first use.

    Args:
      options: of the data.
      policy: whose windows are read.
      spec: the content of a window; None: the inputs of the policy's `predict_action`.
      progress: called with (frames done, total frames) while rendering.

    Raises:
      UserError: the layout is unknown, or the data are missing, damaged or incomplete.
    """
    if options.layout not in READERS:
        known = ", ".join(map(repr, READERS))
        raise UserError(f"the data's layout is {options.layout!r}; it can be {known}")
    kind, spec = READERS[options.layout], spec or WindowSpec.of(policy.config)
    return kind(open_buffer(options, kind.arrays(spec, options), progress), options, policy, spec)
