"""The transformer for inference, of every family: parameters and forward, no files and no text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from playground.checkpoint.config import GqaConfig, MlaConfig, ModelConfig
from playground.model.attention import LatentAttention
from playground.model.gqa import GroupedQueryAttention
from playground.model.layers import MLP, Feed, PlainLinear, Product, RMSNorm
from playground.model.loading import fill
from playground.model.moe import MoE
from playground.model.rope import rope_table
from playground.model.step import Step

ATTENTION = {MlaConfig: LatentAttention, GqaConfig: GroupedQueryAttention}


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        c, name, attention = config, f"layers.{index}", ATTENTION[type(config.attention)]
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.width)
        self.self_attn = attention(c, index)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, c.width)
        if c.is_moe(index):
            self.mlp = MoE(c, f"{name}.mlp")
        else:
            self.mlp = MLP(c, c.intermediate_size, f"{name}.mlp")
            self.feed = Feed(c, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")

    def forward(
        self,
        x: torch.Tensor,
        partials: list[torch.Tensor],
        rope: torch.Tensor,
        cache: kernels.KV | None,
        step: Step,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The residual stream `x [T, D]` and what the layer before adds to it, to the same two of this layer: adding
        is left to the norm that comes next, which must read both anyway. Behind attention, which needs all tokens, only
        those go on whose hidden states the step returns."""
        x, inner = self.input_layernorm(x, partials, self.self_attn.feed.form)
        x, partials = step.of_wanted(x), [self.self_attn(inner, rope, cache, step)]
        if isinstance(self.mlp, MoE):
            norm, mlp = self.post_attention_layernorm, self.mlp
            x, inner, logits = kernels.add_norm_gate(x, partials, norm.weight, norm.eps, mlp.feed.form, mlp.gate.weight)
            return x, mlp(inner, logits, step)
        x, inner = self.post_attention_layernorm(x, partials, self.feed.form)
        return x, [self.mlp(self.feed(inner, step), step)]


class Body(nn.Module):
    """What a checkpoint calls `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = PlainLinear(config.hidden_size, config.vocab_size)  # looked up, not multiplied
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.width)


class Transformer(nn.Module):
    """Token ids and a `Step` to hidden states; `logits` turns those into scores. Without weights until `load`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.unused_scales = 0  # for a cache or for activations, in the files: both are measured here
        self.model = Body(config)
        self.lm_head = PlainLinear(config.hidden_size, config.vocab_size)

    def load(
        self, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device, dtype: torch.dtype
    ) -> Transformer:
        """As `loading`, all at once."""
        for _ in self.loading(tensors, device, dtype):
            pass
        return self

    def loading(
        self, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device, dtype: torch.dtype
    ) -> Iterator[None]:
        """Takes each named tensor of a checkpoint to `device`, and yields; what is not FP8 or float32 by format becomes
        `dtype`.

        `config.quantization` says what form the projections take here; a tensor that comes in the other form is
        quantised or restored. Raises `CheckpointError` naming the first tensor that does not fit.
        """
        tensors, c = iter(tensors), self.config
        first = list(islice(tensors, 1))  # from here on the disk reads ahead, while memory is made
        for part in self.modules():
            if isinstance(part, Product):
                part.allocate(device, dtype)
        yield from fill(self, chain(first, tensors), device, dtype)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for part in self.modules():
            if hasattr(part, "prepare"):
                part.prepare(dtype)
        rope = rope_table(c.rope, c.max_position_embeddings, device)
        self.rope = F.pad(rope, (0, c.attention.rotary_width // 2 - rope.shape[-1]))
        self.eval()

    def forward(self, tokens: torch.Tensor, step: Step, cache: kernels.KV | None = None) -> torch.Tensor:
        """`tokens [T]` int64 to normalised hidden states `[T, D]`, or `[W, D]` at `step.wanted`; `cache` of all
        layers."""
        *_, hidden = self.in_slices(tokens, step, cache)
        return hidden

    def in_slices(
        self, tokens: torch.Tensor, step: Step, cache: kernels.KV | None = None
    ) -> Iterator[torch.Tensor | None]:
        """As `forward`, layer by layer: yields None behind each, then the hidden states."""
        x, rope = kernels.look_up(tokens, step.positions, self.model.embed_tokens.weight, self.rope)
        partials: list[torch.Tensor] = []
        whole, last, unrotated = replace(step, wanted=None), len(self.model.layers) - 1, self.config.unrotated
        still = torch.stack([torch.ones_like(rope[:, 0]), torch.zeros_like(rope[:, 1])], dim=1) if unrotated else None
        for index, layer in enumerate(self.model.layers):
            wants = step if index == last else whole  # nobody reads the others' way through the last layer
            angles = still if index in unrotated else rope
            x, partials = layer(x, partials, angles, None if cache is None else cache.layer(index), wants)
            yield None
        yield self.model.norm(x, partials, kernels.Form(plain=True, fp8=False))[1].plain

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, D]` to `[T, vocab]` float32."""
        return self.lm_head(hidden)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype
