"""Compiles every kernel as the host functions would launch it on a card of a given compute capability, without a card.

`python tests/kernels/compile_for.py 89 101376`, with the bytes of shared memory that a program may have there, prints
one JSON object for each kernel: its name and the bytes that it takes. A driver
that only knows its target stands in for the real one, and launches end after compilation.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))

import kernels
from kernels import KV, Form, Keep, Routing
from kernels.attention import choose as attention
from kernels.dispatch import TRITON
from kernels.gemm import choose as gemm
from kernels.gemm import sm90_specialized

ENTRIES = {op: getattr(importlib.import_module(module), op) for op, module in TRITON.items()}


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
    early = capability >= 90
    answers = {
        "has_fp8_units": lambda device: capability >= 89,
        "has_tma": lambda tensor: capability >= 90,
        "is_hopper": lambda tensor: capability == 90,
        "multiprocessors": lambda tensor: 132,
        "shared_memory": lambda tensor: shared,
        "overlap": lambda tensor: {"PDL": True, "launch_pdl": True} if early else {"PDL": False},
    }
    for found in pkgutil.walk_packages(kernels.__path__, "kernels."):
        module = importlib.import_module(found.name)
        for name, answer in answers.items():
            if hasattr(module, name) and found.name != "kernels.launch":
                setattr(module, name, answer)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def products(rows: int) -> None:
    """Of Qwen3-8B and Moonlight: FP8, BF16, and experts."""
    bf16, form, e = torch.bfloat16, Form(True, True), ENTRIES
    for n, k in ((6144, 4096), (24576, 4096)):
        operands = fp8(rows, k), fp8(n, k), torch.ones(rows, k // 128), torch.ones(n // 128, k // 128)
        e["gemm_partials"](*operands, out_dtype=bf16)
        e["gemm_swiglu"](*operands, form=Form(False, True), dtype=bf16)
        e["gemm_partials"](torch.zeros(rows, k, dtype=bf16), torch.zeros(64, k, dtype=bf16), out_dtype=bf16)
    experts, weights = torch.zeros(rows, 8, dtype=torch.int32), torch.ones(rows, 8)
    scales = torch.ones(rows, 16), torch.ones(4, 44, 16)
    for shared in (0, 2):
        e["expert_gemm"](fp8(rows, 2048), fp8(4, 5632, 2048), experts, *scales, out_dtype=bf16, shared=shared)
    scales = torch.ones(rows * 8, 22), torch.ones(4, 16, 22)
    e["expert_gemm"](fp8(rows * 8, 2816), fp8(4, 2048, 2816), experts, *scales, weights, out_dtype=bf16)
    e["add_up"](torch.zeros(4, rows, 4096), dtype=bf16)
    normed = torch.zeros(rows, 4096, dtype=bf16), [torch.zeros(4, rows, 4096)], torch.ones(4096, dtype=bf16), 1e-6, form
    e["add_norm"](*normed)
    if rows <= 32:
        e["add_norm_gate"](*normed, torch.zeros(256, 4096, dtype=bf16))
    e["swiglu"](torch.zeros(1, rows, 24576), form, dtype=bf16)
    e["act_quant"](normed[0])


def cached(rows: int, dtype: torch.dtype) -> None:
    """What writes and reads the KV cache: of Qwen3-8B, and MLA as in DeepSeek-V3."""
    bf16, form, e, seq_lens = torch.bfloat16, Form(True, True), ENTRIES, torch.ones(rows, dtype=torch.int32)
    block_table, slots = torch.zeros(rows, 4, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    norms = torch.ones(128), torch.ones(128)
    kv, shorter = (KV.zeros(8, page, widths=(128,) * 16, dtype=dtype, device="cpu", across=1024) for page in (64, 32))
    angles, q = torch.zeros(rows, 2, 64), torch.zeros(rows, 32, 128, dtype=bf16)
    wide, starts = torch.zeros(4, rows, 6144), (0, 4096, 5120)
    for norm, bias in ((norms, None), (None, torch.zeros(6144, dtype=bf16))):
        e["rope_heads"](wide, starts, norm, angles, slots, kv, heads=32, eps=1e-6, dtype=bf16, bias=bias)
    e["gather_kv"](kv, slots, dtype=bf16)
    e["gather_kv"](KV.zeros(8, 64, widths=(576,), dtype=bf16, device="cpu"), slots, dtype=bf16)
    for cache in (kv, shorter):  # pages of 32 tokens go by pointer on Hopper, too
        for window in (None, 100):
            e["gqa_decode"](q, cache, block_table, seq_lens, form, scale=0.1, kv_heads=8, window=window)
    angles, latents = torch.zeros(rows, 2, 32), KV.zeros(8, 64, widths=(512, 64), dtype=dtype, device="cpu")
    partials, absorb = torch.zeros(4, rows, 1536 + 576), torch.zeros(16, 512, 128, dtype=bf16)
    keep = Keep(1536, torch.ones(512), 1e-6, slots, latents)
    e["split_latents"](partials, torch.ones(1536), angles, keep, form, dtype=bf16, eps=1e-6)
    e["absorb_queries"](torch.zeros(2, rows, 16 * 192), absorb, angles, dtype=bf16)
    e["absorb_queries"](torch.zeros(2, rows, 16 * 192), absorb, angles, keep, dtype=bf16)
    q, expand = torch.zeros(rows, 16, 576, dtype=bf16), torch.zeros(16, 128, 512, dtype=bf16)
    e["mla_decode"](q, latents, block_table, seq_lens, expand, form, scale=0.1)


def prompts() -> None:
    bf16, attend = torch.bfloat16, attention.causal_attention
    for tokens in (100, 600):
        keys, queries = torch.zeros(600, 16, 192, dtype=bf16), torch.zeros(tokens, 16, 192, dtype=bf16)
        attend(queries, keys, keys[..., :128], Form(True, False), scale=0.1)
        for form in (Form(True, False), Form(False, True)):
            for window in (None, 100):
                attend(queries[..., :128].contiguous(), keys[..., :128], keys[..., 64:], form, scale=0.1, window=window)


def draws(rows: int) -> None:
    e, rule = ENTRIES, Routing(6, 1, 1, True, True, 2.5, 2)
    e["route"](torch.zeros(4, rows, 64), torch.zeros(64), rule)
    e["route"](torch.zeros(4, rows, 256), torch.zeros(256), Routing(8, 8, 4, True, True, 2.5, 1))
    integers, temperature = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.float64)
    e["draw_and_normaliser"](torch.zeros(rows, 151936), temperature, integers, integers)
    scores, reals = torch.zeros(rows, 151936), torch.ones(3, rows, dtype=torch.float64)
    e["penalise"](scores, scores.int(), scores, *reals, torch.ones(rows, dtype=torch.int64))
    e["cumulative"](torch.zeros(rows, 151936, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        e["survey"](torch.zeros(rows, 151936, dtype=dtype), temperature, integers, integers, integers)
    e["look_up"](integers, integers, torch.zeros(100, 4096, dtype=torch.bfloat16), torch.zeros(100, 2, 64))
    words, turn = torch.zeros(2, 4096, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    e["deliver"]((integers, temperature), (0, 128), words, turn)
    state = {"tokens": integers, "positions": integers, "lengths": integers.int(), "slots": integers, "turn": turn}
    e["advance"](integers, integers, torch.zeros(rows, 4, dtype=torch.int32), **state, page_size=64)


if __name__ == "__main__":
    pretend(int(sys.argv[1]), int(sys.argv[2]))
    ENTRIES["weight_quant"](torch.zeros(256, 256), scale_fmt="ue8m0")
    ENTRIES["weight_dequant"](fp8(256, 256), torch.ones(2, 2), dtype=torch.bfloat16)
    hopper = gemm.is_hopper(None)
    for rows in (1, 32, 300, *([100] if hopper else [])):  # tiles of products follow the rows
        products(rows)
    for cut in ((1, 1), (1, 2), (2, 1)) if hopper else ():
        operands = fp8(300, 2048), fp8(1024, 2048), torch.ones(300, 16), torch.ones(8, 16)
        sm90_specialized.specialized_product(*operands, torch.bfloat16, sm90_specialized.Cut(*cut))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        cached(70, dtype)
    prompts()
    draws(32)
