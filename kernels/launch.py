"""Programmatic dependent launch (CUDA on sm_90 and newer): a kernel may start while the one before it still runs.

A kernel lets the next one start as soon as it begins, and then waits for the one before it. So several kernels are
resident at a time, and those that find free shared memory fetch weights: memory stays busy while small kernels run.

Before it waits, a kernel may read only what no earlier kernel of the step writes: weights, seeds, sequence lengths and
block tables (which change only as a step ends), and all pages of the cache but each row's newest. Before it waits, it
writes nothing. Once it has waited, everything before it is done, because every kernel waits. (A program without work
may leave without waiting if another program of its launch waits: a launch ends with its last program.)

A few kernels let the next one start only after they have waited, and say why. One of them is the first product of the
chosen experts: after it, later kernels may read the choice without waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_overlapping: ContextVar[bool] = ContextVar("overlapping", default=True)


@contextmanager
def one_after_another() -> Iterator[None]:
    """Within it, no kernel begins before the one before it has ended, so that each one's time is its own."""
    token = _overlapping.set(False)
    try:
        yield
    finally:
        _overlapping.reset(token)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Before the first access to what any kernel of the step writes, and before any write."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Once all programs have said so, those of the next kernel may take what places are free."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Brings the 128-byte lines that the pointers point into to the L2 cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def overlap(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of every kernel that takes part."""
    if _overlapping.get() and tensor.is_cuda and _capability(tensor.get_device())[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def capability(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the tensor's card, such as (9, 0)."""
    return _capability(tensor.get_device())


def has_tma(tensor: torch.Tensor) -> bool:
    """Whether the card has the tensor memory accelerator (sm_90 and newer): one instruction copies a whole tile."""
    return tensor.is_cuda and _capability(tensor.get_device())[0] >= 9


def is_hopper(tensor: torch.Tensor) -> bool:
    """Whether the card has `wgmma`, products of whole tiles in shared memory, which no other generation has."""
    return tensor.is_cuda and _capability(tensor.get_device())[0] == 9


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the tensor's card."""
    return _multiprocessors(tensor.get_device())


@cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def shared_memory(tensor: torch.Tensor) -> int:
    """Bytes that a program may use on the tensor's card."""
    return _shared_memory(tensor.get_device()) if tensor.is_cuda else 1 << 20
