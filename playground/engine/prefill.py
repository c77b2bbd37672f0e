"""How a piece of a prompt is fed: operation by operation, or, for a short prompt on a CUDA card, as one recorded graph:
launching the 500 kernels of an 8B model from Python takes 20 ms, computing 128 tokens takes a fifth of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from playground.engine.cache import PAGE_SIZE, PagedCache, slots_of
from playground.engine.graph import Recorder
from playground.model.step import ScaleTrace, Step
from playground.model.transformer import Transformer

RECORDED = 512  # tokens: beyond that a card is busy for longer than the host
SMALLEST = 32


class Fed(NamedTuple):
    """What the end of a prompt leaves."""

    logits: torch.Tensor  # [1, V] float32, for the token that follows
    trace: ScaleTrace | None  # of the prompt's last token


class Graph:
    """The recorded prefill of a whole prompt of up to `size` tokens. Places behind it stand on the scratch page: no
    token looks ahead, so what is computed there reaches nobody."""

    def __init__(self, model: Transformer, cache: PagedCache, size: int, traced: bool, record: Recorder):
        self.size, self.scratch = size, cache.scratch * PAGE_SIZE
        # What a recording reads must stay where it is, and so is held here. Positions end where the model's do: a
        # recording may be longer than a context, a prompt in it is not
        last = model.config.max_position_embeddings - 1
        self.tokens, self.positions, self.slots, self.last = (
            torch.tensor(values, device=model.device)
            for values in ([0] * size, [min(i, last) for i in range(size)], [self.scratch] * size, [0])
        )

        def run() -> Fed:
            trace = ScaleTrace() if traced else None
            hidden = model(self.tokens, Step(self.positions, self.slots, trace=trace), cache.kv)
            return Fed(model.logits(hidden[self.last]), trace and trace.newest(self.last))

        self.graph, self.fed = record(run)

    def feed(self, prompt: Sequence[int], slots: torch.Tensor) -> Fed:
        """Begins it; the next call of any recording overwrites what is returned."""
        tokens, places = torch.zeros(self.size, dtype=torch.int64), torch.full((self.size,), self.scratch)
        tokens[: len(prompt)], places[: len(prompt)] = torch.tensor(prompt), slots
        for target, source in (
            (self.tokens, tokens),
            (self.slots, places),
            (self.last, torch.tensor([len(prompt) - 1])),
        ):
            target.copy_(source)
        self.graph.replay()
        return self.fed


class Prefill:
    def __init__(self, model: Transformer, cache: PagedCache, recorder: Recorder | None):
        self.model, self.cache, self.recorder = model, cache, recorder
        self.graphs: dict[tuple[int, bool], Graph] = {}

    def feed(self, prompt: Sequence[int], start: int, end: int, pages: list[int], traced: bool) -> Fed | None:
        """Feeds `prompt[start:end]`, which a row's `pages` then hold; what follows it, once the prompt has ended."""
        slots = slots_of(torch.tensor(pages), torch.arange(end))
        if start == 0 and end == len(prompt) and (graph := self._graph(end, traced)):
            return graph.feed(prompt, slots)
        device, ends = self.model.device, end == len(prompt)
        positions, slots = torch.arange(start, end, device=device), slots.to(device)
        trace = ScaleTrace() if traced and ends else None
        step = Step(positions, slots[start:], slots if start else None, trace=trace)
        hidden = self.model(torch.tensor(prompt[start:end], device=device), step, self.cache.kv)
        return Fed(self.model.logits(hidden[-1:]), trace and trace.newest()) if ends else None

    def _graph(self, length: int, traced: bool) -> Graph | None:
        """The recording that such a prompt takes, made when it is first needed; None: it runs eagerly."""
        if self.recorder is None or self.recorder.full or length > RECORDED:
            return None
        key = (max(1 << (length - 1).bit_length(), SMALLEST), traced)
        if key not in self.graphs:
            try:
                self.graphs[key] = Graph(self.model, self.cache, *key, self.recorder)
            except torch.OutOfMemoryError:
                self.recorder.full = True
                self.graphs.clear()
        return self.graphs.get(key)
