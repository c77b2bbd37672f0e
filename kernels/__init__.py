"""The ops: tensors in, tensors out. A CUDA tensor goes to Triton, any other to the torch twin (see `dispatch.py`).

Each family's `contract.py` says what its ops take and give and raises the errors; `reference.py` says in torch what
each one computes. Importing this package does not import Triton.

On a card an op may read some of its inputs before the ops before it have ended (see `launch.py`): weights, their scales
and norms; `seq_lens` and `block_table`; of the cache of `gqa_decode` and `mla_decode` all pages but each row's newest;
`temperature`, `seeds` and `positions`; `experts` of `expert_gemm` with weights. None of these may be what an op wrote,
unless work of torch's own began after it; `experts` also where another `expert_gemm`, without weights, lies between
`route` and the one that reads them.
"""

from __future__ import annotations

import importlib

from kernels.attention.contract import causal_attention, gather_kv, gqa_decode, mla_decode
from kernels.forms import FP8_MAX, INVARIANT_ROWS, KV, SCORED, SHOWN, SURVEYED, Form, Formed, Keep, Routing, Survey
from kernels.gemm.contract import add_up, expert_gemm, fp8_gemm, gemm_partials, gemm_swiglu, plain_gemm
from kernels.moe.contract import route
from kernels.norm.contract import add_norm, add_norm_gate, swiglu
from kernels.quant.contract import act_dequant, act_quant, formed, weight_dequant, weight_quant
from kernels.reference import has_fp8_units
from kernels.rope.contract import absorb_queries, rope_heads, rotate, split_latents
from kernels.sampling.contract import cumulative, draw, draw_and_normaliser, survey
from kernels.sampling.filters import draw_multinomial, log_softmax, process_logits
from kernels.sampling.noise import gumbel_noise, uniform_noise
from kernels.stepping.contract import advance, deliver, look_up

__all__ = [
    "FP8_MAX",
    "INVARIANT_ROWS",
    "KV",
    "SCORED",
    "SHOWN",
    "SURVEYED",
    "Form",
    "Formed",
    "Keep",
    "Routing",
    "Survey",
    "absorb_queries",
    "act_dequant",
    "act_quant",
    "add_norm",
    "add_norm_gate",
    "add_up",
    "advance",
    "causal_attention",
    "cumulative",
    "deliver",
    "draw",
    "draw_and_normaliser",
    "draw_multinomial",
    "expert_gemm",
    "formed",
    "fp8_gemm",
    "gather_kv",
    "gemm_partials",
    "gemm_swiglu",
    "gqa_decode",
    "gumbel_noise",
    "has_fp8_units",
    "log_softmax",
    "look_up",
    "mla_decode",
    "one_after_another",
    "plain_gemm",
    "process_logits",
    "rope_heads",
    "rotate",
    "route",
    "split_latents",
    "survey",
    "swiglu",
    "uniform_noise",
    "weight_dequant",
    "weight_quant",
]


def one_after_another():
    """A context in which kernels on a card don't overlap, so that a profile shows each one's own time."""
    return importlib.import_module("kernels.launch").one_after_another()
