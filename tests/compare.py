"""The one comparison helper, and the tolerances: they belong to the format, not to a test."""

from __future__ import annotations

import torch

# ||out - ref|| / ||ref|| against dequantised operands, so that quantisation error is excluded
TOLERANCE = {
    "float32": 1e-5,  # float32 sums, in another order
    "fp8 unit": 1e-3,  # the FP8 tensor core aligns products with about 14 bits before it sums them
    "float16": 5e-4,  # rounding of the result to 11 bits
    "bfloat16": 4e-3,  # rounding of the result to 8 bits
    "bfloat16 inputs": 2e-2,  # operands rounded to 8 bits before a softmax
}


def assert_close(out: torch.Tensor, ref: torch.Tensor, kind: str) -> None:
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, not {tuple(ref.shape)}"
    assert torch.isfinite(out).all(), f"{(~torch.isfinite(out)).sum()} values are not finite"
    error = ((out - ref).norm() / ref.norm().clamp(min=1e-30)).item()
    worst = (out - ref).abs().flatten().argmax().item() if out.numel() else None
    assert error <= TOLERANCE[kind], f"relative error {error:.2e} > {TOLERANCE[kind]:.0e}, worst at {worst}"


def assert_bits_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = (t.detach().cpu().contiguous().view(torch.uint8) for t in (a, b))
    assert a.shape == b.shape
    different = (a != b).sum().item()
    assert different == 0, f"{different} of {a.numel()} bytes differ, first at {(a != b).flatten().nonzero()[0].item()}"
