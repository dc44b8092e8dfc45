"""The operators of a grafted head as torch modules, registered by name.

They correspond to those of `uva_jax/models/operators.py` and have the same names. A new one is a
class with the same call and an entry of `OPERATORS`, such as

    OPERATORS["self_attn"]["package.module:Class"] = TorchClass

It is part of the exported `grafted_head.py` (`convert/standalone.py`), so it must run with Python
3.8 and torch 2.0.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from einops import rearrange, reduce
from torch import nn
from torch.nn import functional

from convert.torch.layers import attend, layer_norm, modulate, table, zero_linear


def memory_grid(config: SimpleNamespace) -> tuple[int, int]:
    """Returns rows and columns of the memory's tokens for each frame."""
    return config.pool if config.adapter == "conv" else config.grid


class CrossAttention(nn.Module):
    """Attention from action steps to the memory, followed by a feed-forward layer."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, hidden = config.width, config.cross_mlp_ratio * config.width
        self.heads = config.num_heads
        self.frames, self.grid = config.n_frames, memory_grid(config)
        aggregate = config.n_actions if config.memory == "video+aggregate" else 0
        self.norm, self.norm_ff = layer_norm(width), layer_norm(width)
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(config.memory_width, width) for _ in range(2))
        self.query_position = table(1, config.n_actions, width)
        self.key_position = table(1, self.video_tokens() + aggregate, width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        if config.cross_attention == "residual":
            self.adaLN_modulation = zero_linear(width, 3 * width)

    def forward(
        self, s: torch.Tensor, memory: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the residual (b, n, width) of s (b, n, width) and memory (b, m, memory_width).

        y (b, n, width) is the modulation in the "residual" form.
        """
        x, gate = self.norm(s), 1.0
        if hasattr(self, "adaLN_modulation"):
            shift, scale, gate = self.adaLN_modulation(functional.silu(y)).chunk(3, dim=-1)
            x, gate = modulate(x, shift, scale), 1.0 + gate
        memory = self.pooled(memory)
        q, k = self.q(x) + self.query_position, self.k(memory) + self.key_position
        q, k, v = (
            rearrange(a, "b n (h d) -> b n h d", h=self.heads) for a in (q, k, self.v(memory))
        )
        attended = self.proj(attend(q, k, v))
        hidden = functional.gelu(self.fc1(self.norm_ff(s + attended)))
        return gate * (attended + self.fc2(hidden))

    def video_tokens(self) -> int:
        """Returns the number of video tokens from which keys are computed."""
        return self.frames * self.grid[0] * self.grid[1]

    def pooled(self, memory: torch.Tensor) -> torch.Tensor:
        """Pools the memory (b, m, memory_width) for keys and values: (b, m', memory_width)."""
        return memory


class PooledCrossAttention(CrossAttention):
    """Cross-attention to means of the video's tokens over 2 x 2 of a frame's grid."""

    def video_tokens(self) -> int:
        return super().video_tokens() // 4

    def pooled(self, memory: torch.Tensor) -> torch.Tensor:
        video, (rows, cols) = 4 * self.video_tokens(), self.grid
        means = reduce(
            memory[:, :video],
            "b (t h i w j) c -> b (t h w) c",
            "mean",
            t=self.frames,
            h=rows // 2,
            w=cols // 2,
            i=2,
            j=2,
        )
        return torch.cat([means, memory[:, video:]], dim=1)


class SelfAttention(nn.Module):
    """Attention among the action steps with adaptive layer norm."""

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
        return gate * self.proj(attend(q, k, v, mask=self.mask(h)))

    def mask(self, h: torch.Tensor) -> torch.Tensor | None:
        """Returns the attention mask (n, n), True for attended steps; None: all."""
        return None


class WindowedSelfAttention(SelfAttention):
    """Self-attention of each step to at most `self_attn_window` steps on either side."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.window = config.self_attn_window

    def mask(self, h: torch.Tensor) -> torch.Tensor:
        position = torch.arange(h.shape[1], device=h.device)
        return (position[:, None] - position).abs() <= self.window


class LightSelfAttention(nn.Module):
    """Self-attention at a quarter of the width, without modulation."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, self.heads = config.width, max(1, config.self_attn_heads // 4)
        inner = width // config.self_attn_heads * self.heads
        self.norm = layer_norm(width)
        self.position = table(1, config.n_actions, 3 * inner)
        self.qkv, self.proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def forward(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the residual (b, n, width) of h (b, n, width); y is not used."""
        qkv = self.qkv(self.norm(h)) + self.position
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.heads)
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    """The teacher's block MLP with a wider hidden layer."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width, hidden = config.width, self.hidden(config)
        self.in_ln = layer_norm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.adaLN_modulation = zero_linear(width, 3 * width)

    def forward(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """h, y (b, n, width) -> residual (b, n, width)."""
        shift, scale, gate = self.adaLN_modulation(functional.silu(y)).chunk(3, dim=-1)
        return gate * self.fc2(self.activation(modulate(self.in_ln(h), shift, scale)))

    @staticmethod
    def hidden(config: SimpleNamespace) -> int:
        """Returns the number of units of the hidden layer."""
        return config.mlp_ratio * config.width

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the hidden layer (b, n, hidden) of x (b, n, width)."""
        return functional.silu(self.fc1(x))


class SwiGLU(Mlp):
    """The MLP with a gated hidden layer."""

    def __init__(self, config: SimpleNamespace):
        super().__init__(config)
        self.fc_gate = nn.Linear(config.width, self.hidden(config))

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return super().activation(x) * self.fc_gate(x)


class KeptMlp(Mlp):
    """The teacher's block MLP at its own width."""

    @staticmethod
    def hidden(config: SimpleNamespace) -> int:
        return config.width


class Nothing(nn.Module):
    """An operator with residual zero, for blocks without an attention."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()

    def forward(self, stream: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Returns zeros of the shape of `stream` (b, n, width)."""
        return torch.zeros_like(stream)


# family -> name -> class; families in the order of a block's operators.
OPERATORS = {
    "cross_attn": {
        "cross_attn": CrossAttention,
        "pooled_cross_attn": PooledCrossAttention,
        "none": Nothing,
    },
    "self_attn": {
        "self_attn": SelfAttention,
        "windowed_self_attn": WindowedSelfAttention,
        "light_self_attn": LightSelfAttention,
        "none": Nothing,
    },
    "mlp": {"mlp": Mlp, "swiglu": SwiGLU, "keep": KeptMlp},
}


def make_operator(family: str, name: str, config: SimpleNamespace) -> nn.Module:
    """Makes the operator registered under `name`.

    Raises:
      ValueError: the family has no operator of that name.
    """
    known = OPERATORS[family]
    if name not in known:
        raise ValueError(
            f"operator {name!r} is not a {family}; known are {', '.join(known)}. Set "
            f"OPERATORS[{family!r}][{name!r}] to its torch class first"
        )
    return known[name](config)
