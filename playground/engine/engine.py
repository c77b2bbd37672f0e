"""The loop: groups of rows wait, are prefilled once, and then share every step until each of them ends.

Single-threaded and passive: `add` queues, `step` does one piece of prefill or one decode and returns what happened,
`cancel` frees at once. `service.py` runs it on a thread; `generate.py` and the tests drive it by hand.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

import kernels
from playground.checkpoint.tokenizer import TextStream, Tokenizer
from playground.engine.cache import PAGE_SIZE, PagedCache, pages_for
from playground.engine.decoder import Drawn, Variant, draw_output, make_decoder
from playground.engine.graph import Recorder, sent
from playground.engine.prefill import Fed, Prefill
from playground.engine.prefix_cache import Kept, Prefix
from playground.engine.requests import Event, FinishEvent, Request, RequestError, TokenEvent
from playground.engine.row import Row
from playground.engine.sampler import Settings
from playground.model.transformer import Transformer

PREFILL_CHUNK = 2048  # tokens of a prompt per forward: bounds the working space. Boundaries follow positions alone


@dataclass
class Filling:
    """A group whose prompt is on its way into the cache."""

    rows: list[Row]  # the one with the highest limit first: the pages suffice for it
    pages: list[int]
    done: int = 0  # tokens that stand in the cache
    seconds: float = 0.0


class Engine:
    """`max_rows` may not exceed the kernels' row invariance, or a row's text would depend on its neighbours.
    `cache_dtype`: that of the model, which is the default, or float8_e4m3fn. `share_prefixes`: whole pieces of a prompt
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
        self.prefill_chunk = prefill_chunk
        tokens = cache_tokens or max_rows * self.context
        self.cache = PagedCache(model.config, tokens, model.device, cache_dtype or model.dtype)
        self.cpu_threads = torch.get_num_threads()
        self.waiting: deque[list[Row]] = deque()
        self.filling: Filling | None = None
        self.running: list[Row] = []
        self.kept = Kept(self.cache, prefill_chunk if share_prefixes else 0)
        self.decode_next = False
        recorder = Recorder(model.device) if model.device.type == "cuda" else None
        self.prefill = Prefill(model, self.cache, recorder)
        self.decoder = make_decoder(model, self.cache, self.context, recorder)
        self.pending: tuple[list[Row], Callable[[], Drawn]] | None = None

    def release(self) -> None:
        """Lets go of the weights and the cache; the engine is of no use afterwards."""
        if self.pending:  # a step that is under way writes to memory that would be somebody else's
            with suppress(RuntimeError):  # a card that has failed has said so
                torch.cuda.synchronize(self.model.device)
        self.model = self.cache.kv = self.prefill = self.decoder = self.pending = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.filling or self.running)

    def add(self, requests: list[Request], parent: Row | None = None) -> list[Row]:
        """Queues rows that share one prompt: prefilled once, then forked. Where the cache of `parent` still begins with
        their prompt they branch off from there, with the bits of the parent's own steps. Raises `RequestError`."""
        for request in requests:
            request.check_lengths(self.context, self.model.config.vocab_size)
        if len({r.prompt for r in requests}) != 1 or len(requests) > self.max_rows:
            raise RequestError(f"A group is 1 to {self.max_rows} rows with one prompt.")
        now = time.perf_counter()
        rows = []
        for request in requests:
            limit = min(request.max_new_tokens, self.context - len(request.prompt))
            begun = request.prompt[len(request.prompt) - request.begun :]
            text = TextStream(self.tokenizer, request.stop, begun) if self.tokenizer else None
            rows.append(Row(request, limit, text, now, parent))
        if self._pages_needed(rows) > len(self.cache.holders):
            raise RequestError(f"The KV cache holds {self.cache.total_tokens} tokens in all; ask for fewer or shorten.")
        self.waiting.append(rows)
        return rows

    def cancel(self, row: Row, keep: bool = True) -> list[tuple[Row, Event]]:
        """Ends a row now. Its cache pages are free when this returns, unless its request keeps them."""
        if not keep:
            self.kept.drop(row)
        if row.finished:
            return []
        for group in list(self.waiting):
            if row in group:
                group.remove(row)
                if not group:
                    self.waiting.remove(group)
        if self.filling and row in self.filling.rows:
            self.filling.rows.remove(row)
            if not self.filling.rows:
                self.cache.release(self.filling.pages)
                self.filling = None
        return [(row, self._finish(row, "cancelled", keep))]

    @torch.inference_mode()
    def logits_after(self, prompt: Sequence[int]) -> torch.Tensor:
        """`[V]` float32, what a row with this prompt draws its first token from: by the same prefill, of which nothing
        stays. Raises `RequestError` where running rows leave no room for it."""
        pages = pages_for(len(prompt))
        if not self.kept.make_room(pages):
            raise RequestError("The KV cache is full; wait until the runs under way have ended.")
        taken, fed = self.cache.take(pages), None
        try:
            for start in range(0, len(prompt), self.prefill_chunk):
                fed = self.prefill.feed(prompt, start, min(start + self.prefill_chunk, len(prompt)), taken, False)
            return fed.logits[0].clone()
        finally:
            self.cache.release(taken)

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, Event]]:
        """One piece of a prompt, or one decode over all running rows: in turn, so that neither waits for long."""
        if self.filling is None and self.waiting and self._make_room(self.waiting[0]):
            self._begin(self.waiting.popleft())
        fill = self.filling is not None and not (self.running and self.decode_next)
        self.decode_next = fill
        self._use_threads(self.cpu_threads if fill else 1)
        return self._fill(self.filling) if fill else self._decode()

    def use_all_threads(self) -> None:
        """For work that is like a prefill."""
        self._use_threads(self.cpu_threads)

    def _use_threads(self, count: int) -> None:
        """Decode on a CPU is a thousand small operations bound by memory: one thread runs them nearly twice as fast
        as two that meet after each (measured on 2 cores: 43 against 25 tokens/s). Prefill takes them all."""
        if self.model.device.type == "cpu" and torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def _pages_needed(self, group: list[Row], cached: int = 0, shared: int | None = None) -> int:
        """All pages that the group may ever take, so that a row that was started can always finish. `cached`: full
        pages at hand; `shared`: those that its rows have in common, by default all full ones of the prompt."""
        prompt = len(group[0].request.prompt)
        shared = prompt // PAGE_SIZE if shared is None else shared
        return shared - cached + sum(pages_for(prompt + row.limit) - shared for row in group)

    def _parent(self, group: list[Row]) -> Row | None:
        """The row whose cache a group can start from."""
        parent, prompt = group[0].parent, group[0].request.prompt
        return parent if parent and parent.holds(prompt) else None

    def _make_room(self, group: list[Row]) -> bool:
        """Whether a group can begin; what is kept gives way to it, what it could begin with last."""
        if len(self.running) + len(group) > self.max_rows:
            return False
        parent, prompt = self._parent(group), group[0].request.prompt
        begun: list[Row | Prefix] = [parent] if parent else self.kept.prefixes.found(prompt)
        cached = (len(prompt) - 1) // PAGE_SIZE if parent else sum(len(one.pages) for one in begun)
        if self.kept.make_room(self._pages_needed(group, cached, cached if parent else None), begun):
            return True
        self.kept.freshen(begun)
        if not (begun and self.kept.make_room(self._pages_needed(group))):
            return False
        for row in group:
            row.parent = None
        return True

    def _begin(self, group: list[Row]) -> None:
        if parent := self._parent(group):
            for row in group:
                row.length = row.cached = len(row.request.prompt) - 1
                row.branched, row.parent = True, None
                self._fork(parent, row, row.length)
            self.running += group
            return
        for row in group:
            row.parent = None  # a chain of branches would hold on to all of its rows
        rows = sorted(group, key=lambda row: -row.limit)
        prompt = rows[0].request.prompt
        begun = self.kept.prefixes.found(prompt)
        self.kept.freshen(begun)
        found = [page for one in begun for page in one.pages]
        pages = self.cache.share(found) + self.cache.take(pages_for(len(prompt) + rows[0].limit) - len(found))
        for row in rows:
            row.cached = len(found) * PAGE_SIZE
        self.filling = Filling(rows, pages, rows[0].cached)

    def _fill(self, filling: Filling) -> list[tuple[Row, Event]]:
        """Feeds one piece of the prompt; after the last, draws every row's first token."""
        began = time.perf_counter()
        prompt, start = filling.rows[0].request.prompt, filling.done
        filling.done = end = min(start + self.prefill_chunk, len(prompt))
        traced = any(row.request.trace_scales for row in filling.rows)
        fed = self.prefill.feed(prompt, start, end, filling.pages, traced)
        self.kept.keep_piece(prompt, start, end, filling.pages)
        if fed is None:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)  # or the piece's time would be that of launching it
            filling.seconds += time.perf_counter() - began
            return []
        rows, self.filling = filling.rows, None
        rows[0].pages = filling.pages
        self.running += rows
        drawn = self._first_draw(rows, fed)
        for row in rows:
            row.prefill_seconds = filling.seconds + time.perf_counter() - began
        return self._advance(rows, drawn)

    def _first_draw(self, rows: list[Row], fed: Fed) -> Drawn:
        """Draws every row's first token from what the end of their prompt leaves, or will leave."""
        device, length = self.model.device, len(rows[0].request.prompt)
        settings = Settings.of([row.request.params for row in rows], device)
        at = sent(torch.full((len(rows),), length), device)  # copied, not filled there: a draw reads it before it waits
        for row in rows:
            row.length = length
            if row is not rows[0]:
                self._fork(rows[0], row, length)
        logits = fed.logits.expand(len(rows), -1).contiguous()
        return draw_output(logits, settings, at, Variant.of(rows), fed.trace).read(fed.trace, [0] * len(rows))

    def _fork(self, source: Row, row: Row, length: int) -> None:
        """Shares the full pages of `length` tokens and copies the page that both will go on writing."""
        shared, whole = length // PAGE_SIZE, pages_for(len(row.request.prompt) + row.limit)
        row.pages = self.cache.share(source.pages[:shared]) + self.cache.take(whole - shared)
        if length % PAGE_SIZE:
            self.cache.copy(source.pages[shared], row.pages[shared])

    def _decode(self) -> list[tuple[Row, Event]]:
        """Reads the step that is under way; where nobody can join or leave because of it, the next one starts first."""
        if self.pending and all(row.finished for row in self.pending[0]):
            self.pending = None  # what is still under way is nobody's, and if it failed, nobody's concern
        if not self.running:
            return []
        rows, read = self.pending or (list(self.running), self.decoder.start(self.running))
        self.pending = None
        ends = any(len(row.new_ids) + 1 >= row.limit for row in rows)
        if self.decoder.runs_ahead and rows == self.running and not ends:
            self.pending = (rows, self.decoder.start(rows))
        drawn = read()
        for row in rows:
            row.length += not row.finished
        return self._advance(rows, drawn)

    def _advance(self, rows: list[Row], drawn: Drawn) -> list[tuple[Row, Event]]:
        """Hands each row its token; ends those that are done."""
        now, events = time.perf_counter(), []
        for number, (row, token, logprob) in enumerate(zip(rows, drawn.ids, drawn.logprobs, strict=True)):
            if row.finished:
                continue  # it ended while this step was under way
            row.first_token = row.first_token or now
            row.last_token = now
            row.new_ids.append(token)
            at_end = token in self.model.config.eos_token_ids and not row.request.ignore_eos
            text = row.text.push(token) if row.text else ""
            seen = drawn.scales[number] if drawn.scales and row.request.trace_scales else None
            insight = drawn.insights[number] if drawn.insights and row.request.inspect else None
            prefill = row.prefill_seconds if len(row.new_ids) == 1 else None
            events.append((row, TokenEvent(len(row.new_ids) - 1, token, text, logprob, prefill, seen, insight)))
            if at_end:
                events.append((row, self._finish(row, "eos")))
            elif row.text and row.text.stopped:
                events.append((row, self._finish(row, "stop")))
            elif len(row.new_ids) >= row.limit:
                events.append((row, self._finish(row, "length")))
        return events

    def _finish(self, row: Row, reason: str, keep: bool = True) -> FinishEvent:
        used = pages_for(row.length) if keep and row.request.keep else 0
        self.cache.release(row.pages[used:])
        row.pages = row.pages[:used]
        if row.pages:
            self.kept.keep_row(row)
        if row in self.running:
            self.running.remove(row)
        return row.finish(reason, self.cache.total_tokens)
