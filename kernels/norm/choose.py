"""Which norm with a gate runs where: up to `INVARIANT_ROWS` rows one launch for both, else the gate is a product."""

from __future__ import annotations

import torch

from kernels.forms import INVARIANT_ROWS, Form, Formed
from kernels.gemm.choose import gemm_partials
from kernels.norm.add_norm import add_norm, norm_and_gate


def add_norm_gate(
    x: torch.Tensor, partials: list[torch.Tensor], weight: torch.Tensor, eps: float, form: Form, gate: torch.Tensor
) -> tuple[torch.Tensor, Formed, torch.Tensor]:
    if len(x) <= INVARIANT_ROWS:
        return norm_and_gate(x, partials, weight, eps, form, gate)
    total, out = add_norm(x, partials, weight, eps, form._replace(plain=True))
    return total, out, gemm_partials(out.plain.to(gate.dtype), gate, out_dtype=torch.float32)
