"""What stays in the cache though nobody runs on it: ended rows for those that branch off, and chunks of prompts for
prompts that begin alike (a long document, a conversation that goes on). All of it gives way to rows that want to begin.

A prompt is fed in chunks whose boundaries follow positions, and a chunk is taken over whole or not at all. So what a
prompt finds here has, bit by bit, what its own prefill would have left.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from playground.engine.pages import PAGE_SIZE, PagePool
from playground.engine.row import Row


@dataclass(eq=False)
class Prefix:
    """The pages of one chunk. Its name is the hash of all tokens from the start of the prompt to the chunk's end."""

    name: bytes
    pages: list[int]


class Prefixes:
    """`chunk` tokens each; 0, or what is no multiple of a page: nothing is ever known."""

    def __init__(self, chunk: int):
        self.chunk = chunk if chunk % PAGE_SIZE == 0 else 0
        self.known: dict[bytes, Prefix] = {}

    def found(self, prompt: Sequence[int]) -> list[Prefix]:
        """The chunks that a prompt begins with, in order. Its last token is never among them: it must be fed."""
        chain = []
        for name in self._names(prompt[:-1]):
            if name not in self.known:
                break
            chain.append(self.known[name])
        return chain

    def add(self, tokens: Sequence[int], pages: Sequence[int]) -> Prefix | None:
        """Takes note of `pages`, which hold the last chunk of `tokens`; None where that is no whole chunk, or known."""
        if not self.chunk or len(tokens) % self.chunk:
            return None
        *_, name = self._names(tokens)
        if name in self.known:
            return None
        self.known[name] = Prefix(name, list(pages))
        return self.known[name]

    def forget(self, prefix: Prefix) -> None:
        del self.known[prefix.name]

    def _names(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Of each whole chunk."""
        name = b""
        for end in range(self.chunk, len(tokens) + 1, self.chunk) if self.chunk else ():
            name = hashlib.sha256(name + array("q", tokens[end - self.chunk : end]).tobytes()).digest()
            yield name


class PrefixCache:
    """`chunk` as in `Prefixes`."""

    def __init__(self, pool: PagePool, chunk: int):
        self.pool, self.prefixes = pool, Prefixes(chunk)
        self.held: dict[Row | Prefix, None] = {}  # those that go first come first

    def keep_row(self, row: Row) -> None:
        """An ended row, whose pages are its own."""
        self.held[row] = None

    def keep_chunk(self, prompt: Sequence[int], start: int, end: int, pages: list[int]) -> None:
        """What has just been fed to a prompt's `pages`, where that is a whole chunk."""
        if prefix := self.prefixes.add(prompt[:end], pages[start // PAGE_SIZE : end // PAGE_SIZE]):
            self.pool.share(prefix.pages)
            self.held[prefix] = None
            self.freshen([*self.prefixes.found(prompt[:end]), prefix])

    def freshen(self, ones: Sequence[Row | Prefix]) -> None:
        """Others go before these, as far as these are held at all, and of these the last goes first: nobody finds a
        chunk whose forerunner is gone."""
        for one in reversed(ones):
            if one in self.held:
                del self.held[one]
                self.held[one] = None

    def drop(self, one: Row | Prefix) -> None:
        """Gives up its pages."""
        if one in self.held:
            del self.held[one]
            self.pool.release(one.pages)
            one.pages = []
            if isinstance(one, Prefix):
                self.prefixes.forget(one)

    def make_room(self, pages: int, spared: Sequence[Row | Prefix] = ()) -> bool:
        """Whether so many pages are free then: as few as can be are let go for it, and none in vain."""
        free, let_go, going = len(self.pool.free), Counter(), []
        for one in self.held:
            if free >= pages:
                break
            if one not in spared:
                going.append(one)
                let_go.update(one.pages)
                free += sum(let_go[page] == self.pool.holders[page] for page in one.pages)
        if free < pages:
            return False
        for one in going:
            self.drop(one)
        return True
