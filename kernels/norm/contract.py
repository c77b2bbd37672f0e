"""Norms and SwiGLU, each of which adds up the partial sums of the product before it: what they take and give."""

from __future__ import annotations

import torch

from kernels.dispatch import implementation
from kernels.forms import Form, Formed


def add_norm(
    x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form
) -> tuple[torch.Tensor, Formed]:
    """The residual sum and its RMSNorm: `x [T, D]` plus all partial sums of up to two stacks `[P, T, D]`, in order,
    rounded to the dtype of `x`; and `x * rsqrt(mean(x^2) + eps) * weight` of that, in `form`."""
    _check_norm(x, partials, weight)
    return implementation("add_norm", x)(x, partials, weight, eps, form)


def add_norm_gate(
    x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form, gate: torch.Tensor
) -> tuple[torch.Tensor, Formed, torch.Tensor]:
    """`add_norm`, and the product of the norm with a mixture's `gate [E, D]`, as partial sums `[P, T, E]` float32. For
    up to `INVARIANT_ROWS` rows a row's logits depend on that row alone."""
    _check_norm(x, partials, weight)
    if gate.shape[1:] != weight.shape or not gate.is_contiguous():
        raise ValueError(f"gate {tuple(gate.shape)} must be contiguous and fit {tuple(x.shape)}")
    return implementation("add_norm_gate", x)(x, partials, weight, eps, form, gate)


def swiglu(partials: torch.Tensor, form: Form, *, dtype: torch.dtype) -> Formed:
    """`silu(gate) * up` of partial sums `[P, T, 2 * I]` that hold gate, then up; I a multiple of 128. Each sum, the
    SiLU and the result are rounded to `dtype`. Returns `[T, I]` in `form`."""
    if partials.ndim != 3 or partials.shape[-1] % 256:
        raise ValueError(f"gate and up must be two multiples of 128: {tuple(partials.shape)}")
    return implementation("swiglu", partials)(partials, form, dtype=dtype)


def _check_norm(x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:] or len(partials) > 2 or any(p.shape[1:] != x.shape for p in partials):
        raise ValueError(
            f"weight {tuple(weight.shape)} or {[tuple(p.shape) for p in partials]} don't fit {tuple(x.shape)}"
        )
