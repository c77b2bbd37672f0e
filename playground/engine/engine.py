"""The loop: a scheduler that decides and a runner that computes, driven by hand.

Single-threaded and passive: `add` queues, `step` does one prefill chunk or one decode step and returns what happened,
`cancel` frees at once. `host.py` drives it for pages and programs; `generate.py` and the tests drive it themselves.

A fault belongs to a row: what its tokenizer, its sampler or its numbers do wrong ends that row with a sentence, and the
others go on with the bits that they would have had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch

import kernels
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.decoder import Drawn
from playground.engine.events import Failure, RowEvent, Started, TokenEvent, Waiting
from playground.engine.insight import Insight
from playground.engine.pages import PREFILL_CHUNK, PagePool, pages_for
from playground.engine.prefill import Fed
from playground.engine.requests import Request
from playground.engine.row import Row
from playground.engine.runner import Runner, is_fatal
from playground.engine.scales import ScaleStore
from playground.engine.scheduler import Scheduler
from playground.engine.settings import RequestError
from playground.model.transformer import Transformer

NOT_A_NUMBER = "The model's output is not a number here: its weights, or what it was given, are damaged."
Told = list[tuple[Row, RowEvent]]


class DeviceFault(RuntimeError):
    """The device is lost to this process: it has to be started anew."""


class Engine:
    """`max_rows` may not exceed the kernels' row invariance, or a row's text would depend on its neighbours.
    `cache_dtype`: that of the model, which is the default, or float8_e4m3fn. `share_prefixes`: whole chunks of a prompt
    stay in the cache, as long as there is room, for prompts that begin alike."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        max_rows: int = kernels.INVARIANT_ROWS,
        cache_tokens: int | None = None,
        context: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        cache_dtype: torch.dtype | None = None,
        share_prefixes: bool = True,
    ):
        if not 1 <= max_rows <= kernels.INVARIANT_ROWS:
            raise ValueError(f"max_rows must be from 1 to {kernels.INVARIANT_ROWS}, not {max_rows}")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.context = context or model.config.max_position_embeddings
        self.pool = PagePool(cache_tokens or max_rows * self.context)
        vocab_size = model.config.vocab_size
        self.scheduler = Scheduler(self.pool, max_rows, self.context, vocab_size, prefill_chunk, share_prefixes)
        self.runner = Runner(model, self.pool.total_tokens, self.context, cache_dtype or model.dtype)
        self.scales = ScaleStore()
        self.ids = count(-2, -1)  # of rows that are added by hand: clients count upwards
        self.pending: tuple[list[Row], Callable[[], Drawn]] | None = None  # a step under way
        self.loaded: list[Row] = []  # whom the runner's next step is for, if nobody comes or goes

    def release(self) -> None:
        """Lets go of the weights and the cache; the engine is of no use afterwards."""
        if self.pending:
            self.runner.wait()
        self.model = self.runner = self.pending = None

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def add(
        self,
        requests: list[Request],
        parent: Row | None = None,
        visitor: str = "",
        ids: Sequence[int] | None = None,
    ) -> list[Row]:
        """Queues rows that share one prompt; see `Scheduler.add`. Raises `RequestError`."""
        ids = [next(self.ids) for _ in requests] if ids is None else list(ids)
        return self.scheduler.add(requests, ids, self.tokenizer, parent, visitor)

    def cancel(self, row: Row, keep: bool = True) -> Told:
        """Ends a row now. Its cache pages are free when this returns, unless its request keeps them."""
        if row.finished:
            if not keep:
                self.scheduler.kept.drop(row)
            return []
        return [self._end(row, "cancelled", keep)]

    def fail(self, row: Row, error: BaseException | str) -> Told:
        """Ends a row that can't go on."""
        if row.finished:
            return []
        self.scheduler.leave(row, keep=False)
        return [(row, Failure(error if isinstance(error, str) else in_a_sentence(error)))]

    @torch.inference_mode()
    def step(self) -> Told:
        """One prefill chunk, or one decode step over all running rows. Raises `DeviceFault`."""
        began, copies = self.scheduler.begin()
        self.runner.copy(copies)  # at once: the pages' next owner may be the next to run
        told: Told = [(row, Started(row.cached, row.branched)) for row in began]
        told += [(row, Waiting(row.position)) for row in self.scheduler.moved()]
        return told + (self._prefill() if self.scheduler.prefills_next else self._decode())

    def feed_alone(self, prompt: Sequence[int], traced: bool = False) -> Iterator[Fed | None]:
        """Feeds a prompt as a row's own prefill does, chunk by chunk with None between them, of which nothing stays in
        the cache; what its end leaves comes last. Raises `RequestError` where there is no room for it."""
        pages, chunk = pages_for(len(prompt)), self.scheduler.chunk
        if not self.scheduler.kept.make_room(pages):
            raise RequestError("The KV cache is full; wait until the runs under way have ended.")
        taken = self.pool.take(pages)
        try:
            for start in range(0, len(prompt), chunk):
                end = min(start + chunk, len(prompt))
                yield self.runner.feed_alone(prompt, taken, start, end, traced)
        finally:
            self.pool.release(taken)

    def _prefill(self) -> Told:
        filling, began = self.scheduler.filling, time.perf_counter()
        chunk = self.scheduler.next_chunk()
        try:
            drawn = self.runner.feed(chunk)
            self.scheduler.fed(filling, chunk, time.perf_counter() - began)
        except Exception as error:  # whatever it is, it is of this prompt alone
            self._check_device(error)
            return [told for row in list(filling.rows) for told in self.fail(row, error)]
        # scales are of the prompt's last token, which all of its rows have in common
        return [] if drawn is None else self._advance(filling.rows, drawn, [0] * len(filling.rows))

    def _decode(self) -> Told:
        """Reads the step that is under way; where nobody can join or leave because of it, the next one starts first."""
        running = self.scheduler.running
        if self.pending and all(row.finished for row in self.pending[0]):
            self.pending = None  # what is still under way is nobody's, and if it failed, nobody's concern
        if not running:
            return []
        rows = self.pending[0] if self.pending else list(running)
        try:
            if self.pending is None and (self.loaded != rows or self.runner.wants_reload):
                self.loaded = []
                read = self.runner.start(self.scheduler.batch(rows))
                self.loaded = rows
            else:
                read = self.pending[1] if self.pending else self.runner.again()
            self.pending = None
            ends = any(len(row.new_ids) + 1 >= row.limit for row in rows)
            if self.runner.runs_ahead and rows == running and not ends and not self.runner.wants_reload:
                self.pending = (rows, self.runner.again())
            drawn = read()
        except Exception as error:
            return self._isolate(rows, error)
        for row in rows:
            row.length += not row.finished
        return self._advance(rows, drawn)

    def _isolate(self, rows: list[Row], error: Exception) -> Told:
        """A step failed: does it again row by row. A row's bits depend on that row alone, so those that can go on lose
        nothing, and those that can't have only themselves to end."""
        self._check_device(error)
        self.pending, self.loaded = None, []
        rows, told = [row for row in rows if not row.finished], []
        for row, drawn in zip(rows, self.runner.one_by_one(self.scheduler.batch(rows)), strict=True):
            if isinstance(drawn, Exception):
                self._check_device(drawn)
                told += self.fail(row, drawn)
            else:
                row.length += 1
                told += self._advance([row], drawn)
        return told

    def _check_device(self, error: Exception) -> None:
        if is_fatal(error):
            raise DeviceFault(str(error).splitlines()[0]) from error

    def _advance(self, rows: list[Row], drawn: Drawn, places: list[int] | None = None) -> Told:
        """Hands each row its token; ends those that are done. `places` of the rows in the step's scales."""
        now, told, traced = time.perf_counter(), [], []
        for number, row in enumerate(list(rows)):
            if row.finished:
                continue  # it ended while this step was under way
            place = places[number] if places else number
            try:
                told += self._take(row, number, place, drawn, now)
            except BaseException as error:  # a tokenizer's panic is no Exception
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                told += self.fail(row, error)
            if row.request.trace_scales:
                traced.append((row.id, len(row.new_ids) - 1, place))
        if drawn.scales and traced:
            self.scales.add(drawn.scales, traced)
        return told

    def _take(self, row: Row, number: int, place: int, drawn: Drawn, now: float) -> Told:
        """One row's token, and its end if this is the last."""
        token, logprob, request = drawn.ids[number], drawn.logprobs[number], row.request
        if not math.isfinite(logprob):
            return self.fail(row, NOT_A_NUMBER)
        row.first_token = row.first_token or now
        row.last_token = now
        row.new_ids.append(token)
        text = row.text.push(token) if row.text else ""
        event = TokenEvent(
            len(row.new_ids) - 1,
            token,
            text,
            logprob,
            row.prefill_seconds if len(row.new_ids) == 1 else None,
            Insight(drawn.insights[number].data) if request.inspect and drawn.insights is not None else None,
            drawn.scales.read(place, row.watch) if row.watch and request.trace_scales and drawn.scales else None,
        )
        told: Told = [(row, event)]
        if token in self.model.config.eos_token_ids and not request.ignore_eos:
            told.append(self._end(row, "eos"))
        elif row.text and row.text.stopped:
            told.append(self._end(row, "stop"))
        elif len(row.new_ids) >= row.limit:
            told.append(self._end(row, "length"))
        return told

    def _end(self, row: Row, reason: str, keep: bool = True) -> tuple[Row, RowEvent]:
        try:
            event = row.finish(reason, self.pool.total_tokens)
        except BaseException as error:  # of its tokenizer
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            event, keep = Failure(in_a_sentence(error)), False
        self.scheduler.leave(row, keep)
        return row, event


def driven(engine: Engine, work: Iterator[Any]) -> Iterator[Any]:
    """What a job yields, with the engine's steps between its slices."""
    for answer in work:
        if answer is not None:
            yield answer
        if engine.busy:
            engine.step()


def in_a_sentence(error: BaseException) -> str:
    """What ended a request, for the one who made it."""
    what = (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        return "There is not enough memory for this request; try a shorter prompt, or when others have ended."
    if isinstance(error, RequestError):
        return str(error)
    return f"This request failed: {what}. The next one starts afresh."
