"""The paged KV cache: what attention keeps, in pages of 64 tokens, handed out to rows and shared by forks."""

from __future__ import annotations

import torch

import kernels
from playground.checkpoint.config import ModelConfig

PAGE_SIZE = 64


class PagedCache:
    """`kv` of all layers and one page more than are handed out, a free list, and how many rows hold each page. The last
    page is `scratch`: nobody's, for what a step of fixed size computes beyond its rows. `dtype` is the model's, or
    float8_e4m3fn."""

    def __init__(self, config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype):
        pages = -(-tokens // PAGE_SIZE)
        self.scratch = pages
        shape, a = (config.num_hidden_layers, pages + 1, PAGE_SIZE), config.attention
        self.kv = kernels.KV.zeros(*shape, widths=a.cache_widths, dtype=dtype, device=device, across=a.cache_across)
        self.holders = [0] * pages
        self.free = list(range(pages))[::-1]  # lowest page first: a lone row stays in the same memory

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

    def copy(self, source: int, target: int) -> None:
        for tensor in (self.kv.values, self.kv.scales):
            if tensor is not None:
                tensor[:, target] = tensor[:, source]


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a token takes of all layers' cache."""
    widths = config.attention.cache_widths
    scales = len(widths) * torch.float32.itemsize if dtype == torch.float8_e4m3fn else 0
    return config.num_hidden_layers * (sum(widths) * dtype.itemsize + scales)


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def slots_of(pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Places in the flattened cache, `[..., T]`, of a row's `positions [..., T]` in its `pages [..., P]`."""
    page = pages.gather(-1, positions // PAGE_SIZE).long()
    return page * PAGE_SIZE + positions % PAGE_SIZE
