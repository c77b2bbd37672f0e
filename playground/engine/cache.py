"""The paged KV cache: what attention keeps. Which page is whose, `pages.py` knows."""

from __future__ import annotations

import torch

import kernels
from playground.checkpoint.config import ModelConfig
from playground.engine.pages import PAGE_SIZE, pages_for


class PagedCache:
    """`kv` of all layers and one page more than are handed out. The last page is `scratch`: nobody's, for what a step
    of fixed size computes beyond its rows. `dtype` is the model's, or float8_e4m3fn."""

    def __init__(self, config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype):
        self.scratch = pages_for(tokens)
        shape, a = (config.num_hidden_layers, self.scratch + 1, PAGE_SIZE), config.attention
        self.kv = kernels.KV.zeros(*shape, widths=a.cache_widths, dtype=dtype, device=device, across=a.cache_across)

    def copy(self, source: int, target: int) -> None:
        for tensor in (self.kv.values, self.kv.scales):
            if tensor is not None:
                tensor[:, target] = tensor[:, source]


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a token takes of all layers' cache."""
    widths = config.attention.cache_widths
    scales = len(widths) * torch.float32.itemsize if dtype == torch.float8_e4m3fn else 0
    return config.num_hidden_layers * (sum(widths) * dtype.itemsize + scales)


def slots_of(pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Places in the flattened cache, `[..., T]`, of a row's `positions [..., T]` in its `pages [..., P]`."""
    page = pages.gather(-1, positions // PAGE_SIZE).long()
    return page * PAGE_SIZE + positions % PAGE_SIZE
