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
from playground.config import ModelConfig
from playground.model.layers import Activation, Linear, Quantiser, RMSNorm
from playground.model.rope import rotate
from playground.model.step import Step

LATENT_EPS = 1e-6  # DeepSeek's own code leaves these two norms at their default, whatever `rms_norm_eps` says


def remember(new: torch.Tensor, cache: torch.Tensor | None, step: Step) -> torch.Tensor:
    """Writes what the new tokens leave in the cache, `[T, width]`; returns that of all tokens that a prefill sees."""
    if step.slots is None:
        return new
    flat = cache.view(-1, cache.shape[-1])
    flat[step.slots] = new
    return new if step.context is None else flat[step.context]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Prefill: the last T of S tokens look at all before them. `q [T, H, D]`, `k [S, G, D]`, `v [S, G, V]` with H a
    multiple of G; returns `[T, H, V]`."""
    mask, grouped = None, q.shape[1] // k.shape[1]
    if len(q) != len(k):
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        # with a mask, torch's memory-saving form of attention knows no groups: give every head its own keys
        k, v = (t.repeat_interleave(grouped, dim=1) for t in (k, v))
        grouped = 1
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped > 1)
    return out[0].transpose(0, 1)


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        c, a = config, config.attention
        self.config = a
        queries = a.heads * a.qk_head_dim
        if a.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, queries, c, f"{name}.q_proj")
            query = "q_proj"
        else:
            self.q_a_proj = Linear(c.hidden_size, a.q_lora_rank, c, f"{name}.q_a_proj")
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(a.q_lora_rank, queries, c, f"{name}.q_b_proj")
            self.quantise_q = Quantiser(c, f"{name}.q_b_proj")
            query = "q_a_proj"
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, a.cache_width, c, f"{name}.kv_a_proj_with_mqa")
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, LATENT_EPS)
        expanded = a.heads * (a.qk_nope_head_dim + a.v_head_dim)
        self.kv_b_proj = Linear(a.kv_lora_rank, expanded, c, f"{name}.kv_b_proj")
        self.o_proj = Linear(a.heads * a.v_head_dim, c.hidden_size, c, f"{name}.o_proj")
        self.quantise_in = Quantiser(c, f"{name}.{query}", f"{name}.kv_a_proj_with_mqa")
        self.quantise_latent = Quantiser(c, f"{name}.kv_b_proj")
        self.quantise_out = Quantiser(c, f"{name}.o_proj")

    def prepare(self, dtype: torch.dtype) -> None:
        """Splits the restored `kv_b_proj` into what decode absorbs: `[H, latent, nope]` and `[H, v, latent]`."""
        a = self.config
        expand = self.kv_b_proj.dequantised(dtype).unflatten(0, (a.heads, -1))
        keys, values = expand.split([a.qk_nope_head_dim, a.v_head_dim], dim=1)
        self.absorb_keys, self.absorb_values = keys.mT.contiguous(), values.contiguous()

    def forward(self, x: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor | None, step: Step) -> torch.Tensor:
        """`x [T, D]`, `rope [T, 2, R/2]`, `cache [pages, page_size, cache_width]` of this layer."""
        a = self.config
        act = self.quantise_in(x, step)
        q_nope, q_rope = self._queries(act, rope, step)
        latent, k_rope = self.kv_a_proj_with_mqa(act).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        k_rope = rotate(k_rope, rope[:, 0], rope[:, 1], interleaved=True)
        seen = remember(torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1), cache, step)
        if step.is_decode:
            out = self._decode(q_nope, q_rope, cache, step)
        else:
            out = self._prefill(torch.cat([q_nope, q_rope], dim=-1), seen, step)
        return self.o_proj(self.quantise_out(out.flatten(-2), step))

    def _queries(self, act: Activation, rope: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, H, nope]` and the rotated `[T, H, R]`."""
        a = self.config
        if a.q_lora_rank is None:
            q = self.q_proj(act)
        else:
            q = self.q_b_proj(self.quantise_q(self.q_a_layernorm(self.q_a_proj(act)), step))
        q = q.unflatten(-1, (a.heads, a.qk_head_dim))
        q_nope, q_rope = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, rope[:, None, 0], rope[:, None, 1], interleaved=True)

    def _decode(self, q_nope, q_rope, cache: torch.Tensor, step: Step) -> torch.Tensor:
        q_latent = kernels.plain_gemm(
            q_nope.transpose(0, 1), self.absorb_keys, out_dtype=q_nope.dtype
        )  # [H, R, latent]
        out = kernels.mla_decode(
            torch.cat([q_latent.transpose(0, 1), q_rope], dim=-1),
            cache,
            step.pages,
            step.lengths,
            scale=self.config.softmax_scale,
            value_dim=self.config.kv_lora_rank,
        )
        return kernels.plain_gemm(out.transpose(0, 1), self.absorb_values, out_dtype=out.dtype).transpose(0, 1)

    def _prefill(self, q: torch.Tensor, seen: torch.Tensor, step: Step) -> torch.Tensor:
        a = self.config
        latent, k_rope = seen.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.quantise_latent(latent, step)).unflatten(-1, (a.heads, -1))
        k_nope, v = kv.split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, a.heads, -1)], dim=-1)
        return causal_attention(q, k, v, a.softmax_scale)
