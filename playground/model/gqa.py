"""Grouped-query attention for inference: Qwen3 (with RMSNorm on every query and key head), Qwen2 (with biases), Llama,
Mistral, SmolLM3."""

from __future__ import annotations

import torch
from torch import nn

import kernels
from playground.checkpoint.config import ModelConfig
from playground.model.attention import attend_prompt, attention_form, in_whole_blocks, places, seen_by_prefill
from playground.model.layers import Feed, Linear, Product, RMSNorm
from playground.model.layout import behind, padded_halves
from playground.model.step import Step


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        c, a, name = config, config.attention, f"layers.{index}.self_attn"
        self.config, self.eps, self.window = a, c.rms_norm_eps, c.window_of(index)
        head = padded_halves(a.head_dim, a.width) if a.head_dim != a.width else None
        every, shared = (behind(*[head] * n) if head else None for n in (a.heads, a.kv_heads))
        queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
        self.q_proj = Linear(c.hidden_size, queries, c, f"{name}.q_proj", bias=a.bias, rows=every)
        self.k_proj = Linear(c.hidden_size, keys, c, f"{name}.k_proj", bias=a.bias, rows=shared)
        self.v_proj = Linear(c.hidden_size, keys, c, f"{name}.v_proj", bias=a.bias, rows=shared)
        self.o_proj = Linear(queries, c.hidden_size, c, f"{name}.o_proj", whole=True, bias=a.output_bias, columns=every)
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, c.rms_norm_eps, rows=head)
            self.k_norm = RMSNorm(a.head_dim, c.rms_norm_eps, rows=head)
            self.eps = self.q_norm.eps
        self.inputs, self.output = Product((self.q_proj, self.k_proj, self.v_proj)), Product((self.o_proj,))
        self.feed = Feed(c, *(f"{name}.{part}_proj" for part in "qkv"))
        self.feed_output = Feed(c, f"{name}.o_proj")

    def forward(self, x: kernels.Formed, rope: torch.Tensor, cache: kernels.KV | None, step: Step) -> torch.Tensor:
        """`x [T, D]` in the form of `feed`, `rope [T, 2, head_dim/2]`, this layer's `cache`; returns partial sums
        `[P, T, D]`, at the tokens whose hidden states the step returns."""
        a, dtype = self.config, self.output.dtype
        kv, slots = places(cache, step, a.cache_widths, dtype)
        partials, bias = self.inputs(self.feed(x, step), biased=False), self.inputs.bias
        norms = (self.q_norm.weight, self.k_norm.weight) if a.qk_norm else None
        starts = self.inputs.starts
        about = {"heads": a.heads, "eps": self.eps, "dtype": dtype, "bias": bias}
        q = kernels.rope_heads(partials, starts, norms, rope, slots, kv, **about)
        scale, form = a.softmax_scale, attention_form(a.heads * a.width, self.feed_output.form)
        if step.is_decode:
            about = {"scale": scale, "kv_heads": a.kv_heads, "window": self.window}
            out = kernels.gqa_decode(q, cache, step.pages, step.lengths, form, **about)
        else:
            k, v = seen_by_prefill(kv, slots, step, dtype).unflatten(-1, (2, a.kv_heads, a.width)).unbind(1)
            out = attend_prompt(q, k, v, step, form, scale=scale, window=self.window)
        return self.output(self.feed_output(in_whole_blocks(out, self.feed_output.form), step))
