"""Attention for inference: what both kinds share, and multi-head latent attention.

MLA (DeepSeek-V2, arXiv:2405.04434, section 2.1): prefill expands keys and values from the latent for every head.
Decode never does: the key expansion is absorbed into the query and the value expansion into the output, so attention
runs on the cached latents themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from playground.checkpoint.config import BLOCK_SIZE, ModelConfig, whole_blocks
from playground.model.layers import Feed, Linear, Product, RMSNorm
from playground.model.layout import behind, padded, pairs_of_halves
from playground.model.step import Step

LATENT_EPS = 1e-6  # DeepSeek's own code leaves these two norms at their default, whatever `rms_norm_eps` says


def places(
    cache: kernels.KV | None, step: Step, widths: tuple[int, ...], dtype: torch.dtype
) -> tuple[kernels.KV, torch.Tensor]:
    """Where a step's tokens leave what attention keeps of them: the cache, or, where nothing is kept, a buffer for this
    forward; and the place of each token in it."""
    if cache is not None:
        return cache, step.slots
    count, device = len(step.positions), step.positions.device
    return kernels.KV.zeros(1, count, widths=widths, dtype=dtype, device=device), torch.arange(count, device=device)


def seen_by_prefill(kv: kernels.KV, slots: torch.Tensor, step: Step, dtype: torch.dtype) -> torch.Tensor:
    """What the cache holds of all tokens that a prefill sees, `[S, width]`: in E4M3 those of the chunk itself
    as well, so that every later token reads the same numbers."""
    return kernels.gather_kv(kv, slots if step.context is None else step.context, dtype=dtype)


def attend_prompt(
    q, k, v, step: Step, form: kernels.Form, *, scale: float, window: int | None = None
) -> kernels.Formed:
    """`kernels.causal_attention`, at the tokens whose hidden states the step returns."""
    if step.wanted is None:
        return kernels.causal_attention(q, k, v, form, scale=scale, window=window)
    out = kernels.causal_attention(q, k, v, kernels.Form(plain=True, fp8=False), scale=scale, window=window)
    return kernels.formed(step.of_wanted(out.plain), form)


def attention_form(width: int, form: kernels.Form) -> kernels.Form:
    """The form in which attention leaves its result for a product that wants `form`: a row that is no whole number of
    blocks is padded first, and quantised then."""
    return kernels.Form(plain=True, fp8=False) if width % BLOCK_SIZE else form


def in_whole_blocks(out: kernels.Formed, form: kernels.Form) -> kernels.Formed:
    if out.plain is None or not (rest := -out.plain.shape[1] % BLOCK_SIZE):
        return out
    return kernels.formed(F.pad(out.plain, (0, rest)), form)


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        c, a, name = config, config.attention, f"layers.{index}.self_attn"
        self.config = a
        queries, per_head, kept = a.heads * a.qk_head_dim, None, None
        pairs = padded(a.qk_rope_head_dim, a.qk_rope_head_dim) if a.interleaved else pairs_of_halves(a.qk_rope_head_dim)
        if not a.interleaved:
            per_head = behind(*[padded(a.qk_nope_head_dim, a.qk_nope_head_dim), pairs] * a.heads)
        if not a.interleaved or a.latent != a.kv_lora_rank:
            kept = behind(padded(a.kv_lora_rank, a.latent), pairs)
        if a.q_lora_rank is None:
            query, self.q_proj = "q_proj", Linear(c.hidden_size, queries, c, f"{name}.q_proj", rows=per_head)
            first = self.q_proj
        else:
            query, self.q_a_proj = "q_a_proj", Linear(c.hidden_size, a.q_lora_rank, c, f"{name}.q_a_proj", whole=True)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, LATENT_EPS, whole_blocks(a.q_lora_rank))
            self.q_b_proj = Linear(a.q_lora_rank, queries, c, f"{name}.q_b_proj", rows=per_head)
            self.expand_query = Product((self.q_b_proj,))
            self.feed_query = Feed(c, f"{name}.q_b_proj")
            first = self.q_a_proj
        both = a.kv_lora_rank + a.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, both, c, f"{name}.kv_a_proj_with_mqa", rows=kept)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, LATENT_EPS, a.latent)
        expanded = a.heads * (a.qk_nope_head_dim + a.v_head_dim)
        self.kv_b_proj = Linear(a.kv_lora_rank, expanded, c, f"{name}.kv_b_proj")
        self.o_proj = Linear(a.heads * a.v_head_dim, c.hidden_size, c, f"{name}.o_proj", whole=True)
        self.inputs = Product((first, self.kv_a_proj_with_mqa))
        self.expand_latent, self.output = Product((self.kv_b_proj,)), Product((self.o_proj,))
        self.feed = Feed(c, f"{name}.{query}", f"{name}.kv_a_proj_with_mqa")
        self.feed_latent, self.feed_output = Feed(c, f"{name}.kv_b_proj"), Feed(c, f"{name}.o_proj")

    def prepare(self, dtype: torch.dtype) -> None:
        """Splits the restored `kv_b_proj` into what decode absorbs: `[H, latent, nope]` and `[H, v, latent]`."""
        a = self.config
        expand = self.kv_b_proj.dequantised(dtype).unflatten(0, (a.heads, -1))
        keys, values = expand.split([a.qk_nope_head_dim, a.v_head_dim], dim=1)
        self.absorb_keys, self.absorb_values = keys.mT.contiguous(), values.contiguous()

    def forward(self, x: kernels.Formed, rope: torch.Tensor, cache: kernels.KV | None, step: Step) -> torch.Tensor:
        """`x [T, D]` in the form of `feed`, `rope [T, 2, R/2]`, this layer's `cache`; returns partial sums
        `[P, T, D]`, at the tokens whose hidden states the step returns."""
        dtype = self.output.dtype
        kv, slots = places(cache, step, self.config.cache_widths, dtype)
        partials = self.inputs(self.feed(x, step))
        keep = kernels.Keep(self.inputs.starts[1], self.kv_a_layernorm.weight, self.kv_a_layernorm.eps, slots, kv)
        if self.config.q_lora_rank is not None:
            norm, query_form = self.q_a_layernorm, self.feed_query.form
            query = kernels.split_latents(partials, norm.weight, rope, keep, query_form, dtype=dtype, eps=norm.eps)
            partials, keep = self.expand_query(self.feed_query(query, step)), None
        form = attention_form(self.config.heads * self.config.v_head_dim, self.feed_output.form)
        if step.is_decode:
            q = kernels.absorb_queries(partials, self.absorb_keys, rope, keep, dtype=dtype)
            scale = self.config.softmax_scale
            out = kernels.mla_decode(q, cache, step.pages, step.lengths, self.absorb_values, form, scale=scale)
        else:
            if keep:
                kernels.split_latents(partials, None, rope, keep, None, dtype=dtype, eps=0.0)
            out = self._prefill(partials, rope, seen_by_prefill(kv, slots, step, dtype), step, form)
        return self.output(self.feed_output(in_whole_blocks(out, self.feed_output.form), step))

    def _prefill(
        self, partials: torch.Tensor, rope: torch.Tensor, seen: torch.Tensor, step: Step, form: kernels.Form
    ) -> kernels.Formed:
        a = self.config
        q = kernels.add_up(partials, dtype=seen.dtype)[:, : a.heads * a.qk_head_dim].unflatten(-1, (a.heads, -1))
        q_nope, q_rope = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        q = torch.cat([q_nope, kernels.rotate(q_rope, rope[:, None, 0], rope[:, None, 1], interleaved=True)], dim=-1)
        latent, k_rope = seen.split([a.latent, a.qk_rope_head_dim], dim=-1)
        act = self.feed_latent(kernels.formed(latent.contiguous(), self.feed_latent.form), step)
        kv = kernels.add_up(self.expand_latent(act), dtype=seen.dtype).unflatten(-1, (a.heads, -1))
        k_nope, v = kv.split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, a.heads, -1)], dim=-1)
        return attend_prompt(q, k, v, step, form, scale=a.softmax_scale)
