"""The loop: groups of rows wait, are prefilled once, and then share every step until each of them ends.

Single-threaded and passive: `add` queues, `step` does one prefill or one decode and returns what happened, `cancel`
frees at once. `service.py` runs it on a thread; `generate.py` and the tests drive it by hand.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

import kernels
from playground.engine.cache import PAGE_SIZE, PagedCache, pages_for
from playground.engine.request import Event, FinishEvent, Request, RequestError, Stats, TokenEvent
from playground.engine.sampler import sample
from playground.model.step import ScaleTrace, Step
from playground.model.transformer import Transformer
from playground.tokenizer import TextStream, Tokenizer

PREFILL_CHUNK = 2048  # tokens of a prompt per forward: bounds the working space. Boundaries follow positions alone


@dataclass(eq=False)
class Row:
    """One running sequence."""

    request: Request
    limit: int  # tokens it may draw: what was asked for, or what the context leaves
    text: TextStream | None
    submitted: float
    pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens that stand in the cache
    new_ids: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: bool = False


class Engine:
    """`max_rows` may not exceed the kernels' row invariance, or a row's text would depend on its neighbours."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        max_rows: int = 16,
        cache_tokens: int | None = None,
        context: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        if not 1 <= max_rows <= kernels.INVARIANT_ROWS:
            raise ValueError(f"max_rows must be from 1 to {kernels.INVARIANT_ROWS}, not {max_rows}")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.context = context or model.config.max_position_embeddings
        self.prefill_chunk = prefill_chunk
        self.cache = PagedCache(model.config, cache_tokens or max_rows * self.context, model.device, model.dtype)
        self.cpu_threads = torch.get_num_threads()
        self.waiting: deque[list[Row]] = deque()
        self.running: list[Row] = []

    def release(self) -> None:
        """Lets go of the weights and the cache; the engine is of no use afterwards."""
        self.model = self.cache.data = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, requests: list[Request]) -> list[Row]:
        """Queues rows that share one prompt: prefilled once, then forked. Raises `RequestError`."""
        for request in requests:
            request.check_lengths(self.context, self.model.config.vocab_size)
        if len({r.prompt for r in requests}) != 1 or len(requests) > self.max_rows:
            raise RequestError(f"A group is 1 to {self.max_rows} rows with one prompt.")
        now = time.perf_counter()
        rows = []
        for request in requests:
            limit = min(request.max_new_tokens, self.context - len(request.prompt))
            text = TextStream(self.tokenizer, request.stop) if self.tokenizer else None
            rows.append(Row(request, limit, text, now))
        if self._pages_needed(rows) > len(self.cache.holders):
            raise RequestError(f"The KV cache holds {self.cache.total_tokens} tokens in all; ask for fewer or shorten.")
        self.waiting.append(rows)
        return rows

    def cancel(self, row: Row) -> list[tuple[Row, Event]]:
        """Ends a row now: its cache pages are free when this returns."""
        if row.finished:
            return []
        for group in list(self.waiting):
            if row in group:
                group.remove(row)
                if not group:
                    self.waiting.remove(group)
        return [(row, self._finish(row, "cancelled"))]

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Event]]:
        """One prefill if a waiting group fits, otherwise one decode over all running rows."""
        if self.waiting:
            group = self.waiting[0]
            fits = self._pages_needed(group) <= len(self.cache.free)
            if fits and len(self.running) + len(group) <= self.max_rows:
                self._use_threads(self.cpu_threads)
                return self._prefill(self.waiting.popleft())
        self._use_threads(1)
        return self._decode() if self.running else []

    def _use_threads(self, count: int) -> None:
        """Decode on a CPU is a thousand small operations bound by memory: one thread runs them nearly twice as fast
        as two that meet after each (measured on 2 cores: 43 against 25 tokens/s). Prefill takes them all."""
        if self.model.device.type == "cpu" and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _pages_needed(self, group: list[Row]) -> int:
        """All pages that the group may ever use, so that a row that was started can always finish."""
        prompt = len(group[0].request.prompt)
        shared = prompt // PAGE_SIZE
        return shared + sum(pages_for(prompt + row.limit) - shared for row in group)

    def _prefill(self, group: list[Row]) -> list[tuple[Row, Event]]:
        began = time.perf_counter()
        prompt, first = group[0].request.prompt, group[0]
        first.pages = self.cache.take(pages_for(len(prompt) + first.limit))
        trace = ScaleTrace() if any(row.request.trace_scales for row in group) else None
        logits = self._feed_prompt(prompt, first.pages, trace)
        for row in group[1:]:
            self._fork(first, row, len(prompt))
        for row in group:
            row.length = len(prompt)
        self.running += group
        ids, logprobs = self._draw(logits.expand(len(group), -1), group)
        seconds = time.perf_counter() - began
        for row in group:
            row.prefill_seconds = seconds
        newest = (len(prompt) - 1) % self.prefill_chunk  # its place in the last piece, which is what was traced
        last = read_scales(trace, [newest] * len(group)) if trace else None
        return self._advance(group, ids, logprobs, last)

    def _feed_prompt(self, prompt: tuple[int, ...], pages: list[int], trace: ScaleTrace | None) -> torch.Tensor:
        """Prefill in pieces; returns the logits `[1, vocab]` after the last token. Only the last piece is traced."""
        device, size = self.model.device, self.prefill_chunk
        positions = torch.arange(len(prompt))
        slots = torch.tensor(pages)[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        positions, slots = positions.to(device), slots.to(device)
        tokens = torch.tensor(prompt, device=device)
        for start in range(0, len(prompt), size):
            piece, end = slice(start, start + size), min(start + size, len(prompt))
            context = slots[:end] if start else None
            step = Step(positions[piece], slots[piece], context, trace=trace if end == len(prompt) else None)
            hidden = self.model(tokens[piece], step, self.cache.data)
        return self.model.logits(hidden[-1:])

    def _fork(self, source: Row, row: Row, prompt: int) -> None:
        """Shares the prompt's full pages and copies the page that both will go on writing."""
        shared = prompt // PAGE_SIZE
        row.pages = self.cache.share(source.pages[:shared]) + self.cache.take(pages_for(prompt + row.limit) - shared)
        if prompt % PAGE_SIZE:
            self.cache.copy(source.pages[shared], row.pages[shared])

    def _decode(self) -> list[tuple[Row, Event]]:
        rows, device = list(self.running), self.model.device
        used = [row.pages[: pages_for(row.length + 1)] for row in rows]
        width = max(map(len, used))
        table = torch.tensor([pages + [0] * (width - len(pages)) for pages in used], dtype=torch.int32)
        positions = torch.tensor([row.length for row in rows])
        slots = table.long()[torch.arange(len(rows)), positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        trace = ScaleTrace() if any(row.request.trace_scales for row in rows) else None
        step = Step(
            positions.to(device),
            slots.to(device),
            pages=table.to(device),
            lengths=(positions + 1).int().to(device),
            trace=trace,
        )
        tokens = torch.tensor([row.new_ids[-1] for row in rows], device=device)
        logits = self.model.logits(self.model(tokens, step, self.cache.data))
        for row in rows:
            row.length += 1
        ids, logprobs = self._draw(logits, rows)
        return self._advance(rows, ids, logprobs, read_scales(trace, range(len(rows))) if trace else None)

    def _draw(self, logits: torch.Tensor, rows: list[Row]) -> tuple[list[int], list[float]]:
        return sample(logits, [row.request.params for row in rows], [row.length for row in rows])

    def _advance(self, rows, ids, logprobs, scales) -> list[tuple[Row, Event]]:
        """Hands each row its token; ends those that are done."""
        now, events = time.perf_counter(), []
        for number, (row, token, logprob) in enumerate(zip(rows, ids, logprobs, strict=True)):
            row.first_token = row.first_token or now
            row.last_token = now
            row.new_ids.append(token)
            at_end = token in self.model.config.eos_token_ids and not row.request.ignore_eos
            text = row.text.push(token) if row.text else ""
            seen = scales[number] if scales and row.request.trace_scales else None
            prefill = row.prefill_seconds if len(row.new_ids) == 1 else None
            events.append((row, TokenEvent(len(row.new_ids) - 1, token, text, logprob, prefill, seen)))
            if at_end:
                events.append((row, self._finish(row, "eos")))
            elif row.text and row.text.stopped:
                events.append((row, self._finish(row, "stop")))
            elif len(row.new_ids) >= row.limit:
                events.append((row, self._finish(row, "length")))
        return events

    def _finish(self, row: Row, reason: str) -> FinishEvent:
        stats = Stats(
            finish_reason=reason,
            prompt_tokens=len(row.request.prompt),
            new_tokens=len(row.new_ids),
            seed=row.request.params.seed,
            ttft=max(row.first_token - row.submitted, 0.0),
            prefill_rate=len(row.request.prompt) / row.prefill_seconds if row.prefill_seconds else 0.0,
            decode_rate=(len(row.new_ids) - 1) / seconds if (seconds := row.last_token - row.first_token) > 0 else 0.0,
            cache_used=row.length,
            cache_total=self.cache.total_tokens,
        )
        row.finished = True
        self.cache.release(row.pages)
        row.pages = []
        if row in self.running:
            self.running.remove(row)
        return FinishEvent(row.text.flush() if row.text else "", stats)


def read_scales(trace: ScaleTrace, rows) -> list[dict[str, list[float]]]:
    """Each row's scales per projection, brought to the host in one transfer. Experts that a row did not use are
    absent from its dictionary."""
    names = list(trace.scales)
    flat = torch.cat([trace.scales[name].flatten() for name in names]).tolist() if names else []
    at = {name: index.tolist() for name, index in trace.rows.items()}
    out: list[dict[str, list[float]]] = [{} for _ in rows]
    offset = 0
    for name in names:
        count, width = trace.scales[name].shape
        for number, row in enumerate(rows):
            places = at.get(name)
            place = row if places is None else places.index(row) if row in places else None
            if place is not None:
                start = offset + place * width
                out[number][name] = flat[start : start + width]
        offset += count * width
    return out
