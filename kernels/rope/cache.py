"""Where a kernel writes what the KV cache keeps of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import KV


@triton.jit
def scale_place(slot, vector, vectors, PAGE: tl.constexpr):
    """Index of the scale of a token's vector: the scales of a page's tokens lie side by side."""
    return (slot // PAGE * vectors + vector) * PAGE + slot % PAGE


def stored(kv: KV) -> tuple[tuple, dict]:
    """Pointers and flags of a cache that a kernel writes to."""
    scaled = kv.scales is not None
    pointers = (kv.values.view(torch.uint8), kv.scales) if scaled else (kv.values, kv.values)
    return pointers, {"SCALED": scaled, "PAGE": kv.page_size}
