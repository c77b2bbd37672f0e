"""Muon (Jordan et al., 2024) for many small matrices at once.

`torch.optim.Muon` walks its matrices one by one, and a model of small experts has 165 of them: the host, not the card,
then sets the pace of training. Here all matrices of one shape are one batch. The update is the same (a test holds it
against torch's): Nesterov momentum, five Newton-Schulz steps in bfloat16, decoupled weight decay, and the step size
matched to AdamW's root mean square (Liu et al., 2025, arXiv:2502.16982).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of Jordan et al.: singular values go to about 1 in five steps


def orthogonalise(batch: torch.Tensor) -> torch.Tensor:
    """`[N, rows, cols]` to bfloat16 of the same shape: each matrix with its singular values brought near 1."""
    tall = batch.shape[1] > batch.shape[2]
    x = (batch.mT if tall else batch).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only; every parameter must have a gradient at each step."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for (rows, cols), params in by_shape.items():
                update = self._direction(params, group["momentum"])
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * 0.2 * math.sqrt(max(rows, cols))
                torch._foreach_add_(params, list(update.unbind()), alpha=-size)

    def _direction(self, params: list[torch.nn.Parameter], momentum: float) -> torch.Tensor:
        grads = torch.stack([p.grad for p in params])
        state = self.state[params[0]]  # the momentum of the whole batch stands with its first matrix
        buffer = state.setdefault("momentum", torch.zeros_like(grads))
        buffer.lerp_(grads, 1 - momentum)
        return orthogonalise(grads.lerp(buffer, momentum)).to(grads.dtype)
