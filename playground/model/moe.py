"""Mixture of experts: group-limited top-k routing and the experts that it chooses, for inference."""

from __future__ import annotations

import torch
from torch import nn

import kernels
from playground.config import ModelConfig
from playground.model.layers import MLP, Feed, PlainLinear, Product, _parameter
from playground.model.step import Step


class Gate(PlainLinear):
    """Scores every expert, keeps the best groups, then the best experts in them (DeepSeek-V3, section 2.1.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.moe.n_routed_experts)
        c = config.moe
        self.e_score_correction_bias = _parameter(c.n_routed_experts, dtype=torch.float32) if c.corrected else None
        self.rule = kernels.Routing(
            top_k=c.num_experts_per_tok,
            groups=c.n_group,
            kept_groups=c.topk_group,
            sigmoid=c.scoring_func == "sigmoid",
            normalised=c.norm_topk_prob,
            scaling=c.routed_scaling_factor,
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x [T, D]` to the chosen experts `[T, k]` int32 and their weights `[T, k]` float32."""
        logits = kernels.gemm_parts(x.to(self.weight.dtype), self.weight, out_dtype=torch.float32)
        return kernels.route(logits, self.e_score_correction_bias, self.rule)


class MoE(nn.Module):
    """The experts' weights lie in one storage, so that a product can take each row to those it chose by itself: the
    host never learns which, and never waits."""

    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        c = self.config = config.moe
        self.gate = Gate(config)
        names = [f"{name}.experts.{i}" for i in range(c.n_routed_experts)]
        self.experts = nn.ModuleList(MLP(config, c.moe_intermediate_size, n, multiplied=False) for n in names)
        self.gate_up = Product(*((e.gate_proj, e.up_proj) for e in self.experts))
        self.down = Product(*((e.down_proj,) for e in self.experts))
        readers = [f"{n}.{part}" for n in names for part in ("gate_proj", "up_proj")]
        if c.n_shared_experts:
            inner = c.moe_intermediate_size * c.n_shared_experts
            self.shared_experts = MLP(config, inner, f"{name}.shared_experts")
            readers += [f"{name}.shared_experts.gate_proj", f"{name}.shared_experts.up_proj"]
        self.feed = Feed(config, *readers)
        self.feed_down = Feed(config, *(f"{n}.down_proj" for n in names))
        # the gate reads the plain input whatever the experts read
        self.form = self.feed.form._replace(plain=True)

    def forward(self, x: kernels.Formed, step: Step) -> list[torch.Tensor]:
        """Input in `form` to two stacks of partial sums `[P, T, D]`: of the shared experts, and of those chosen."""
        chosen, weights = self.gate(x.plain)
        act = self.feed(x, step)
        shared = [self.shared_experts(act, step)] if self.config.n_shared_experts else []
        both = self.gate_up.of_experts(act, chosen).flatten(0, 1)[None]
        inner = self.feed_down(kernels.swiglu(both, self.feed_down.form, dtype=self.down.dtype), step, chosen)
        out = self.down.of_experts(inner, chosen, weights)
        return [*shared, out.transpose(0, 1)]
