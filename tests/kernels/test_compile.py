"""Cards that are not at hand: every kernel compiles for them and fits their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes of shared memory that one program may have, by compute capability (CUDA programming guide, table of limits)
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
KERNELS = {
    "absorb", "act_quant", "add_norm", "add_up", "advance", "causal_attention", "decode_attention", "draw",
    "expand_latents", "join_draw", "join_heads", "join_parts", "join_survey", "narrow_gemm", "rope_heads", "route",
    "split_latents", "survey", "swiglu", "weight_dequant", "weight_quant", "wide_gemm",
}  # fmt: skip


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    """One process for each card, all at once; none of them finds anything compiled before."""
    script = Path(__file__).with_name("compile_for.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {}
    for capability in SHARED:
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
        command = [sys.executable, str(script), str(capability), str(SHARED[capability])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(environment)}
        processes[capability] = subprocess.Popen(command, **pipes)
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits_the_shared_memory_of(capability, compiling):
    out, errors = compiling[capability].communicate(timeout=400)
    assert compiling[capability].returncode == 0, errors[-2000:]
    compiled = [json.loads(line) for line in out.splitlines()]
    newer = {90: {"tma_gemm", "specialized_gemm"}, 120: {"tma_gemm"}}
    assert {line["kernel"].removesuffix("_kernel") for line in compiled} == KERNELS | newer.get(capability, set())
    largest = max(compiled, key=lambda line: line["shared"])
    assert largest["shared"] <= SHARED[capability], largest
