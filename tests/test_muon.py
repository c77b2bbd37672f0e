"""The batched Muon against torch's own."""

from __future__ import annotations

import torch

from playground.train.muon import Muon


def test_a_batch_of_matrices_learns_as_torchs_muon_teaches_each_alone():
    torch.manual_seed(0)
    shapes = [(8, 16), (16, 8), (8, 16), (12, 12)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=0.05, weight_decay=0.3)
    torchs = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-6
