"""How a chunk of a prompt is fed: operation by operation, or, on a CUDA card, as a recorded graph: launching the 400
kernels of an 8B model's chunk from Python takes 40 ms, computing 128 tokens a tenth of that, computing 2,048 less too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from playground.engine.cache import PagedCache, slots_of
from playground.engine.graph import Recorder
from playground.engine.pages import PAGE_SIZE
from playground.model.step import ScaleTrace, Step
from playground.model.transformer import Transformer

SMALLEST, DOUBLED, STEP = 32, 512, 256  # sizes of chunks on a card: doubled up to 512 tokens, then in steps of 256
KINDS = 64  # of chunks that are remembered: those used last


class Fed(NamedTuple):
    """What the end of a prompt leaves."""

    logits: torch.Tensor  # [1, V] float32, for the token that follows
    trace: ScaleTrace | None  # of the prompt's last token


class Kind(NamedTuple):
    """All that shapes a chunk's work: chunks of one kind are computed alike, bit by bit."""

    start: int  # tokens before it
    size: int  # of its own: as many, or rounded up
    traced: bool
    ends: bool  # the prompt ends in it


class Chunk:
    """The work of one kind. Places behind the prompt's end stand on the scratch page: no token looks ahead, so what is
    computed there reaches nobody."""

    def __init__(self, model: Transformer, cache: PagedCache, kind: Kind):
        self.model, self.cache, self.kind = model, cache, kind
        end, device = kind.start + kind.size, model.device
        # What a recording reads must stay where it is, and so is held here. Positions end where the model's do: a
        # chunk may be longer than a context, a prompt in it is not
        self.positions = torch.arange(kind.start, end, device=device)
        self.positions.clamp_(max=model.config.max_position_embeddings - 1)
        self.inputs = torch.zeros(kind.size + end + 1, dtype=torch.int64, device=device)  # one transfer brings them all
        self.tokens, self.slots, self.last = self.inputs.split([kind.size, end, 1])
        self.met, self.graph, self.fed = False, None, None

    def run(self) -> Fed | None:
        start, size, traced, ends = self.kind
        trace = ScaleTrace() if traced and ends else None
        step = Step(self.positions, self.slots[start:], self.slots if start else None, trace=trace, wanted=self.last)
        hidden = self.model(self.tokens, step, self.cache.kv)
        return Fed(self.model.logits(hidden), trace and trace.newest(self.last, size)) if ends else None

    def feed(self, prompt: Sequence[int], slots: torch.Tensor, recorder: Recorder | None) -> Fed | None:
        """Begins it, with the chunk's tokens and the slots of all up to its end. The first time launches one operation
        after another, which compiles them; the second records. What a recording returned the next of any overwrites."""
        inputs = torch.zeros_like(self.inputs, device="cpu")
        tokens, places, last = inputs.split([len(self.tokens), len(self.slots), 1])
        tokens[: len(prompt)] = torch.tensor(prompt)
        places[: len(slots)], places[len(slots) :] = slots, self.cache.scratch * PAGE_SIZE
        last[0] = len(prompt) - 1
        self.inputs.copy_(inputs)  # the host waits, which costs it less than pinning: nothing is under way
        if recorder and self.met and not self.graph and not recorder.full:
            try:
                self.graph, self.fed = recorder(self.run, compiled=True)
            except torch.OutOfMemoryError:
                recorder.full = True
        self.met = True
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.fed


class Prefill:
    def __init__(self, model: Transformer, cache: PagedCache, recorder: Recorder | None):
        self.model, self.cache, self.recorder = model, cache, recorder
        self.chunks: dict[Kind, Chunk] = {}

    def feed(self, tokens: Sequence[int], start: int, pages: Sequence[int], traced: bool, ends: bool) -> Fed | None:
        """Feeds the tokens of a prompt from `start` on, which a row's `pages` then hold; what follows them, where the
        prompt `ends` with them."""
        end = start + len(tokens)
        slots = slots_of(torch.tensor(pages), torch.arange(end))
        kind = Kind(start, self._size(len(tokens)), traced and ends, ends)
        chunk = self.chunks.pop(kind, None) or Chunk(self.model, self.cache, kind)
        if self.recorder:
            self.chunks[kind] = chunk  # the newest stands last
            if len(self.chunks) > KINDS:
                del self.chunks[next(iter(self.chunks))]
        return chunk.feed(tokens, slots, self.recorder)

    def _size(self, count: int) -> int:
        if self.recorder is None:
            return count
        return max(SMALLEST, 1 << (count - 1).bit_length()) if count <= DOUBLED else -(-count // STEP) * STEP
