"""A torch reference of CLIP's text transformer with transformers' tensor names, for `verify`.

It is written from the published formulas; `uva_jax/models/text_tower.py` is its port.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from uva_jax.models.policy_config import TextTowerConfig

_EPS = 1e-5


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x, seen):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(p(x), "b n (h d) -> b h n d", h=self.heads) for p in projections)
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class _Layer(nn.Module):
    def __init__(self, c: TextTowerConfig):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.width, eps=_EPS) for _ in range(2))
        self.self_attn = _Attention(c.width, c.num_heads)
        self.mlp = _Mlp(c.width, c.mlp_width)

    def forward(self, x, seen):
        x = x + self.self_attn(self.layer_norm1(x), seen)
        return x + self.mlp(self.layer_norm2(x))


class _Transformer(nn.Module):
    def __init__(self, c: TextTowerConfig):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.embeddings.position_embedding = nn.Embedding(c.max_length, c.width)
        self.encoder.layers = nn.ModuleList(_Layer(c) for _ in range(c.depth))
        self.final_layer_norm = nn.LayerNorm(c.width, eps=_EPS)


class TextTower(nn.Module):
    """CLIP's text tower."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.text_model = _Transformer(config)
        self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def stages(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns "embed", "layer<i>" and "text_embeds" (b, projection) for tokens, mask (b, n)."""
        body, n = self.text_model, tokens.shape[1]
        embeddings = body.embeddings
        seen = torch.ones(n, n, dtype=torch.bool).tril() & (mask != 0)[:, None, None]
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight[:n]
        stages = {"embed": x}
        for i, layer in enumerate(body.encoder.layers):
            x = stages[f"layer{i}"] = layer(x, seen)
        x = body.final_layer_norm(x)[torch.arange(len(x)), tokens.argmax(dim=1)]
        return stages | {"text_embeds": self.text_projection(x)}
