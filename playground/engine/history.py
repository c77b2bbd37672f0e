"""What penalties look at: how often each row has written each token, which tokens its prompt holds, and its biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

import kernels
from playground.engine.batch import History
from playground.engine.graph import sent
from playground.engine.settings import SamplingParams


class Histories(NamedTuple):
    """Of R rows, on the device."""

    counts: torch.Tensor  # [R, V] int32, as `kernels.penalise` takes them
    bias: torch.Tensor  # [R, V] float32

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device) -> Histories:
        shape = (rows, vocab)
        return cls(torch.zeros(shape, dtype=torch.int32, device=device), torch.zeros(shape, device=device))

    @classmethod
    def of(cls, given: Sequence[History | None], params: Sequence[SamplingParams], vocab: int, device) -> Histories:
        made = cls.empty(len(given), vocab, device)
        made.load(given, params)
        return made

    def load(self, given: Sequence[History | None], params: Sequence[SamplingParams]) -> None:
        """Of rows without penalties nothing is ever looked at."""
        device = self.counts.device
        for counts, bias, history, one in zip(self.counts, self.bias, given, params, strict=False):
            if history is None:
                continue
            counts.zero_()
            counts[sent(torch.tensor(history.prompt, dtype=torch.int64), device)] = kernels.PROMPTED
            written = sent(torch.tensor(history.written, dtype=torch.int64), device)
            counts.index_add_(0, written, torch.ones_like(written, dtype=torch.int32))
            bias.zero_()
            if one.biases:
                ids, values = zip(*one.biases.items(), strict=True)
                bias[sent(torch.tensor(ids), device)] = sent(torch.tensor(values, dtype=torch.float32), device)

    def first(self, rows: int) -> Histories:
        return Histories(self.counts[:rows], self.bias[:rows])

    def add(self, ids: torch.Tensor) -> None:
        """The rows have written `ids [R]`."""
        self.counts.scatter_(1, ids[:, None], 1, reduce="add")
