"""Who waits, is prefilled, runs and shares a prefix. No torch here: the scheduler deals in rows and pages, and what the
runner has to do leaves it as the frozen batches of `batch.py`.

Groups of rows that share a prompt wait in line, are prefilled once, and then share every step until each of them ends.
A group begins when there are places for all of its rows and pages for all that they may ever write, so that a row that
was started can always finish.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from playground.checkpoint.tokenizer import TextStream, Tokenizer
from playground.engine.batch import Copies, DecodeBatch, DecodeRow, PrefillChunk
from playground.engine.pages import PAGE_SIZE, PagePool, pages_for
from playground.engine.prefix_cache import Prefix, PrefixCache
from playground.engine.requests import Request
from playground.engine.row import Row
from playground.engine.settings import RequestError

TOGETHER = 512  # tokens of prompts between two decode steps, unless one prompt alone has more
MOST_WAITING = 1000  # groups; more are refused


class Line:
    """Groups that wait, in fair turns: first every visitor's first one, then every visitor's second one."""

    def __init__(self):
        self.visitors: dict[str, deque[list[Row]]] = {}  # whoever is next comes first

    def add(self, visitor: str, group: list[Row]) -> None:
        self.visitors.setdefault(visitor, deque()).append(group)

    def __iter__(self) -> Iterator[list[Row]]:
        """In the order of their turns."""
        for turn in range(max(map(len, self.visitors.values()), default=0)):
            for groups in list(self.visitors.values()):
                if turn < len(groups):
                    yield groups[turn]

    def __len__(self) -> int:
        return sum(map(len, self.visitors.values()))

    @property
    def first(self) -> list[Row] | None:
        return next(iter(self.visitors.values()))[0] if self.visitors else None

    def pop(self) -> list[Row]:
        visitor, groups = next(iter(self.visitors.items()))
        del self.visitors[visitor]
        group = groups.popleft()
        if groups:
            self.visitors[visitor] = groups  # its next turn comes when all others have had theirs
        return group

    def remove(self, row: Row) -> None:
        """Takes a row out of its group, and the group out of the line where it was the last."""
        for visitor, groups in list(self.visitors.items()):
            for group in list(groups):
                if row in group:
                    group.remove(row)
                    if not group:
                        groups.remove(group)
            if not groups:
                del self.visitors[visitor]


@dataclass
class Filling:
    """A group whose prompt is on its way into the cache."""

    rows: list[Row]  # the one with the highest limit first: the pages suffice for it
    pages: list[int]
    forks: dict[Row, list[int]]  # the pages that each of the others will have of its own
    done: int = 0  # tokens that stand in the cache
    seconds: float = 0.0


class Scheduler:
    def __init__(self, pool: PagePool, max_rows: int, context: int, vocab_size: int, chunk: int, share: bool):
        self.pool, self.max_rows, self.context, self.vocab_size = pool, max_rows, context, vocab_size
        self.chunk = chunk
        self.waiting = Line()
        self.filling: Filling | None = None
        self.running: list[Row] = []
        self.kept = PrefixCache(pool, chunk if share else 0)
        self.decode_next = False
        self.fed_together = 0  # tokens of prompts since the last decode step

    @property
    def busy(self) -> bool:
        return bool(self.waiting.visitors or self.filling or self.running)

    def add(
        self,
        requests: list[Request],
        ids: list[int],
        tokenizer: Tokenizer | None,
        parent: Row | None = None,
        visitor: str = "",
    ) -> list[Row]:
        """Queues rows that share one prompt: prefilled once, then forked. Where the cache of `parent` still begins with
        their prompt they branch off from there, with the bits of the parent's own steps. Raises `RequestError`."""
        for request in requests:
            request.check_lengths(self.context, self.vocab_size)
        if len({r.prompt for r in requests}) != 1 or len(requests) > self.max_rows:
            raise RequestError(f"A group is 1 to {self.max_rows} rows with one prompt.")
        if len(self.waiting) >= MOST_WAITING:
            raise RequestError(f"{MOST_WAITING} requests are waiting already; try again later.")
        now, rows = time.perf_counter(), []
        for number, request in zip(ids, requests, strict=True):
            limit = min(request.max_new_tokens, self.context - len(request.prompt))
            begun = request.prompt[len(request.prompt) - request.begun :]
            text = TextStream(tokenizer, request.stop, begun) if tokenizer else None
            rows.append(Row(number, request, limit, text, now, parent, request.watch))
        if self._pages_needed(rows) > len(self.pool.holders):
            raise RequestError(f"The KV cache holds {self.pool.total_tokens} tokens in all; ask for fewer or shorten.")
        self.waiting.add(visitor, rows)
        return rows

    def leave(self, row: Row, keep: bool) -> None:
        """A row has ended, wherever it stood. Its pages are free when this returns, unless its request keeps them."""
        row.finished = True
        if not keep:
            self.kept.drop(row)
        self.waiting.remove(row)
        if self.filling and row in self.filling.rows:
            self.filling.rows.remove(row)
            self.pool.release(self.filling.forks.pop(row, []))
            if not self.filling.rows:
                self.pool.release(self.filling.pages)
                self.filling = None
        used = pages_for(row.length) if keep and row.request.keep else 0
        self.pool.release(row.pages[used:])
        row.pages = row.pages[:used]
        if row.pages and row not in self.kept.held:
            self.kept.keep_row(row)
        if row in self.running:
            self.running.remove(row)

    def begin(self) -> tuple[list[Row], Copies]:
        """The rows whose turn has come, if the first group in line has places and pages now, and what is to be copied
        before anything else happens."""
        if self.filling or not self.waiting.visitors or not self._make_room(self.waiting.first):
            return [], ()
        group = self.waiting.pop()
        if parent := self._parent(group):
            copies: list[tuple[int, int]] = []
            for row in group:
                row.length = row.cached = len(row.request.prompt) - 1
                row.branched, row.parent = True, None
                copies += self._fork(parent, row, row.length, self.pool.take(self._own_pages(row, row.length)))
            self.running += group
            return group, tuple(copies)
        for row in group:
            row.parent = None  # a chain of branches would hold on to all of its rows
        rows = sorted(group, key=lambda row: -row.limit)
        prompt = rows[0].request.prompt
        begun = self.kept.prefixes.found(prompt)
        self.kept.freshen(begun)
        found = [page for one in begun for page in one.pages]
        pages = self.pool.share(found) + self.pool.take(pages_for(len(prompt) + rows[0].limit) - len(found))
        for row in rows:
            row.cached = len(found) * PAGE_SIZE
        forks = {row: self.pool.take(self._own_pages(row, len(prompt))) for row in rows[1:]}
        self.filling = Filling(rows, pages, forks, rows[0].cached)
        return group, ()

    def moved(self) -> list[Row]:
        """The rows that wait, and whose place in line is another than they were told."""
        found = []
        for position, group in enumerate(self.waiting, 1):
            for row in group:
                if row.position != position:
                    row.position = position
                    found.append(row)
        return found

    @property
    def prefills_next(self) -> bool:
        """Whether the next step is a prefill chunk: in turn with decode steps, so that neither waits for long. Short
        prompts that come together are fed one right behind the other, up to `TOGETHER` tokens."""
        fill = self.filling is not None and not (self.running and self.decode_next)
        if not fill:
            self.fed_together, self.decode_next = 0, False
        return fill

    def next_chunk(self) -> PrefillChunk:
        """The next chunk of the prompt that is being prefilled; with the last one its rows are running."""
        filling = self.filling
        prompt, start = filling.rows[0].request.prompt, filling.done
        end = min(start + self.chunk, len(prompt))
        self.fed_together += end - start
        self.decode_next = end < len(prompt) or self.fed_together >= TOGETHER
        if end < len(prompt):
            return PrefillChunk(prompt[start:end], start, tuple(filling.pages))
        rows, first = filling.rows, filling.rows[0]
        self.pool.release(filling.forks.pop(first, []))  # whoever came first has left: this one goes on in its pages
        first.pages, copies = filling.pages, []
        for row in rows:
            row.length = len(prompt)
            if row is not first:
                copies += self._fork(first, row, row.length, filling.forks.pop(row))
        self.filling = None
        self.running += rows
        draws, histories = tuple(row.draw for row in rows), tuple(row.history for row in rows)
        return PrefillChunk(prompt[start:end], start, tuple(filling.pages), draws, tuple(copies), histories)

    def fed(self, filling: Filling, chunk: PrefillChunk, seconds: float) -> None:
        """A chunk stands in the cache."""
        end = chunk.start + len(chunk.tokens)
        filling.done = end
        filling.seconds += seconds
        self.kept.keep_chunk(filling.rows[0].request.prompt, chunk.start, end, filling.pages)
        for row in filling.rows if chunk.draws else ():
            row.prefill_seconds = filling.seconds

    def batch(self, rows: list[Row]) -> DecodeBatch:
        """The rows' next step, from where they stand."""
        return DecodeBatch(
            tuple(DecodeRow(row.newest, row.length, tuple(row.pages), row.draw, row.history) for row in rows)
        )

    def _pages_needed(self, group: list[Row], cached: int = 0, shared: int | None = None) -> int:
        """All pages that the group may ever take. `cached`: full pages at hand; `shared`: those that its rows have in
        common, by default all full ones of the prompt."""
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

    @staticmethod
    def _own_pages(row: Row, length: int) -> int:
        """How many pages a fork behind `length` tokens shares with nobody."""
        return pages_for(len(row.request.prompt) + row.limit) - length // PAGE_SIZE

    def _fork(self, source: Row, row: Row, length: int, own: list[int]) -> Copies:
        """Shares the full pages of `length` tokens; what both will go on writing in is to be copied."""
        shared = length // PAGE_SIZE
        row.pages = self.pool.share(source.pages[:shared]) + own
        return ((source.pages[shared], row.pages[shared]),) if length % PAGE_SIZE else ()
