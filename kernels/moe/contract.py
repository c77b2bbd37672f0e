"""Routing of a mixture of experts: what it takes and gives."""

from __future__ import annotations

import torch

from kernels.dispatch import implementation
from kernels.forms import Routing


def route(partials: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each row goes to. Takes partial sums of the gate's logits `[P, T, E]` and a correction `bias [E]`,
    which takes part in the choice but not in the weights. Returns the chosen experts `[T, k]` int32, best first, then
    those shared by all rows, and their weights `[T, k]` float32."""
    return implementation("route", partials)(partials, bias, rule)
