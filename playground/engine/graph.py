"""Recording work of a CUDA card, so that it can be replayed without the host launching each kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on its way to the device: to a card through pinned memory, so that the host does not wait for
    what the card has to do before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Recorder:
    """Records graphs into one pool of memory, in which they follow each other: what one of them leaves is to be read,
    in stream order, before the next one runs."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.full = False  # set by whoever found no memory for a recording

    def __call__(self, run: Callable[[], T], compiled: bool = False) -> tuple[torch.cuda.CUDAGraph, T]:
        """The recording of `run`, and the memory in which its results will lie. Kernels that are not `compiled` are so
        first, which a recording must not do."""
        if not compiled:
            run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = run()
        return graph, results
