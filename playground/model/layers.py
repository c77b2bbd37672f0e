"""The parts that every layer is made of: block-quantised activations, projections, RMSNorm, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from playground.config import ModelConfig, whole_blocks
from playground.model.step import Step


@dataclass
class Activation:
    """Input of projections, quantised once and read by each of them."""

    plain: torch.Tensor | None = None  # [T, K] as it came, for projections that are not quantised
    q: torch.Tensor | None = None  # [T, K] float8_e4m3fn
    s: torch.Tensor | None = None  # [T, K/128] float32
    restored: torch.Tensor | None = None  # [T, K] `q * s`, on a CPU only

    def __getitem__(self, rows: torch.Tensor) -> Activation:
        parts = (self.plain, self.q, self.s, self.restored)
        return Activation(*(None if t is None else t[rows] for t in parts))


class Quantiser(nn.Module):
    """The one place where activations become FP8; `feeds` names the projections that read the result."""

    def __init__(self, config: ModelConfig, *feeds: str):
        super().__init__()
        self.quantization = config.quantization
        self.feeds = tuple(name for name in feeds if config.quantises(f"model.{name}"))
        self.keeps_plain = len(self.feeds) < len(feeds)

    def forward(self, x: torch.Tensor, step: Step, rows: torch.Tensor | None = None) -> Activation:
        """`x [T, K]`; `rows` says which of the step's rows they are, where it is not all of them."""
        plain = x if self.keeps_plain else None
        if not self.feeds:
            return Activation(plain)
        q, s = kernels.act_quant(x, scale_fmt=self.quantization.scale_fmt)
        if step.trace is not None:
            step.trace.record(self.feeds, s, rows)
        if x.is_cuda:
            return Activation(plain, q, s)
        # a CPU has no FP8 units: products run in float32 on exactly the numbers that FP8 holds
        return Activation(plain, restored=kernels.act_dequant(q, s).to(x.dtype))


class Linear(nn.Module):
    """A projection without bias: FP8 with `weight_scale_inv` as the checkpoint stores it, or plain.

    `name` is its place in the model, such as `layers.0.mlp.up_proj`. `stored` is the shape `[N, K]` in the files where
    it is smaller than the one here: the rest is zeros.
    """

    def __init__(
        self, inputs: int, outputs: int, config: ModelConfig, name: str, stored: tuple[int, int] | None = None
    ):
        super().__init__()
        self.stored, self.decoded = stored or (outputs, inputs), None
        self.tile_errors: torch.Tensor | None = None  # of each tile, where the weight was quantised here at load
        self.dtype = None  # of the result; set by `prepare`
        self.is_fp8 = config.quantises(f"model.{name}")
        self.scale_fmt = config.quantization.scale_fmt if self.is_fp8 else None
        self.weight = _parameter(outputs, inputs, dtype=torch.float8_e4m3fn if self.is_fp8 else None)
        if self.is_fp8:
            self.weight_scale_inv = _parameter(-(-outputs // 128), -(-inputs // 128), dtype=torch.float32)

    def prepare(self, dtype: torch.dtype) -> None:
        """Called once the weights are loaded. On a CPU the weight is restored here, once, not at every product."""
        self.dtype = dtype
        if self.is_fp8 and not self.weight.is_cuda:
            self.decoded = self.dequantised(dtype)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        if not self.is_fp8:
            return self.weight.to(dtype)
        return kernels.weight_dequant(self.weight, self.weight_scale_inv, dtype=dtype)

    def forward(self, x: Activation) -> torch.Tensor:
        if not self.is_fp8:
            return kernels.plain_gemm(x.plain, self.weight, out_dtype=self.dtype)
        if self.decoded is not None:
            return kernels.plain_gemm(x.restored, self.decoded, out_dtype=self.dtype)
        return kernels.fp8_gemm(x.q, x.s, self.weight, self.weight_scale_inv, out_dtype=self.dtype)


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
    """SwiGLU: `down(silu(gate(x)) * up(x))`. An inner size that is no multiple of 128 is padded with zero weights."""

    def __init__(self, config: ModelConfig, inner: int, name: str):
        super().__init__()
        c, padded = config, whole_blocks(inner)
        self.gate_proj = Linear(c.hidden_size, padded, c, f"{name}.gate_proj", (inner, c.hidden_size))
        self.up_proj = Linear(c.hidden_size, padded, c, f"{name}.up_proj", (inner, c.hidden_size))
        self.down_proj = Linear(padded, c.hidden_size, c, f"{name}.down_proj", (c.hidden_size, inner))
        self.quantise_inner = Quantiser(c, f"{name}.down_proj")

    def forward(self, x: Activation, step: Step, rows: torch.Tensor | None = None) -> torch.Tensor:
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.quantise_inner(inner, step, rows))


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Shape and dtype of a weight to come: storage arrives with the checkpoint. No dtype: the model's own."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
