"""Grouped-query attention for inference: Qwen3 (with RMSNorm on every query and key head), Llama, Mistral."""

from __future__ import annotations

import torch
from torch import nn

import kernels
from playground.config import ModelConfig
from playground.model.attention import causal_attention, remember
from playground.model.layers import Linear, Quantiser, RMSNorm
from playground.model.rope import rotate
from playground.model.step import Step


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        c, a = config, config.attention
        self.config = a
        self.q_proj = Linear(c.hidden_size, a.heads * a.head_dim, c, f"{name}.q_proj")
        self.k_proj = Linear(c.hidden_size, a.kv_heads * a.head_dim, c, f"{name}.k_proj")
        self.v_proj = Linear(c.hidden_size, a.kv_heads * a.head_dim, c, f"{name}.v_proj")
        self.o_proj = Linear(a.heads * a.head_dim, c.hidden_size, c, f"{name}.o_proj")
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(a.head_dim, c.rms_norm_eps)
        self.quantise_in = Quantiser(c, *(f"{name}.{part}_proj" for part in "qkv"))
        self.quantise_out = Quantiser(c, f"{name}.o_proj")

    def forward(self, x: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor | None, step: Step) -> torch.Tensor:
        """`x [T, D]`, `rope [T, 2, head_dim/2]`, `cache [pages, page_size, cache_width]` of this layer."""
        a, act = self.config, self.quantise_in(x, step)
        q, k, v = (proj(act).unflatten(-1, (-1, a.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if a.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(t, rope[:, None, 0], rope[:, None, 1], interleaved=False) for t in (q, k))
        seen = remember(torch.cat([k, v], dim=1).flatten(1), cache, step)
        if step.is_decode:
            out = kernels.gqa_decode(q, cache, step.pages, step.lengths, scale=a.softmax_scale, kv_heads=a.kv_heads)
        else:
            k, v = seen.unflatten(-1, (2, a.kv_heads, a.head_dim)).unbind(1)
            out = causal_attention(q, k, v, a.softmax_scale)
        return self.o_proj(self.quantise_out(out.flatten(-2), step))
