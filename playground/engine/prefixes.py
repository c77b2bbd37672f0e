"""Pieces of prompts that stay in the cache for prompts that begin alike: a long document, a conversation that goes on.

A prompt is fed in pieces whose boundaries follow positions, and a piece is taken over whole or not at all. So what a
prompt finds here has, bit by bit, what its own prefill would have left.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from playground.engine.cache import PAGE_SIZE


@dataclass(eq=False)
class Prefix:
    """The pages of one piece. Its name is the hash of all tokens from the start of the prompt to the piece's end."""

    name: bytes
    pages: list[int]


class Prefixes:
    """`piece` tokens each; 0, or what is no multiple of a page: nothing is ever known."""

    def __init__(self, piece: int):
        self.piece = piece if piece % PAGE_SIZE == 0 else 0
        self.known: dict[bytes, Prefix] = {}

    def found(self, prompt: Sequence[int]) -> list[Prefix]:
        """The pieces that a prompt begins with, in order. Its last token is never among them: it must be fed."""
        chain = []
        for name in self._names(prompt[:-1]):
            if name not in self.known:
                break
            chain.append(self.known[name])
        return chain

    def add(self, tokens: Sequence[int], pages: Sequence[int]) -> Prefix | None:
        """Takes note of `pages`, which hold the last piece of `tokens`; None where that is no whole piece, or known."""
        if not self.piece or len(tokens) % self.piece:
            return None
        *_, name = self._names(tokens)
        if name in self.known:
            return None
        self.known[name] = Prefix(name, list(pages))
        return self.known[name]

    def forget(self, prefix: Prefix) -> None:
        del self.known[prefix.name]

    def _names(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Of each whole piece."""
        name = b""
        for end in range(self.piece, len(tokens) + 1, self.piece) if self.piece else ():
            name = hashlib.sha256(name + array("q", tokens[end - self.piece : end]).tobytes()).digest()
            yield name
