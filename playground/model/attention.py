"""Multi-head latent attention for inference (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Prefill expands keys and values from the latent for every head. Decode never does: the key expansion is absorbed into
the query and the value expansion into the output, so attention runs on the cached latents themselves.
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


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        c = self.config = config
        heads = c.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim, c)
            query = "q_proj"
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, c)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
            self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim, c)
            self.quantise_q = Quantiser(c, f"{name}.q_b_proj")
            query = "q_a_proj"
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.latent_dim, c)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), c)
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, c)
        self.quantise_in = Quantiser(c, f"{name}.{query}", f"{name}.kv_a_proj_with_mqa")
        self.quantise_latent = Quantiser(c, f"{name}.kv_b_proj")
        self.quantise_out = Quantiser(c, f"{name}.o_proj")

    def prepare(self, dtype: torch.dtype) -> None:
        """Splits the restored `kv_b_proj` into what decode absorbs: `[H, latent, nope]` and `[H, v, latent]`."""
        c = self.config
        expand = self.kv_b_proj.dequantised(dtype).unflatten(0, (c.num_attention_heads, -1))
        keys, values = expand.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        self.absorb_keys, self.absorb_values = keys.mT.contiguous(), values.contiguous()

    def forward(self, x: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor | None, step: Step) -> torch.Tensor:
        """`x [T, D]`, `rope [T, 2, R/2]`, `cache [pages, page_size, latent]` of this layer."""
        c = self.config
        act = self.quantise_in(x, step)
        q_nope, q_rope = self._queries(act, rope, step)
        latent, k_rope = self.kv_a_proj_with_mqa(act).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope, rope[:, 0], rope[:, 1])
        if step.slots is not None:
            cache.view(-1, c.latent_dim)[step.slots] = torch.cat([latent, k_rope], dim=-1)
        if step.is_decode:
            out = self._decode(q_nope, q_rope, cache, step)
        else:
            out = self._prefill(q_nope, q_rope, latent, k_rope, step)
        return self.o_proj(self.quantise_out(out.flatten(-2), step))

    def _queries(self, act: Activation, rope: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, H, nope]` and the rotated `[T, H, R]`."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(act)
        else:
            q = self.q_b_proj(self.quantise_q(self.q_a_layernorm(self.q_a_proj(act)), step))
        q = q.unflatten(-1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, rope[:, None, 0], rope[:, None, 1])

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

    def _prefill(self, q_nope, q_rope, latent: torch.Tensor, k_rope: torch.Tensor, step: Step) -> torch.Tensor:
        c = self.config
        kv = self.kv_b_proj(self.quantise_latent(latent, step)).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, c.num_attention_heads, -1)], dim=-1)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, H, T, dim]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=c.softmax_scale)[0].transpose(0, 1)
