"""The fewest bytes that a decode step must move, by family of kernels: what the bench holds times against."""

from __future__ import annotations

import torch

from playground.engine.cache import token_bytes
from playground.model.attention import LatentAttention
from playground.model.layers import Product
from playground.model.moe import Gate
from playground.model.transformer import Transformer

# Kernels by what they do, as their names begin. But for a gate, the last family moves next to nothing: it is latency.
FAMILIES = {
    "products": ("streamed_gemm", "narrow_gemm", "tma_gemm", "wide_gemm", "specialized_gemm"),
    "attention": (
        "streamed_attention", "streamed_latent", "gqa_decode", "join_heads", "mla_decode", "join_partials",
        "expand_latents", "absorb", "causal_attention", "specialized_attention",
    ),
    "drawing": (
        "draw", "join_draw", "survey", "join_survey", "sum_tiles", "cumulative", "penalise", "deliver", "advance",
    ),
    "between": (
        "add_norm", "swiglu", "rope_heads", "split_latents", "route", "schedule", "add_up", "act_quant", "gather",
        "copy_rows", "look_up",
    ),
}  # fmt: skip


def family_of(kernel: str) -> str:
    """Of a kernel's name; what torch launches is "torch"."""
    found = [family for family, names in FAMILIES.items() if kernel.startswith(tuple(f"{n}_kernel" for n in names))]
    return found[0] if found else "torch"


def prompts_alone(model: Transformer) -> set[int]:
    """`id` of the products that only a prompt asks for: decode has absorbed them."""
    return {id(part.expand_latent) for part in model.modules() if isinstance(part, LatentAttention)}


def step_bytes(model: Transformer, rows: int, length: int, cache_dtype: torch.dtype) -> dict[str, float]:
    """By family: every weight that a step uses, once; the cache of each row, `length` tokens, and what MLA absorbs;
    the logits, once."""
    c = model.config
    prefill = prompts_alone(model)
    products, attention, between = model.lm_head.weight.nbytes, rows * length * token_bytes(c, cache_dtype), 0
    for part in model.modules():
        if isinstance(part, LatentAttention):  # in the form that decode absorbs
            attention += part.absorb_keys.nbytes + part.absorb_values.nbytes
        elif isinstance(part, Gate):  # multiplied by the norm before it
            between += part.weight.nbytes
        elif isinstance(part, Product) and part.multiplied and part.weight is not None and id(part) not in prefill:
            products += _product_bytes(part, model, rows)
    return {"products": products, "attention": attention, "between": between, "drawing": rows * c.vocab_size * 4}


def _product_bytes(part: Product, model: Transformer, rows: int) -> float:
    size = part.weight.nbytes + (part.scale.nbytes if part.fp8 else 0)
    size = size if part.decoded is None else part.decoded.nbytes  # what a CPU reads
    if len(part.stacks) > 1:  # experts: those that at least one of the rows is expected to choose
        moe = model.config.moe
        missed = (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** rows
        size *= (moe.n_routed_experts * (1 - missed) + part.spare) / len(part.weight)
    return size
