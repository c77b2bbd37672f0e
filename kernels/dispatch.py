"""Where each op is computed: a CUDA tensor goes to Triton, any other to the torch twin of the same name.

Triton is imported on first use, so that a machine without it can still run the twins. Where an op has several forms,
its Triton entry is in a `choose.py`, which alone says which of them runs on which card and for how many rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from kernels import reference

TRITON = {  # op -> the module of its entry, which has the op's name
    "absorb_queries": "kernels.rope.latents",
    "act_quant": "kernels.quant.e4m3",
    "add_norm": "kernels.norm.add_norm",
    "add_norm_gate": "kernels.norm.choose",
    "add_up": "kernels.gemm.add_up",
    "advance": "kernels.stepping.step",
    "causal_attention": "kernels.attention.choose",
    "cumulative": "kernels.sampling.cumulative",
    "deliver": "kernels.stepping.step",
    "draw_and_normaliser": "kernels.sampling.draw",
    "expert_gemm": "kernels.gemm.choose",
    "formed": "kernels.quant.e4m3",
    "fp8_gemm": "kernels.gemm.choose",
    "gather_kv": "kernels.attention.gather",
    "gemm_partials": "kernels.gemm.choose",
    "gemm_swiglu": "kernels.gemm.choose",
    "gqa_decode": "kernels.attention.choose",
    "look_up": "kernels.stepping.step",
    "mla_decode": "kernels.attention.choose",
    "penalise": "kernels.sampling.penalties",
    "plain_gemm": "kernels.gemm.choose",
    "rope_heads": "kernels.rope.heads",
    "route": "kernels.moe.route",
    "split_latents": "kernels.rope.latents",
    "survey": "kernels.sampling.survey",
    "swiglu": "kernels.norm.swiglu",
    "weight_dequant": "kernels.quant.e4m3",
    "weight_quant": "kernels.quant.e4m3",
}


def implementation(op: str, tensor: torch.Tensor) -> Callable:
    """The function that computes `op` on this tensor's device."""
    return getattr(importlib.import_module(TRITON[op]) if tensor.is_cuda else reference, op)
