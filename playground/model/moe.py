"""Mixture of experts: group-limited top-k routing and the experts that it chooses, for inference."""

from __future__ import annotations

import torch
from torch import nn

import kernels
from playground.checkpoint.config import BLOCK_SIZE, CheckpointError, ModelConfig, whole_blocks
from playground.model.layers import MLP, Feed, PlainLinear, Product, _parameter
from playground.model.layout import behind, padded
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
            shared=c.n_shared_experts,
        )

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial sums `[P, T, E]` of what its weight says of the input, which the norm before it made as well, to the
        chosen experts `[T, k]` int32 and their weights `[T, k]` float32."""
        return kernels.route(logits, self.e_score_correction_bias, self.rule)


class MoE(nn.Module):
    """The experts' weights lie in one storage, so that a product can take each row to those it chose by itself: the
    host never learns which, and never waits. Shared experts lie behind the others, as experts that all rows choose."""

    def __init__(self, config: ModelConfig, name: str):
        super().__init__()
        c = self.config = config.moe
        self.gate = Gate(config)
        names, inner, spare = [f"{name}.experts.{i}" for i in range(c.n_routed_experts)], c.moe_intermediate_size, 0
        self.experts = nn.ModuleList(MLP(config, inner, n, products=False) for n in names)
        if c.n_shared_experts:
            spare = c.n_shared_experts
            names += [f"{name}.shared_experts"] * spare
            # stored as one wide MLP, in which here each expert begins a block
            layout = behind(*[padded(inner, whole_blocks(inner))] * spare) if inner % BLOCK_SIZE else None
            self.shared_experts = MLP(config, inner * spare, names[-1], products=False, layout=layout)
            self.shared_stored = self._shared_storage()
        self.gate_up = Product(*((e.gate_proj, e.up_proj) for e in self.experts), spare=spare)
        self.down = Product(*((e.down_proj,) for e in self.experts), spare=spare)
        pairs = [(f"{n}.gate_proj", f"{n}.up_proj") for n in names]
        # shared experts read every row; behind them lie the pieces of one wide projection
        self.feed = Feed(config, *(pairs[-1] if spare else ()), experts=pairs[: c.n_routed_experts])
        self.feed_down = Feed(config, experts=[(f"{n}.down_proj",) for n in names])

    def _shared_storage(self) -> nn.ModuleList:
        shared, routed = self.shared_experts, self.experts[0]
        pairs = [(getattr(shared, n), getattr(routed, n)) for n in ("gate_proj", "up_proj", "down_proj")]
        if any(a.is_fp8 != b.is_fp8 for a, b in pairs):
            raise CheckpointError("Shared experts that are quantised otherwise than the routed ones can't be run.")
        return nn.ModuleList(Product((part,), multiplied=False) for part, _ in pairs)

    def prepare(self, dtype: torch.dtype) -> None:
        """Copies the shared experts, which checkpoints store as one wide MLP, behind the others."""
        shared, size = self.shared_experts if self.gate_up.spare else None, self.down.inputs
        for number in range(self.gate_up.spare):
            place, piece = self.config.n_routed_experts + number, slice(number * size, (number + 1) * size)
            tiles = slice(piece.start // BLOCK_SIZE, piece.stop // BLOCK_SIZE)
            for linear, start in zip((shared.gate_proj, shared.up_proj), self.gate_up.starts, strict=True):
                self.gate_up.weight[place, start : start + size] = linear.weight[piece]
                if linear.is_fp8:
                    at = start // BLOCK_SIZE
                    self.gate_up.scale[place, at : at + size // BLOCK_SIZE] = linear.weight_scale_inv[tiles]
            self.down.weight[place] = shared.down_proj.weight[:, piece]
            if shared.down_proj.is_fp8:
                self.down.scale[place] = shared.down_proj.weight_scale_inv[:, tiles]

    def forward(self, x: kernels.Formed, logits: torch.Tensor, step: Step) -> list[torch.Tensor]:
        """Input in the form of `feed`, and what the gate says of it `[P, T, E]`, to a stack of partial sums
        `[P, T, D]`: one of each expert chosen."""
        chosen, weights = self.gate(logits)
        both = self.gate_up.of_experts(self.feed(x, step, chosen), chosen).flatten(0, 1)[None]
        inner = kernels.swiglu(both, self.feed_down.form, dtype=self.down.dtype)
        out = self.down.of_experts(self.feed_down(inner, step, chosen), chosen, weights)
        return [out.transpose(0, 1)]
