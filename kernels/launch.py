"""Programmatic dependent launch (CUDA on sm_90 and newer): a kernel may start while the one before it still runs.

Every kernel of ours waits for the one before it before it reads or writes anything that another kernel touches, and
lets the next one start as soon as its own programs all run. What a kernel does before it waits (finding its place,
asking for weights) is thereby hidden behind its predecessor's tail: about 2 us at every boundary.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Before the first access to what another kernel writes or reads."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs may take the places that are free; it waits for this one's end by itself."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def overlap(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of every kernel that takes part."""
    if tensor.is_cuda and _capability(tensor.get_device())[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def processors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors of the tensor's card; in the interpreter, a small number for small tests."""
    return _processors(tensor.get_device()) if tensor.is_cuda else 8
