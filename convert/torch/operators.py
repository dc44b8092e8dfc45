"""The operators that a grafted head is built of, as torch modules, registered by name.

They stand one to one for those of `uva_jax/models/operators.py` and share their names. A new one is
a class with the same call and a line in `OPERATORS`.

Part of the exported `grafted_head.py`, so Python 3.8 and torch 2.0 run it: `convert/standalone.py`.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from convert.torch.layers import attend, layer_norm, modulate, table, zero_linear


def memory_tokens(config: SimpleNamespace) -> int:
    rows, cols = config.pool if config.adapter == "conv" else config.grid
    aggregate = config.n_actions if config.memory == "video+aggregate" else 0
    return config.n_frames * rows * cols + aggregate


class CrossAttention(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, hidden = config.width, config.cross_mlp_ratio * config.width
        self.heads = config.num_heads
        self.norm, self.norm_ff = layer_norm(width), layer_norm(width)
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(config.memory_width, width) for _ in range(2))
        self.query_position = table(1, config.n_actions, width)
        self.key_position = table(1, memory_tokens(config), width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        if config.cross_attention == "residual":
            self.adaLN_modulation = zero_linear(width, 3 * width)

    def forward(
        self, s: torch.Tensor, memory: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """s (b, n, width), memory (b, m, memory_width), y like s -> residual (b, n, width)."""
        x, gate = self.norm(s), 1.0
        if hasattr(self, "adaLN_modulation"):
            shift, scale, gate = self.adaLN_modulation(functional.silu(y)).chunk(3, dim=-1)
            x, gate = modulate(x, shift, scale), 1.0 + gate
        q, k = self.q(x) + self.query_position, self.k(memory) + self.key_position
        q, k, v = (
            rearrange(a, "b n (h d) -> b n h d", h=self.heads) for a in (q, k, self.v(memory))
        )
        attended = self.proj(attend(q, k, v))
        hidden = functional.gelu(self.fc1(self.norm_ff(s + attended)))
        return gate * (attended + self.fc2(hidden))


class SelfAttention(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width = config.width
        self.heads = config.self_attn_heads
        self.norm = layer_norm(width)
        self.position = table(1, config.n_actions, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.adaLN_modulation = zero_linear(width, 3 * width)

    def forward(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """h, y (b, n, width) -> residual (b, n, width)."""
        shift, scale, gate = self.adaLN_modulation(functional.silu(y)).chunk(3, dim=-1)
        x = modulate(self.norm(h), shift, scale) + self.position
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.heads)
        return gate * self.proj(attend(q, k, v))


class Mlp(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.in_ln = layer_norm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.adaLN_modulation = zero_linear(width, 3 * width)

    def forward(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """h, y (b, n, width) -> residual (b, n, width)."""
        shift, scale, gate = self.adaLN_modulation(functional.silu(y)).chunk(3, dim=-1)
        x = modulate(self.in_ln(h), shift, scale)
        return gate * self.fc2(functional.silu(self.fc1(x)))


# family -> name -> class; the families in the order in which a block lists its operators.
OPERATORS = {
    "cross_attn": {"cross_attn": CrossAttention},
    "self_attn": {"self_attn": SelfAttention},
    "mlp": {"mlp": Mlp},
}


def make_operator(family: str, name: str, config: SimpleNamespace) -> nn.Module:
    """The operator registered under `name`; raises ValueError if the family has none."""
    known = OPERATORS[family]
    if name not in known:
        raise ValueError(f"operator {name!r} is not a {family}; known are {', '.join(known)}.")
    return known[name](config)
