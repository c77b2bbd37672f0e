"""Mixture of experts in Triton: which experts a row goes to, and in which order a product visits many rows' experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.forms import Routing
from kernels.launch import let_next_start, overlap, wait_for_previous


@triton.jit
def best_of(values, index, COUNT: tl.constexpr):
    """The largest value's place; of equals the lowest."""
    top = tl.max(values, axis=0)
    return tl.min(tl.where(values == top, index, COUNT), axis=0), top


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, experts_ptr, weights_ptr, scaling, logits_part, experts,
    PARTIALS: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, e, slot = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    real = e < experts
    if CORRECTED:
        bias = tl.load(bias_ptr + e, mask=real, other=0.0)
    wait_for_previous(PDL)
    let_next_start(PDL)  # late: products of experts that wait for the choice only hold places (see NOTES.md)
    logits = tl.zeros((BLOCK,), dtype=tl.float32)
    for p in tl.static_range(PARTIALS):
        logits += tl.load(logits_ptr + p * logits_part + row * experts + e, mask=real, other=0.0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        shifted = tl.where(real, logits - tl.max(tl.where(real, logits, float("-inf")), axis=0), float("-inf"))
        scores = tl.exp(shifted) / tl.sum(tl.exp(shifted), axis=0)
    choice = scores
    if CORRECTED:
        choice += bias
    # NaN chooses nothing: every number that comes out is an expert's, whatever came in
    choice = tl.where(real & (choice == choice), choice, float("-inf"))
    if GROUPS > 1:
        dropped = tl.full((BLOCK,), 1, dtype=tl.int1)
        standing = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)  # each expert's group's score
        for g in tl.static_range(GROUPS):
            member = e // GROUP == g
            at, best = best_of(tl.where(member, choice, float("-inf")), e, BLOCK)
            if CORRECTED and GROUP > 1:
                _, second = best_of(tl.where(member & (e != at), choice, float("-inf")), e, BLOCK)
                best += second
            standing = tl.where(member, best, standing)
        for _ in tl.static_range(KEPT_GROUPS):
            at, _top = best_of(tl.where(dropped & real, standing, float("-inf")), e, BLOCK)
            dropped = dropped & (e // GROUP != at // GROUP)
        choice = tl.where(dropped, float("-inf"), choice)
    chosen = tl.zeros((BLOCK_K,), dtype=tl.int32)
    weights = tl.zeros((BLOCK_K,), dtype=tl.float32)
    taken = tl.zeros((BLOCK,), dtype=tl.int1)
    for j in tl.static_range(TOP_K):
        at, _top = best_of(tl.where(taken, float("-inf"), choice), e, BLOCK)
        taken = taken | (e == at)
        chosen = tl.where(slot == j, at, chosen)
        weights = tl.where(slot == j, tl.sum(tl.where(e == at, scores, 0.0), axis=0), weights)
    if NORMALISED:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    out = row * (TOP_K + SHARED) + slot
    chosen = tl.where(slot < TOP_K, chosen, experts + slot - TOP_K)
    tl.store(experts_ptr + out, chosen, mask=slot < TOP_K + SHARED)
    tl.store(weights_ptr + out, tl.where(slot < TOP_K, weights * scaling, 1.0), mask=slot < TOP_K + SHARED)


def route(partials: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    count, rows, experts = partials.shape
    count_each = rule.top_k + rule.shared
    chosen = torch.empty(rows, count_each, dtype=torch.int32, device=partials.device)
    weights = torch.empty(rows, count_each, dtype=torch.float32, device=partials.device)
    if rows:
        route_kernel[(rows,)](
            partials, partials if bias is None else bias, chosen, weights, rule.scaling, partials.stride(0), experts,
            PARTIALS=count, SIGMOID=rule.sigmoid, CORRECTED=bias is not None,
            NORMALISED=rule.normalised, GROUPS=rule.groups, KEPT_GROUPS=rule.kept_groups,
            GROUP=experts // rule.groups, TOP_K=rule.top_k, SHARED=rule.shared, BLOCK=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(count_each), num_warps=1 if experts <= 128 else 4, **overlap(partials),
        )  # fmt: skip
    return chosen, weights
