"""Compiles every kernel as the host functions would launch it on a card of a given compute capability, without a card.

`python tests/kernels/compile_for.py 89 101376`, with the bytes of shared memory that a program may have there, prints
one JSON object for each kernel: its name and the bytes that it takes. A driver
that only knows its target stands in for the real one, and launches end after compilation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels import KV, Form, Keep, Routing
from kernels.attention import gather, prefill
from kernels.attention import gqa as attention
from kernels.attention import mla as latent
from kernels.attention import sm90_specialized_prefill as specialized_attention
from kernels.attention import sm90_streamed_gqa as streamed_attention
from kernels.attention import sm90_streamed_mla as streamed_latent
from kernels.gemm import choose as gemm
from kernels.gemm import narrow, wide
from kernels.gemm import sm90_specialized as specialized
from kernels.gemm import sm90_streamed as streamed
from kernels.moe import route as moe
from kernels.norm import add_norm as norm
from kernels.quant import e4m3 as quant
from kernels.rope import heads as rope
from kernels.sampling import draw as drawing
from kernels.sampling import survey as surveying
from kernels.stepping import step as stepping


class Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def pretend(capability: int, shared: int) -> None:
    driver.set_active(Target(capability))
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.__name__, "shared": compiled.metadata.shared}), flush=True)
        return compiled

    JITFunction.run = compile_only
    for room in (latent, quant):
        room.has_fp8_units = lambda device: capability >= 89
    for room in (prefill, wide):
        room.has_tma = lambda tensor: capability >= 90
    for room in (attention, gemm, latent, prefill, wide):
        room.is_hopper = lambda tensor: capability == 90
    for room in (specialized, specialized_attention, streamed, wide):
        room.multiprocessors = lambda tensor: 132
    for room in (prefill, streamed, wide):
        room.shared_memory = lambda tensor: shared
    options = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    launching = (attention, drawing, gather, gemm, latent, moe, narrow, norm, prefill, quant, rope, stepping, surveying)
    gluon = (specialized, specialized_attention, streamed, streamed_attention, streamed_latent)
    for room in (*launching, *gluon, wide):
        room.overlap = lambda tensor: options


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def products(rows: int) -> None:
    """Of Qwen3-8B and Moonlight: FP8, BF16, and experts."""
    bf16, form = torch.bfloat16, Form(True, True)
    for n, k in ((6144, 4096), (24576, 4096)):
        gemm.gemm_parts(fp8(rows, k), fp8(n, k), torch.ones(rows, k // 128), torch.ones(n // 128, k // 128), bf16)
        gemm.gemm_swiglu(
            fp8(rows, k), fp8(n, k), torch.ones(rows, k // 128), torch.ones(n // 128, k // 128), Form(False, True), bf16
        )
        gemm.gemm_parts(torch.zeros(rows, k, dtype=bf16), torch.zeros(64, k, dtype=bf16), None, None, bf16)
    experts, weights = torch.zeros(rows, 8, dtype=torch.int32), torch.ones(rows, 8)
    scales = torch.ones(rows, 16), torch.ones(4, 44, 16)
    for shared in (0, 2):
        gemm.expert_gemm(fp8(rows, 2048), fp8(4, 5632, 2048), *scales, experts, None, bf16, shared)
    scales = torch.ones(rows * 8, 22), torch.ones(4, 16, 22)
    gemm.expert_gemm(fp8(rows * 8, 2816), fp8(4, 2048, 2816), *scales, experts, weights, bf16)
    gemm.add_up(torch.zeros(4, rows, 4096), bf16)
    x = torch.zeros(rows, 4096, dtype=bf16)
    for gate in (None, torch.zeros(256, 4096, dtype=bf16))[: 1 + (rows <= 32)]:
        norm.add_norm(x, [torch.zeros(4, rows, 4096)], torch.ones(4096, dtype=bf16), 1e-6, form, gate)
    norm.swiglu(torch.zeros(1, rows, 24576), bf16, form)
    quant.act_quant(x, 128, None)


def cached(rows: int, dtype: torch.dtype) -> None:
    """What writes and reads the KV cache: of Qwen3-8B, and MLA as in DeepSeek-V3."""
    bf16, form, lengths = torch.bfloat16, Form(True, True), torch.ones(rows, dtype=torch.int32)
    pages, slots = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    norms = torch.ones(128), torch.ones(128)
    kv, shorter = (KV.zeros(8, page, widths=(128,) * 16, dtype=dtype, device="cpu", across=1024) for page in (64, 32))
    angles, q = torch.zeros(rows, 2, 64), torch.zeros(rows, 32, 128, dtype=bf16)
    rope.rope_heads(torch.zeros(4, rows, 6144), (0, 4096, 5120), norms, angles, slots, kv, 32, 1e-6, bf16)
    gather.gather_kv(kv, slots, bf16)
    gather.gather_kv(KV.zeros(8, 64, widths=(576,), dtype=bf16, device="cpu"), slots, bf16)
    for cache in (kv, shorter):  # pages of 32 tokens go by pointer on Hopper, too
        attention.gqa_decode(q, cache, pages, lengths, 0.1, 8, form)
    angles, latents = torch.zeros(rows, 2, 32), KV.zeros(8, 64, widths=(512, 64), dtype=dtype, device="cpu")
    parts, absorb = torch.zeros(4, rows, 1536 + 576), torch.zeros(16, 512, 128, dtype=bf16)
    keep = Keep(1536, torch.ones(512), 1e-6, slots, latents)
    rope.split_latents(parts, torch.ones(1536), angles, keep, form, bf16)
    rope.absorb_queries(torch.zeros(2, rows, 16 * 192), absorb, angles, bf16, None)
    rope.absorb_queries(torch.zeros(2, rows, 16 * 192), absorb, angles, bf16, keep)
    q, expand = torch.zeros(rows, 16, 576, dtype=bf16), torch.zeros(16, 128, 512, dtype=bf16)
    latent.mla_decode(q, latents, pages, lengths, 0.1, expand, form)


def prompts() -> None:
    bf16 = torch.bfloat16
    for tokens in (100, 600):
        keys, queries = torch.zeros(600, 16, 192, dtype=bf16), torch.zeros(tokens, 16, 192, dtype=bf16)
        prefill.causal_attention(queries, keys, keys[..., :128], 0.1, Form(True, False))
        for form in (Form(True, False), Form(False, True)):
            prefill.causal_attention(queries[..., :128].contiguous(), keys[..., :128], keys[..., 64:], 0.1, form)


def draws(rows: int) -> None:
    rule = Routing(6, 1, 1, True, True, 2.5, 2)
    moe.route(torch.zeros(4, rows, 64), torch.zeros(64), rule)
    moe.route(torch.zeros(4, rows, 256), torch.zeros(256), Routing(8, 8, 4, True, True, 2.5, 1))
    integers, temperature = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.float64)
    drawing.draw(torch.zeros(rows, 151936), temperature, integers, integers)
    for dtype in (torch.float32, torch.float64):
        surveying.survey(torch.zeros(rows, 151936, dtype=dtype), temperature, integers, integers, integers)
    pages = torch.zeros(rows, 4, dtype=torch.int32)
    stepping.look_up(integers, integers, torch.zeros(100, 4096, dtype=torch.bfloat16), torch.zeros(100, 2, 64))
    words, turn = torch.zeros(2, 4096, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    stepping.deliver((integers, temperature), (0, 128), words, turn)
    stepping.advance(integers, integers, pages, integers, integers, integers.int(), integers, turn, 64)


if __name__ == "__main__":
    pretend(int(sys.argv[1]), int(sys.argv[2]))
    quant.weight_quant(torch.zeros(256, 256), 128, "ue8m0")
    quant.weight_dequant(fp8(256, 256), torch.ones(2, 2), 128, torch.bfloat16)
    hopper = wide.is_hopper(None)
    for rows in (1, 32, 300, *([100] if hopper else [])):  # tiles of products follow the rows
        products(rows)
    for cut in ((1, 1), (1, 2), (2, 1)) if hopper else ():
        operands = fp8(300, 2048), fp8(1024, 2048), torch.ones(300, 16), torch.ones(8, 16)
        specialized.specialized_product(*operands, torch.bfloat16, specialized.Cut(*cut))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        cached(70, dtype)
    prompts()
    draws(32)
