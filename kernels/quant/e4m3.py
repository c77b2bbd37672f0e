"""Block quantisation to E4M3 in Triton.

Cards from sm_89 on have an instruction for it. On others (T4 and A100 have no FP8 type in Triton) and in Triton's
interpreter, whose own cast to FP8 rounds wrongly, the code is computed in integer arithmetic and stored as a byte: the
same bits everywhere. Scales divide as IEEE says (`div_rn`): `/` may be an approximation on a GPU, and the twins are
matched bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
import triton.language.target_info as target_info
from triton import knobs

from kernels.forms import AMAX_FLOOR, FP8_MAX, Form, Formed
from kernels.launch import let_next_start, overlap, wait_for_previous
from kernels.reference import has_fp8_units

_FP8_MAX = tl.constexpr(FP8_MAX)
_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)


@triton.constexpr_function
def has_e4m3_instructions() -> bool:
    """Whether the kernel is being compiled for a card that converts to E4M3 by itself."""
    return not knobs.runtime.interpret and target_info.cuda_capability_geq(8, 9)


@triton.jit
def encode_e4m3(x):
    """Float32 to E4M3 codes (uint8): round to nearest even, saturating at 448; NaN stays NaN."""
    if has_e4m3_instructions():
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return encode_e4m3_in_integers(x)


@triton.jit
def encode_e4m3_in_integers(x):
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), _FP8_MAX)
    bits = magnitude.to(tl.int32, bitcast=True)
    # normal: keep 3 mantissa bits; the carry of the rounding runs into the exponent by itself; rebias 127 -> 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # subnormal: a multiple of 2^-9; adding 2^23 rounds to an integer that stands in the low mantissa bits
    subnormal = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude >= 0.015625, normal, subnormal)
    return tl.where(x == x, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """E4M3 codes (uint8) to float16, exactly: shift into float16's fields, then correct the exponent bias by 2^8."""
    wide = code.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def decode_e4m3_words(words):
    """The four E4M3 codes of each int32 as float16, the lowest byte's first: in registers four codes to a word, where
    the compiler would give each byte a register of its own."""
    if has_e4m3_instructions():
        asm: tl.constexpr = """{
            .reg .b16 low, high;
            .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {$0, $1}, first;
            mov.b32 {$2, $3}, second;
        }"""
        four: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        return tl.inline_asm_elementwise(asm, "=h,=h,=h,=h,r", [words], dtype=four, is_pure=True, pack=1)
    else:
        return (
            decode_e4m3((words & 0xFF).to(tl.uint8)),
            decode_e4m3((words >> 8 & 0xFF).to(tl.uint8)),
            decode_e4m3((words >> 16 & 0xFF).to(tl.uint8)),
            decode_e4m3((words >> 24 & 0xFF).to(tl.uint8)),
        )


@triton.jit
def block_scale(amax, UE8M0: tl.constexpr):
    """`max(amax, 1e-4) / 448`; ue8m0 rounds up to a power of two by adding one ulp short of a binade and masking."""
    scale = tl.div_rn(tl.maximum(amax, _AMAX_FLOOR), _FP8_MAX)
    if UE8M0:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def quantise(x, scale):
    """E4M3 codes (uint8) of `x / scale` in float32; `scale`, from `block_scale`, is for one block or for several."""
    if has_e4m3_instructions():
        # The same quotient as IEEE division's in three instructions for each number: with the reciprocal correctly
        # rounded, one correction by the remainder rounds the quotient correctly (Markstein, IBM J. R&D 34, 1990).
        # Where the remainder underflows, x is far below what E4M3 can tell from 0. Signs are flipped by multiplying:
        # subtracting from 0 would lose that of -0
        reciprocal = tl.broadcast_to(tl.div_rn(1.0, scale), x.shape)
        near = x * reciprocal
        beyond = tl.fma(near, tl.broadcast_to(scale, x.shape), x * -1.0)
        return encode_e4m3(tl.fma(beyond * -1.0, reciprocal, near))
    else:
        return encode_e4m3(tl.div_rn(x, tl.broadcast_to(scale, x.shape)))


@triton.jit
def emit(
    y, at, inside, block_at, block_inside, plain_ptr, q_ptr, s_ptr,
    PLAIN: tl.constexpr, FP8: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """The end of every op that feeds a product: stores blocks `y [B, 128]` (float32, already rounded to the dtype of
    the model) plain at `at`, or quantised with a scale per block at `block_at`, or both."""
    if PLAIN:
        tl.store(plain_ptr + at, y.to(plain_ptr.dtype.element_ty), mask=inside)
    if FP8:
        scale = block_scale(tl.max(tl.abs(y), axis=1), UE8M0)
        tl.store(q_ptr + at, quantise(y, scale[:, None]), mask=inside)
        tl.store(s_ptr + block_at, scale, mask=block_inside)


def allocate(form: Form, rows: int, dim: int, like: torch.Tensor) -> Formed:
    """Empty outputs for `emit`: only what the form needs."""
    plain = torch.empty(rows, dim, dtype=like.dtype, device=like.device) if form.plain else None
    if not form.fp8:
        return Formed(plain, None, None)
    q = torch.empty(rows, dim, dtype=torch.float8_e4m3fn, device=like.device)
    return Formed(plain, q, torch.empty(rows, dim // 128, dtype=torch.float32, device=like.device))


def emitted(form: Form, out: Formed, unused: torch.Tensor) -> tuple[tuple, dict[str, bool]]:
    """Pointers and flags of `emit`; `unused` is passed for what is not written."""
    codes = out.q.view(torch.uint8) if form.fp8 else unused
    pointers = (out.plain if form.plain else unused, codes, out.s if form.fp8 else unused)
    return pointers, {"PLAIN": form.plain, "FP8": form.fp8, "UE8M0": form.ue8m0}


@triton.jit
def act_quant_kernel(
    x_ptr, q_ptr, s_ptr, num_blocks, UE8M0: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    let_next_start(PDL)
    wait_for_previous(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = rows < num_blocks
    x = tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = block_scale(tl.max(tl.abs(x), axis=1), UE8M0)
    tl.store(q_ptr + offsets, quantise(x, scale[:, None]), mask=inside[:, None])
    tl.store(s_ptr + rows, scale, mask=inside)


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    s = x.new_empty(*x.shape[:-1], x.shape[-1] // block_size, dtype=torch.float32)
    rows = 1 if s.numel() < 1024 else 16  # few blocks: spread them over the card; many: amortise the launch
    if s.numel():
        act_quant_kernel[(triton.cdiv(s.numel(), rows),)](
            x, q.view(torch.uint8), s, s.numel(), UE8M0=scale_fmt == "ue8m0", ROWS=rows, BLOCK=block_size, num_warps=4,
            **overlap(x),
        )  # fmt: skip
    return q, s


def formed(x: torch.Tensor, form: Form) -> Formed:
    q, s = act_quant(x, 128, "ue8m0" if form.ue8m0 else None) if form.fp8 else (None, None)
    return Formed(x if form.plain else None, q, s)


@triton.jit
def weight_quant_kernel(w_ptr, q_ptr, s_ptr, rows, cols, UE8M0: tl.constexpr, BLOCK: tl.constexpr):
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    k = tile_k * BLOCK + tl.arange(0, BLOCK)
    offsets = n[:, None].to(tl.int64) * cols + k[None, :]
    inside = (n < rows)[:, None] & (k < cols)[None, :]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = block_scale(tl.max(tl.max(tl.abs(w), axis=1), axis=0), UE8M0)
    tl.store(q_ptr + offsets, quantise(w, scale), mask=inside)
    tl.store(s_ptr + tile_n * tl.num_programs(1) + tile_k, scale)


def weight_quant(
    w: torch.Tensor, block_size: int = 128, scale_fmt: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.contiguous()
    grid = (triton.cdiv(w.shape[0], block_size), triton.cdiv(w.shape[1], block_size))
    q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    s = w.new_empty(grid, dtype=torch.float32)
    weight_quant_kernel[grid](
        w, q.view(torch.uint8), s, *w.shape, UE8M0=scale_fmt == "ue8m0", BLOCK=block_size, num_warps=8
    )
    return q, s


@triton.jit
def weight_dequant_kernel(q_ptr, s_ptr, w_ptr, rows, cols, BLOCK: tl.constexpr):
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    k = tile_k * BLOCK + tl.arange(0, BLOCK)
    offsets = n[:, None].to(tl.int64) * cols + k[None, :]
    inside = (n < rows)[:, None] & (k < cols)[None, :]
    scale = tl.load(s_ptr + tile_n * tl.num_programs(1) + tile_k)
    w = decode_e4m3(tl.load(q_ptr + offsets, mask=inside, other=0)).to(tl.float32) * scale
    tl.store(w_ptr + offsets, w, mask=inside)


def weight_dequant(q: torch.Tensor, scale: torch.Tensor, block_size: int = 128, *, dtype: torch.dtype) -> torch.Tensor:
    q = q.contiguous()
    w = torch.empty_like(q, dtype=dtype)
    weight_dequant_kernel[tuple(scale.shape)](
        q.view(torch.uint8), scale.contiguous(), w, *q.shape, BLOCK=block_size, num_warps=8
    )
    return w


def operands(a, b, a_s, decode: bool | None):
    """A product's operands, contiguous and in the form that kernels read, and the flags that say so."""
    fp8 = a_s is not None
    if decode is None:
        decode = fp8 and not has_fp8_units(a.device)
    if a.stride(-1) != 1 or fp8:
        a = a.contiguous()
    if decode:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return a, b, {"FP8": fp8, "DECODE": decode}
