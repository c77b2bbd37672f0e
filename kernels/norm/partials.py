"""Adding up the partial sums of a split-K product where they are read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_partials(total, partials_ptr, at, stride, inside, COUNT: tl.constexpr):
    """Adds COUNT partial sums in order. Unrolled, so that their loads are on their way together."""
    for p in tl.static_range(COUNT):
        total += tl.load(partials_ptr + p * stride + at, mask=inside, other=0.0).to(tl.float32)
    return total
