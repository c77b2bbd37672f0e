"""Mixture of experts: group-limited top-k routing and the experts that it chooses, for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from playground.config import ModelConfig
from playground.model.layers import MLP, PlainLinear, Quantiser, _parameter
from playground.model.step import Step


class Gate(PlainLinear):
    """Scores every expert, keeps the best groups, then the best experts in them (DeepSeek-V3, section 2.1.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.moe.n_routed_experts)
        self.config = config.moe
        if self.config.corrected:
            self.e_score_correction_bias = _parameter(self.config.n_routed_experts, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x [T, D]` to the chosen experts `[T, k]` int64 and their weights `[T, k]` float32."""
        c = self.config
        logits = super().forward(x)
        scores = row_sigmoid(logits) if c.scoring_func == "sigmoid" else logits.softmax(-1)
        choice = scores + self.e_score_correction_bias if c.corrected else scores
        if c.n_group > 1:
            groups = choice.view(len(choice), c.n_group, -1)
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1) if c.corrected else groups.amax(-1)
            kept = best.topk(c.topk_group, dim=-1).indices
            dropped = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
            choice = groups.masked_fill(dropped[..., None], float("-inf")).view_as(scores)
        chosen = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)  # the bias chooses, the plain score weighs
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * c.routed_scaling_factor


def row_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """Sigmoid with the same bits for a row alone and in company. A CPU computes a tensor's last few values, short of a
    whole vector, by another formula than the rest; padded to 64 columns, no row has such a tail."""
    return F.pad(logits, (0, -logits.shape[-1] % 64)).sigmoid()[:, : logits.shape[-1]]


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        c = self.config = config.moe
        self.gate = Gate(config)
        self.experts = nn.ModuleList(
            MLP(config, c.moe_intermediate_size, f"{name}.experts.{i}") for i in range(c.n_routed_experts)
        )
        feeds = [f"{name}.experts.{i}.{part}" for i in range(c.n_routed_experts) for part in ("gate_proj", "up_proj")]
        if c.n_shared_experts:
            inner = c.moe_intermediate_size * c.n_shared_experts
            self.shared_experts = MLP(config, inner, f"{name}.shared_experts")
            feeds += [f"{name}.shared_experts.gate_proj", f"{name}.shared_experts.up_proj"]
        self.quantise_in = Quantiser(config, *feeds)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`[T, D]` to `[T, D]`. Experts add in the order of their numbers, whatever the other rows chose."""
        chosen, weights = self.gate(x)
        act = self.quantise_in(x, step)
        out = self.shared_experts(act, step) if self.config.n_shared_experts else torch.zeros_like(x)
        picks = chosen.tolist()  # the only point where the host waits for the device
        for number in sorted({expert for row in picks for expert in row}):
            rows = [row for row, experts in enumerate(picks) if number in experts]
            weight = weights[chosen == number, None]  # in the order of the rows: each chose an expert once at most
            if len(rows) == len(picks):  # all of them: nothing to gather
                out += (self.experts[number](act, step) * weight).to(x.dtype)
            else:
                index = torch.tensor(rows, device=x.device)
                part = self.experts[number](act[index], step, index)
                out.index_add_(0, index, (part * weight).to(x.dtype))
        return out
