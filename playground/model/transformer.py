"""The DeepSeek-V3 transformer for inference: parameters and forward, no files and no text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from playground.config import CheckpointError, ModelConfig
from playground.model.attention import Attention
from playground.model.layers import MLP, Linear, PlainLinear, Quantiser, RMSNorm, _parameter
from playground.model.moe import MoE
from playground.model.rope import rope_table
from playground.model.step import Step


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        c, name = config, f"layers.{index}"
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.is_moe(index):
            self.mlp = MoE(c, f"{name}.mlp")
        else:
            self.mlp = MLP(c, c.intermediate_size, f"{name}.mlp")
            self.quantise_in = Quantiser(c, f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")

    def forward(self, x: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor | None, step: Step) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, step)
        inner = self.post_attention_layernorm(x)
        return x + self.mlp(inner if isinstance(self.mlp, MoE) else self.quantise_in(inner, step), step)


class Body(nn.Module):
    """What a checkpoint calls `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = _parameter(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Token ids and a `Step` to hidden states; `logits` turns those into scores. Built by `build`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = PlainLinear(config.hidden_size, config.vocab_size)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        tensors: Iterable[tuple[str, torch.Tensor]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Transformer:
        """Takes each named tensor of a checkpoint to `device`; what is not FP8 or float32 by format becomes `dtype`.

        Raises `CheckpointError` naming the first unexpected, misshapen, wrong-typed or missing tensor.
        """
        model = cls(config)
        wanted = dict(model.named_parameters())
        if config.tie_word_embeddings:
            del wanted["lm_head.weight"]
        for name, tensor in tensors:
            slot = wanted.pop(name, None)
            if slot is None:
                raise CheckpointError(f"tensor {name} is not part of this architecture, or stands in two files.")
            model._fill(name, slot, tensor, device, dtype)
        if wanted:
            raise CheckpointError(f"tensor {next(iter(wanted))} is missing, and {len(wanted) - 1} more.")
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        for part in model.modules():
            if isinstance(part, (Linear, Attention)):
                part.prepare(dtype)
        model.rope = rope_table(config, device)
        return model.eval()

    def _fill(self, name, slot: nn.Parameter, tensor: torch.Tensor, device, dtype: torch.dtype) -> None:
        if tensor.shape != slot.shape:
            raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, not {list(slot.shape)}.")
        fp8 = torch.float8_e4m3fn
        if (tensor.dtype == fp8) != (slot.dtype == fp8) or not tensor.is_floating_point():
            wanted = "float8_e4m3fn" if slot.dtype == fp8 else "bfloat16 or float32"
            raise CheckpointError(f"tensor {name} is {tensor.dtype}, not {wanted}.")
        fixed = slot.dtype == fp8 or name.endswith(("weight_scale_inv", "e_score_correction_bias"))
        owner, _, leaf = name.rpartition(".")
        tensor = tensor.to(device, None if fixed else dtype)
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))

    def forward(self, tokens: torch.Tensor, step: Step, cache: torch.Tensor | None = None) -> torch.Tensor:
        """`tokens [T]` int64 to normalised hidden states `[T, D]`; `cache [layers, pages, page_size, latent]`."""
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        rope = self.rope[step.positions]
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rope, None if cache is None else cache[index], step)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, D]` to `[T, vocab]` float32."""
        return self.lm_head(hidden)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype
