"""Cards that are not at hand: every kernel compiles for them and fits their shared memory."""

import json

import pytest

KERNELS = {
    "absorb", "act_quant", "add_norm", "add_up", "advance", "causal_attention", "copy_rows", "cumulative", "deliver",
    "draw", "expand_latents", "gather", "gqa_decode", "join_draw", "join_heads", "join_partials", "join_survey",
    "look_up", "mla_decode", "narrow_gemm", "penalise", "rope_heads", "route", "schedule", "split_latents",
    "sum_tiles", "survey", "swiglu", "weight_dequant", "weight_quant", "wide_gemm",
}  # fmt: skip
NEWER = {
    90: {
        "tma_gemm",
        "specialized_attention",
        "specialized_gemm",
        "streamed_attention",
        "streamed_gemm",
        "streamed_latent",
    },
    120: {"tma_gemm"},
}


@pytest.mark.parametrize(  # the oldest and the newest kind of kernels; the others take as long again
    "capability", [80, pytest.param(89, marks=pytest.mark.long), 90, pytest.param(120, marks=pytest.mark.long)]
)
def test_every_kernel_compiles_and_fits_the_shared_memory_of(capability, compiling):
    process, shared = compiling[capability]
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-2000:]
    compiled = [json.loads(line) for line in out.splitlines()]
    assert {line["kernel"].removesuffix("_kernel") for line in compiled} == KERNELS | NEWER.get(capability, set())
    largest = max(compiled, key=lambda line: line["shared"])
    assert largest["shared"] <= shared, largest
