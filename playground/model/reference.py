"""The whole DeepSeek-V3 architecture in plain torch, without cache, kernels or FP8: the definition of right.

It is differentiable, so `playground.train` trains with it, and readable in one sitting, so the tests hold the
inference model (`transformer.py`) against it. Parameters carry the names of the Hub's checkpoints. Every expert sees
every token and its weight is zero where the gate did not choose it: wasteful, and obviously right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels import rotate
from playground.checkpoint.config import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Multi-head latent attention in its naive form: keys and values are expanded from the latent for every head."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        eps, dim, c = 1e-6, c.hidden_size, c.attention  # these norms don't follow `rms_norm_eps`
        self.config, self.softmax_scale, heads = c, c.softmax_scale, c.heads
        if c.q_lora_rank is None:
            self.q_proj = _linear(dim, heads * c.qk_head_dim)
        else:
            self.q_a_proj = _linear(dim, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, eps)
            self.q_b_proj = _linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = _linear(dim, sum(c.cache_widths))
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps)
        self.kv_b_proj = _linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = _linear(heads * c.v_head_dim, dim)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`x [B, S, D]`, `rope [S, 2, R/2]`, `mask` bool `[B, 1, S, S]` (true: may look) or None: causal."""
        c, heads = self.config, (-1, self.config.heads)
        cos, sin = rope[:, 0], rope[:, 1]
        if c.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (heads[1], c.qk_head_dim)).transpose(1, 2)  # [B, H, S, qk]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.unflatten(-1, (heads[1], c.qk_nope_head_dim + c.v_head_dim)).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = rotate(k_rope[:, None], cos, sin, interleaved=True).expand(-1, heads[1], -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin, interleaved=True)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(dim, inner), _linear(dim, inner), _linear(inner, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Group-limited top-k routing, with the correction bias of auxiliary-loss-free balancing (`noaux_tc`)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config, dim, c = c.moe, c.hidden_size, c.moe
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, dim))
        if c.corrected:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(c.n_routed_experts), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [T, D]` to the weight of every expert, `[T, E]` float32, zero where not chosen."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):  # routing stays float32, in training as well
            logits = x.float() @ self.weight.float().T
        scores = logits.sigmoid() if c.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores.detach()
        if c.corrected:
            choice = choice + self.e_score_correction_bias
        groups = choice.unflatten(-1, (c.n_group, -1))
        if c.corrected:
            group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        else:
            group_scores = groups.amax(-1)
        kept = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(c.topk_group, dim=-1).indices, 1.0)
        choice = groups.masked_fill(kept[..., None] == 0, float("-inf")).flatten(-2)
        chosen = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return torch.zeros_like(scores).scatter(-1, chosen, weights * c.routed_scaling_factor)


class MoE(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = Gate(c)
        dim, c = c.hidden_size, c.moe
        self.experts = nn.ModuleList(MLP(dim, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        if c.n_shared_experts:
            self.shared_experts = MLP(dim, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x [B, S, D]` to the output and the share of tokens that each expert got, `[E]`."""
        tokens = x.flatten(0, -2)
        weights = self.gate(tokens)
        gate = torch.stack([e.gate_proj.weight for e in self.experts]).to(x.dtype)  # [E, I, D]
        up = torch.stack([e.up_proj.weight for e in self.experts]).to(x.dtype)
        down = torch.stack([e.down_proj.weight for e in self.experts]).to(x.dtype)  # [E, D, I]
        spread = tokens.expand(len(self.experts), -1, -1)
        hidden = F.silu(spread @ gate.mT) * (spread @ up.mT) * weights.T[..., None].to(x.dtype)
        out = (hidden @ down.mT).sum(0).view_as(x)
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(x)
        return out, (weights > 0).float().mean(0)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, index: int, dropout: float):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(c) if c.is_moe(index) else MLP(c.hidden_size, c.intermediate_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask))
        out = self.mlp(self.post_attention_layernorm(x))
        out, load = out if isinstance(out, tuple) else (out, None)
        return x + self.dropout(out), load


class Body(nn.Module):
    """What a checkpoint calls `model`: embedding, layers, final norm."""

    def __init__(self, c: ModelConfig, dropout: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i, dropout) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)


class ReferenceModel(nn.Module):
    """Token ids `[B, S]` to logits `[B, S, vocab]` float32."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.model = Body(config, dropout)
        self.lm_head = _linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def use_softmax_scale(self, config: ModelConfig) -> None:
        """Takes over YaRN's softmax scale (or its absence) from `config`; pass the matching rope table to `forward`."""
        for layer in self.model.layers:
            layer.self_attn.softmax_scale = config.attention.softmax_scale

    def forward(
        self, tokens: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`rope [S, 2, R/2]` from `rope_table`; `mask` defaults to causal. Returns logits and each MoE layer's load."""
        x, loads = self.model.dropout(self.model.embed_tokens(tokens)), []
        for layer in self.model.layers:
            x, load = layer(x, rope, mask)
            loads += [] if load is None else [load]
        return self.lm_head(self.model.norm(x)).float(), loads
