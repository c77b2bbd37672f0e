"""One signature per op: contract, twin and Triton entry. And what importing the ops costs."""

import importlib
import inspect
import subprocess
import sys

import pytest

import kernels
from kernels import reference
from kernels.dispatch import TRITON

TORCH_EVERYWHERE = {"act_dequant", "rotate"}  # the contract calls the twin on every device
OWN_DEFINITION = {  # torch and other ops on every device, without a twin
    "draw", "draw_multinomial", "gumbel_noise", "has_fp8_units", "log_softmax", "one_after_another", "process_logits",
    "uniform_noise",
}  # fmt: skip
OPS = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))} - OWN_DEFINITION
FOR_TESTS = {"decode"}  # keyword of some Triton entries: takes the path of cards without FP8 units


def parameters(function) -> list[tuple]:
    """Names in order, what is keyword-only, and defaults."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in FOR_TESTS]


def test_every_op_has_a_twin_and_a_triton_entry():
    assert set(TRITON) == OPS - TORCH_EVERYWHERE
    assert all(hasattr(reference, op) for op in OPS)


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_ops_contract_twin_and_triton_entry_have_one_signature(op):
    contract = parameters(getattr(kernels, op))
    assert parameters(getattr(reference, op)) == contract, "the twin"
    if op in TRITON:
        assert parameters(getattr(importlib.import_module(TRITON[op]), op)) == contract, "the Triton entry"


def test_neither_importing_the_ops_nor_running_twins_imports_triton():
    code = (
        "import sys, torch, kernels; before = 'triton' in sys.modules\n"
        "q, s = kernels.act_quant(torch.randn(2, 128)); w, t = kernels.weight_quant(torch.randn(128, 128))\n"
        "kernels.fp8_gemm(q, s, w, t, out_dtype=torch.float32)\n"
        "one = torch.ones(2, dtype=torch.float64)\n"
        "kernels.draw(torch.randn(2, 9), one, torch.arange(2), torch.arange(2))\n"
        "assert not before and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=kernels.__path__[0] + "/..")
