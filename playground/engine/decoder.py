"""How a decode step runs: operation by operation, or, on a CUDA card, as one recorded graph.

A step is the same either way: feed each row's newest token, draw the next one, move on by one position. A graph does
all of it without the host, which therefore starts a step before it has read the one before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

import kernels
from playground.engine.batch import DecodeBatch, DecodeRow, RowDraw
from playground.engine.cache import PagedCache, slots_of
from playground.engine.graph import Recorder
from playground.engine.history import Histories
from playground.engine.pages import PAGE_SIZE, pages_for
from playground.engine.sampler import Needs, Settings, draw_rows, explain_rows, penalised_rows
from playground.engine.scales import StepScales
from playground.engine.settings import SamplingParams
from playground.model.step import ScaleLayout, ScaleTrace, Step
from playground.model.transformer import Transformer

PATIENCE = 200  # steps on a larger recording before a batch gets one of its own


class State(NamedTuple):
    """What a step reads and moves on, `[R]` each: the newest tokens, where they stand, and what their rows see."""

    tokens: torch.Tensor  # int64
    positions: torch.Tensor  # int64
    slots: torch.Tensor  # int64: places in the flattened cache
    lengths: torch.Tensor  # int32
    pages: torch.Tensor  # [R, P] int32

    @classmethod
    def of(cls, rows: Sequence[DecodeRow], width: int) -> State:
        """On the host; `width` pages per row, filled up with the first one's."""
        pages = torch.tensor([(row.pages + row.pages[:1] * width)[:width] for row in rows], dtype=torch.int32)
        positions = torch.tensor([row.position for row in rows])
        tokens = torch.tensor([row.token for row in rows])
        slots = slots_of(pages, positions[:, None])[:, 0]
        return cls(tokens, positions, slots, (positions + 1).int(), pages)

    @classmethod
    def resting(cls, rows: int, width: int, scratch: int) -> State:
        """On the host: rows that are nobody's, on the page that is nobody's."""
        pages = torch.full((rows, width), scratch, dtype=torch.int32)
        zeros = torch.zeros(rows, dtype=torch.int64)
        return cls(zeros, zeros.clone(), zeros + scratch * PAGE_SIZE, zeros.int() + 1, pages)


class Drawn(NamedTuple):
    """What a step drew, on the host, one entry for each row."""

    ids: list[int]
    logprobs: list[float]
    insights: np.ndarray | None  # [R, N] float64: numbers for `Insight`
    scales: StepScales | None


class Variant(NamedTuple):
    """What a step does besides drawing, for all of its rows as soon as one of them wants it."""

    needs: Needs
    traced: bool
    inspected: bool

    @classmethod
    def of(cls, draws: Sequence[RowDraw]) -> Variant:
        return cls(
            Needs.of(d.params for d in draws),
            any(d.traced for d in draws),
            any(d.inspected for d in draws),
        )

    def covers(self, other: Variant) -> bool:
        """Whether a step like this does all that the other one would: each row goes the way of its own settings."""
        flags = [(*one.needs, one.traced, one.inspected) for one in (self, other)]
        return all(mine >= theirs for mine, theirs in zip(*flags, strict=True))


class Output(NamedTuple):
    """What a step leaves on the device, R rows each."""

    ids: torch.Tensor  # [R] int64
    logprobs: torch.Tensor  # [R] float32
    insights: torch.Tensor | None  # [R, N] float64
    scales: torch.Tensor | None  # all of a trace, flat

    def read(self, layout: ScaleLayout | None, count: int) -> Drawn:
        """On the host, of the first `count` rows, copied: whoever writes here may go on."""
        insights = None if self.insights is None else self.insights[:count].cpu().numpy().copy()
        scales = None if layout is None else StepScales(self.scales.cpu().numpy().copy(), layout)
        return Drawn(self.ids[:count].tolist(), self.logprobs[:count].tolist(), insights, scales)


def draw_output(
    logits: torch.Tensor,
    settings: Settings,
    positions: torch.Tensor,
    variant: Variant,
    trace: ScaleTrace | None,
    histories: Histories | None = None,
) -> Output:
    """Draws from `logits [R, V]` the tokens that will stand at `positions [R]`."""
    needs, insights = variant.needs, None
    changed = penalised_rows(logits, settings, needs, histories)
    ids, logprobs = draw_rows(logits, settings, positions, needs, changed)
    if variant.inspected:
        insights = explain_rows(logits, settings, positions, ids, needs, changed)
    if needs.penalised:
        histories.add(ids)
    return Output(ids, logprobs, insights, None if trace is None else trace.flat())


def run_step(
    model: Transformer,
    cache: PagedCache,
    state: State,
    settings: Settings,
    variant: Variant,
    histories: Histories | None,
) -> tuple[Output, ScaleTrace | None]:
    """Draws the tokens that follow a state."""
    trace = ScaleTrace() if variant.traced else None
    step = Step(state.positions, state.slots, pages=state.pages, lengths=state.lengths, trace=trace)
    logits = model.logits(model(state.tokens, step, cache.kv))
    # a token's place is the length before it
    return draw_output(logits, settings, state.lengths, variant, trace, histories), trace


class EagerDecoder:
    """Runs a step now."""

    runs_ahead = wants_reload = False

    def __init__(self, model: Transformer, cache: PagedCache):
        self.model, self.cache = model, cache

    def load(self, batch: DecodeBatch) -> None:
        """The rows that steps are for from here on."""
        device, draws = self.model.device, [row.draw for row in batch.rows]
        width = max(len(row.pages) for row in batch.rows)
        self.state = State(*(t.to(device) for t in State.of(batch.rows, width)))
        self.longest = max(row.position for row in batch.rows)
        self.settings = Settings.of([draw.params for draw in draws], device)
        self.variant, self.histories = Variant.of(draws), None
        if self.variant.needs.penalised:
            given, params = [row.history for row in batch.rows], [draw.params for draw in draws]
            self.histories = Histories.of(given, params, self.model.config.vocab_size, device)
        self.layout: ScaleLayout | None = None  # of these rows' traces: all are alike

    def step(self) -> Callable[[], Drawn]:
        """A step that feeds each row's newest token; what it returns waits for the end and reads the result."""
        s, width = self.state, self.longest // PAGE_SIZE + 1
        seen = s._replace(pages=s.pages[:, :width])
        output, trace = run_step(self.model, self.cache, seen, self.settings, self.variant, self.histories)
        positions = s.positions + 1
        slots = slots_of(s.pages, (positions[:, None]).clamp(max=s.pages.shape[1] * PAGE_SIZE - 1))[:, 0]
        self.state = State(output.ids, positions, slots, s.lengths + 1, s.pages)
        self.longest += 1
        if trace and not self.layout:
            self.layout = trace.layout()
        drawn = output.read(self.layout, len(output.ids))
        return lambda: drawn


class Outbox:
    """Where a recorded step leaves its results on the host: in pinned memory, which kernels write to, in two halves in
    turn, since one is read while the next step writes."""

    def __init__(self, output: Output):
        sizes = [0 if t is None else -(-t.nbytes // 16) * 4 for t in output]  # in words; each begins at 16 bytes
        *self.starts, size = accumulate(sizes, initial=0)
        self.host = torch.zeros(2, size, dtype=torch.int32).pin_memory()
        self.turn = torch.zeros(1, dtype=torch.int32, device=output.ids.device)
        self.halves = [Output(*map(partial(self._view, half), output, self.starts)) for half in self.host]

    def _view(self, half: torch.Tensor, like: torch.Tensor | None, start: int) -> torch.Tensor | None:
        if like is None:
            return None
        return half[start : start + like.nbytes // 4].view(like.dtype).view(like.shape)

    def take(self, output: Output) -> None:
        there = [(t, start) for t, start in zip(output, self.starts, strict=True) if t is not None]
        kernels.deliver(*zip(*there, strict=True), self.host, self.turn)


class Graph:
    """A recorded step of `size` rows: its state and settings lie in fixed memory, which it reads and moves on. Places
    without a row stand still on the scratch page."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        size: int,
        width: int,
        variant: Variant,
        record,
        histories: Histories | None,
    ):
        """`histories` of at least as many rows, where the variant needs them."""
        self.histories = histories.first(size) if variant.needs.penalised else None
        self.size, self.width, self.scratch, device = size, width, cache.scratch, model.device
        self.state = State(*(t.to(device) for t in self._padded([])))
        self.settings = Settings.of([SamplingParams("greedy")] * size, device)
        self.moves = torch.zeros(size, dtype=torch.int64, device=device)
        self.outbox: Outbox | None = None
        self.graph, trace = record(lambda: self._step(model, cache, variant))
        self.layout = trace and trace.layout()
        self.turn = int(self.outbox.turn)  # as it is on the device: each replay changes both

    def _padded(self, rows: Sequence[DecodeRow]) -> State:
        state = State.resting(self.size, self.width, self.scratch)
        if rows:
            for whole, given in zip(state, State.of(rows, self.width), strict=True):
                whole[: len(rows)] = given
        return state

    def _step(self, model: Transformer, cache: PagedCache, variant: Variant) -> ScaleTrace | None:
        s = self.state
        output, trace = run_step(model, cache, s, self.settings, variant, self.histories)
        self.outbox = self.outbox or Outbox(output)  # made when the step runs for the first time, not in its recording
        self.outbox.take(output)
        kernels.advance(
            output.ids,
            self.moves,
            s.pages,
            tokens=s.tokens,
            positions=s.positions,
            lengths=s.lengths,
            slots=s.slots,
            turn=self.outbox.turn,
            page_size=PAGE_SIZE,
        )
        return trace

    def load(self, rows: Sequence[DecodeRow]) -> None:
        params = [row.draw.params for row in rows]
        params += [SamplingParams("greedy")] * (self.size - len(rows))
        given = (*self._padded(rows), *Settings.of(params, torch.device("cpu")))
        for target, source in zip((*self.state, *self.settings), given, strict=True):
            target.copy_(source)
        self.moves.zero_()
        self.moves[: len(rows)] = 1
        if self.histories:
            self.histories.load([row.history for row in rows], params)

    def replay(self, count: int) -> Callable[[], Drawn]:
        """Begins one more step for the rows that were loaded; what it returns waits for its end."""
        self.graph.replay()
        host, self.turn = self.outbox.halves[self.turn], 1 - self.turn
        done = torch.cuda.Event()
        done.record()

        def read() -> Drawn:
            done.synchronize()
            return host.read(self.layout, count)

        return read


class GraphDecoder:
    """Replays recorded steps: one recording for every power of two of rows and every variant. Making one takes some
    0.2 s, so where a larger one is there that does as much, it serves for a while. Where there is no memory for one,
    steps run eagerly from then on."""

    def __init__(self, model: Transformer, cache: PagedCache, context: int, recorder: Recorder):
        self.model, self.cache, self.width, self.recorder = model, cache, pages_for(context), recorder
        self.graphs: dict[tuple[int, Variant], Graph] = {}
        self.eager = EagerDecoder(model, cache)
        self.graph: Graph | None = None  # of the batch that is loaded; None: it runs eagerly
        self.count = 0  # its rows
        self.histories: Histories | None = None  # from the first row with penalties on
        self.lent: tuple[int, Variant] | None = None  # what should be recorded for it, and is not yet
        self.steps_lent: Counter[tuple[int, Variant]] = Counter()

    @property
    def runs_ahead(self) -> bool:
        return self.graph is not None

    @property
    def wants_reload(self) -> bool:
        """Whether the batch has run on a larger recording for long enough to be worth one of its own."""
        return self.lent is not None and self.steps_lent[self.lent] >= PATIENCE

    def load(self, batch: DecodeBatch) -> None:
        """As `EagerDecoder.load`."""
        self.count = len(batch.rows)
        key = _key(self.count, Variant.of([row.draw for row in batch.rows]))
        self.graph, self.lent = self._serving(key), None
        if self.graph is None:
            self.graph = self.recorded(*key)
        elif key not in self.graphs:
            self.lent = key
        if self.graph is None:
            self.eager.load(batch)
        else:
            self.graph.load(batch.rows)

    def step(self) -> Callable[[], Drawn]:
        """As `EagerDecoder.step`; begins it, whether or not the one before has been read."""
        if self.graph is None:
            return self.eager.step()
        if self.lent:
            self.steps_lent[self.lent] += 1
        return self.graph.replay(self.count)

    def recorded(self, rows: int, variant: Variant, compiled: bool = False) -> Graph | None:
        """The recording for so many rows; None where there is no memory for one. `compiled`: a step of the kind has
        run before."""
        key = _key(rows, variant)
        if key in self.graphs or self.recorder.full:
            return self.graphs.get(key)
        try:
            self.graphs[key] = self.made(*key, lambda run: self.recorder(run, compiled))
        except torch.OutOfMemoryError:
            self.recorder.full = True
            self.graphs.clear()
        return self.graphs.get(key)

    def made(self, size: int, variant: Variant, record: Callable) -> Graph:
        if variant.needs.penalised and self.histories is None:  # all recordings share them: one at a time is loaded
            vocab, device = self.model.config.vocab_size, self.model.device
            self.histories = Histories.empty(kernels.INVARIANT_ROWS, vocab, device)
        return Graph(self.model, self.cache, size, self.width, variant, record, self.histories)

    def _serving(self, key: tuple[int, Variant]) -> Graph | None:
        """The recording itself, or the smallest that can stand in for it as long as that is no loss."""
        if key in self.graphs or self.steps_lent[key] >= PATIENCE:
            return self.graphs.get(key)
        size, variant = key
        able = [one for one in self.graphs if one[0] >= size and one[1].covers(variant)]
        return self.graphs[min(able, key=lambda one: (one[0], sum(one[1].needs)))] if able else None


def _key(rows: int, variant: Variant) -> tuple[int, Variant]:
    return 1 << (rows - 1).bit_length(), variant


def make_decoder(model: Transformer, cache: PagedCache, context: int, recorder: Recorder | None):
    return GraphDecoder(model, cache, context, recorder) if recorder else EagerDecoder(model, cache)
