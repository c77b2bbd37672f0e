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
        """Of rows without penalties nothing is ever looked at. All rows together: each transfer and each operation of
        torch's makes the rows that write wait."""
        device, vocab = self.counts.device, self.counts.shape[1]
        prompted, written, biased, values = [], [], [], []  # places in all rows, one behind the other
        for row, (history, one) in enumerate(zip(given, params, strict=False)):
            if history is not None:
                start = row * vocab
                prompted += [start + token for token in history.prompt]
                written += [start + token for token in history.written]
                biased += [start + token for token in one.biases]
                values += one.biases.values()
        places = sent(torch.tensor([*prompted, *written, *biased], dtype=torch.int64), device)
        prompted, written, biased = places.split([len(prompted), len(written), len(biased)])
        counts, bias = self.counts[: len(given)].zero_().view(-1), self.bias[: len(given)].zero_().view(-1)
        counts.index_fill_(0, prompted, kernels.PROMPTED)
        counts.index_add_(0, written, torch.ones_like(written, dtype=torch.int32))
        if len(biased):
            bias.index_copy_(0, biased, sent(torch.tensor(values, dtype=torch.float32), device))

    def first(self, rows: int) -> Histories:
        return Histories(self.counts[:rows], self.bias[:rows])

    def add(self, ids: torch.Tensor) -> None:
        """The rows have written `ids [R]`."""
        self.counts.scatter_(1, ids[:, None], 1, reduce="add")
