"""Who holds which pages of the KV cache: pages of 64 tokens, handed out to rows, shared by forks and by prompts that
begin alike. Numbers only; what stands in the pages is the runner's."""

from __future__ import annotations

PAGE_SIZE = 64
PREFILL_CHUNK = 2048  # tokens of a prompt per forward: bounds the working space. Boundaries follow positions alone


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


class PagePool:
    """A free list, and how many rows hold each page."""

    def __init__(self, tokens: int):
        self.holders = [0] * pages_for(tokens)
        self.free = list(range(len(self.holders)))[::-1]  # lowest page first: a lone row stays in the same memory

    @property
    def total_tokens(self) -> int:
        return len(self.holders) * PAGE_SIZE

    @property
    def used_pages(self) -> int:
        return len(self.holders) - len(self.free)

    def take(self, count: int) -> list[int]:
        """`count` free pages. Raises RuntimeError, and takes none, where there are not that many: callers ask first."""
        if count > len(self.free):
            raise RuntimeError(f"{count} pages of the KV cache are asked for and {len(self.free)} are free")
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        for page in pages:
            self.holders[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):  # so that whoever takes them next has them in order: pages that follow each other
            self.holders[page] -= 1  # are read on a CPU without a copy
            if self.holders[page] == 0:
                self.free.append(page)
