"""Stage 1 in a plain torch loop, one operator after the other, for timing it beside JAX's.

The losses are those of `uva_jax/graft/distill.py` and `distill_blocks.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from convert.torch import timing
from convert.torch.grafting import Training
from convert.torch.head import GraftedActionHead
from convert.torch.operators import KeptMlp
from convert.torch.reference import MLPHead
from uva_jax.models.policy_config import PolicyConfig
from uva_jax.runtime.sections_graft import DistillOptions

_DISTANCES = {
    "l1": functional.l1_loss,
    "l2": functional.mse_loss,
    "huber": functional.huber_loss,
}
_COPIED = ("memory.conv.", "memory.aggregator.", "condition_s")  # from the teacher; not trained


def steps(
    teacher: PolicyConfig,
    graft: PolicyConfig,
    options: DistillOptions,
    data: Mapping[str, np.ndarray],
    dtype: str,
    compiled: bool,
) -> dict[str, tuple[Callable[[], None], float]]:
    """Returns, by family, a function that trains each of its operators for one step.

    Args:
      teacher, graft: architectures; weights are random.
      options: losses, optimiser, and whether noise is drawn and the teacher's blocks recomputed.
      data: a batch of activations as float32; see `cache_arrays`, and "predicted" (b, n, w), the
        condition that the cross-attentions predict.
      dtype: of products, "float32" or "bfloat16".
      compiled: apply `torch.compile` to losses.

    Returns:
      {family: (function, operations)}, and "cross_attn from features", which does without the
      frozen layers of the memory.
    """
    given = {k: torch.from_numpy(v).to(timing.device()) for k, v in data.items()}
    head = timing.ready(GraftedActionHead(dataclasses.asdict(graft.action_head)))
    old = timing.ready(MLPHead(teacher.action_head)).requires_grad_(False)
    wrap = timing.wrapper(compiled)
    blocks = _Blocks(head, old, options, given)

    def streams(loss):
        names = ("memory.", "queries")
        params = [
            p
            for name, p in head.named_parameters()
            if (name.startswith(names) or ".cross_attn." in name) and not name.startswith(_COPIED)
        ]
        return [(params, loss)]

    features = _features(head, given["z"])
    losses = {
        "cross_attn": streams(
            lambda: _stream_loss(head, _features(head, given["z"]), given, options)
        ),
        "self_attn": blocks.losses("self_attn"),
        "mlp": blocks.losses("mlp"),
        "cross_attn from features": streams(lambda: _stream_loss(head, features, given, options)),
    }
    found = {}
    for family, operators in losses.items():
        trainings = [(Training(params, options), wrap(loss)) for params, loss in operators]

        def run(trainings=trainings):
            for training, loss in trainings:
                with timing.precision(dtype):
                    value = loss()
                training.step(value)

        found[family] = timing.measured(run)
    return found


def _features(head: GraftedActionHead, z: torch.Tensor) -> list[torch.Tensor]:
    """Returns what the copied layers of the memory, which are not trained, compute of z."""
    with torch.no_grad():
        return head.memory.features(z)


def _stream_loss(head, features, given, options: DistillOptions) -> torch.Tensor:
    memory, distance = head.memory.project(*features), _DISTANCES[options.loss["cross_attn"]]
    s, losses = head.queries.expand(len(memory), -1, -1), []
    for block in head.blocks:
        s = s + block.cross_attn(s, memory)
        condition = head.condition_shift + head.condition_scale * s
        losses.append(distance(condition, given["condition"]))
    return losses[-1] + 0.1 * sum(losses[:-1])


class _Blocks:
    """The losses of the self-attentions and MLPs of all blocks, each on its own."""

    def __init__(self, head: GraftedActionHead, teacher: MLPHead, options, given):
        self.head, self.net, self.options, self.given = head, teacher.net, options, given
        self.schedule = timing.schedule(teacher.config.train_steps)

    def losses(self, family: str) -> list[tuple[list[nn.Parameter], Callable]]:
        """Returns parameters and loss of the operator of each block, if it has one that learns."""
        return [
            (params, lambda i=i: self._loss(i, family))
            for i, block in enumerate(self.head.blocks)
            if not isinstance(getattr(block, family), KeptMlp)
            and (params := list(getattr(block, family).parameters()))
        ]

    @torch.no_grad()
    def _inputs(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns input and residual of the teacher's block i (b, n, w), and the timesteps."""
        given = self.given
        if not self.options.fresh_noise:
            return given["h"][:, i], given["residual"][:, i], given["t"]
        actions = given["actions"]
        t = torch.randint(len(self.schedule), (len(actions),), device=actions.device)
        x_t = self.schedule.diffuse(actions, t, torch.randn_like(actions))
        y = self.net.time_embed(t)[:, None] + given["condition"]
        h = self.net.input_proj(x_t)
        for block in self.net.res_blocks[:i]:
            h = block(h, y)
        return h, self.net.res_blocks[i](h, y) - h, t

    def _loss(self, i: int, family: str) -> torch.Tensor:
        block, distance = self.head.blocks[i], _DISTANCES[self.options.loss[family]]
        h, residual, t = self._inputs(i)
        with torch.no_grad():
            y = self.head.time_embed(t)[:, None] + self.given["predicted"]
        if family == "self_attn":
            with torch.no_grad():
                target = residual - block.mlp(h, y)
            return distance(block.self_attn(h, y), target)
        with torch.no_grad():
            added = block.self_attn(h, y)
        return distance(added + block.mlp(h + added, y), residual)
