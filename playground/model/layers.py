"""The parts that every layer is made of: block-quantised activations, projections, RMSNorm, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from playground.config import ModelConfig
from playground.model.step import Step


@dataclass
class Activation:
    """Input of projections, quantised once and read by each of them.

    `plain` is the tensor itself where the model is not quantised, and on a CPU the restored values `q * s`: it has no
    FP8 units, so products there run in float32 on exactly the numbers that FP8 holds.
    """

    plain: torch.Tensor | None = None  # [T, K]
    q: torch.Tensor | None = None  # [T, K] float8_e4m3fn
    s: torch.Tensor | None = None  # [T, K/128] float32

    def __getitem__(self, rows: torch.Tensor) -> Activation:
        return Activation(*(None if t is None else t[rows] for t in (self.plain, self.q, self.s)))


class Quantiser(nn.Module):
    """The one place where activations become FP8; `feeds` names the projections that read the result."""

    def __init__(self, config: ModelConfig, *feeds: str):
        super().__init__()
        self.quantization, self.feeds = config.quantization, feeds

    def forward(self, x: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> Activation:
        """`x [T, K]`; `rows` says which of the step's rows they are, where it is not all of them."""
        if self.quantization is None:
            return Activation(plain=x)
        q, s = kernels.act_quant(x, scale_fmt=self.quantization.scale_fmt)
        if step.trace is not None:
            step.trace.record(self.feeds, s, rows)
        return Activation(q=q, s=s) if x.is_cuda else Activation(plain=kernels.act_dequant(q, s))


class Linear(nn.Module):
    """A projection without bias: FP8 with `weight_scale_inv` as the checkpoint stores it, or plain."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig):
        super().__init__()
        self.dtype = None  # of the result; set by `prepare`
        self.weight = _parameter(outputs, inputs)
        self.decoded = None
        if config.quantization is not None:
            self.weight = _parameter(outputs, inputs, dtype=torch.float8_e4m3fn)
            self.weight_scale_inv = _parameter(-(-outputs // 128), -(-inputs // 128), dtype=torch.float32)

    def prepare(self, dtype: torch.dtype) -> None:
        """Called once the weights are loaded. On a CPU the weight is restored here, once, not at every product."""
        self.dtype = dtype
        if not self.weight.is_cuda:
            self.decoded = self.dequantised(dtype)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        if self.weight.dtype != torch.float8_e4m3fn:
            return self.weight.to(dtype)
        return kernels.weight_dequant(self.weight, self.weight_scale_inv, dtype=dtype)

    def forward(self, x: Activation) -> torch.Tensor:
        if x.plain is None:
            return kernels.fp8_gemm(x.q, x.s, self.weight, self.weight_scale_inv, out_dtype=self.dtype)
        return kernels.plain_gemm(x.plain, self.weight if self.decoded is None else self.decoded, out_dtype=self.dtype)


class PlainLinear(nn.Module):
    """What the format keeps out of FP8 (head, gate): a product summed and returned in float32."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = _parameter(outputs, inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, inputs]` to float32 `[T, outputs]`."""
        return kernels.plain_gemm(x.to(self.weight.dtype), self.weight, out_dtype=torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = _parameter(dim), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, inner: int, name: str):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, inner, config)
        self.up_proj = Linear(config.hidden_size, inner, config)
        self.down_proj = Linear(inner, config.hidden_size, config)
        self.quantise_inner = Quantiser(config, f"{name}.down_proj")

    def forward(self, x: Activation, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.quantise_inner(inner, step, rows))


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Shape and dtype of a weight to come: storage arrives with the checkpoint. No dtype: the model's own."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
