import pytest
import torch
from compare import assert_bits_equal
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.quant import e4m3 as quant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: Triton's interpreter
FORMATS = [None, "ue8m0"]


def awkward(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values over many binades, with zeros, ties of the E4M3 grid and a block of tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-12, 6, shape, generator=generator).float())
    x.view(-1)[::7] = 0
    x.view(-1)[3::11] = (x.view(-1)[3::11] * 16).round() / 16
    if shape[0] > 1:
        x[1] *= 1e-8
    return x


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (2, 3, 256)])
def test_act_quant_kernel_equals_its_twin_bit_by_bit(shape, scale_fmt):
    x = awkward(*shape)
    q, s = quant.act_quant(x.to(DEVICE), 128, scale_fmt)
    q_ref, s_ref = reference.act_quant(x, 128, scale_fmt)
    assert_bits_equal(s, s_ref)
    assert_bits_equal(q, q_ref)


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("shape", [(128, 128), (200, 130), (1, 128), (130, 1)])
def test_weight_quant_kernel_equals_its_twin_bit_by_bit_ragged_edges_included(shape, scale_fmt):
    w = awkward(*shape, seed=1)
    q, s = quant.weight_quant(w.to(DEVICE), 128, scale_fmt)
    q_ref, s_ref = reference.weight_quant(w, 128, scale_fmt)
    assert_bits_equal(s, s_ref)
    assert_bits_equal(q, q_ref)
    assert_bits_equal(
        quant.weight_dequant(q, s, dtype=torch.float32), reference.weight_dequant(q_ref, s_ref, dtype=torch.float32)
    )


@pytest.mark.parametrize("scale_fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_touches_no_other_block(bad, scale_fmt):
    x = awkward(3, 384)
    q_clean, s_clean = reference.act_quant(x, 128, scale_fmt)
    x[1, 130] = bad
    for quantise, at in ((reference.act_quant, "cpu"), (quant.act_quant, DEVICE)):
        q, s = (t.cpu() for t in quantise(x.to(at), 128, scale_fmt))
        assert not reference.act_dequant(q, s)[1, 130].isfinite()
        others = torch.ones(3, 3, dtype=torch.bool)
        others[1, 1] = False
        assert_bits_equal(s[others], s_clean[others])
        assert_bits_equal(*(codes.view(torch.uint8).unflatten(1, (3, 128))[others] for codes in (q, q_clean)))


def test_every_e4m3_code_survives_decode_and_encode():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # the two NaN
    values = codes.view(torch.float8_e4m3fn)
    row = torch.zeros(1, 256)
    row[0, : len(codes)] = values.float()
    decoded = quant.weight_dequant(
        row.to(torch.float8_e4m3fn).to(DEVICE), torch.ones(1, 2, device=DEVICE), dtype=torch.float32
    )
    assert_bits_equal(decoded, row)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=128, max_size=128))
@settings(max_examples=60, deadline=None)
def test_a_quantised_block_is_within_half_a_step_of_its_values(values):
    x = torch.tensor([values])
    q, s = kernels.act_quant(x)
    step = torch.maximum(x.abs() * 2.0**-4, s * 2.0**-10)  # half an E4M3 step: relative 2^-4, absolute below 2^-6
    assert ((kernels.act_dequant(q, s) - x).abs() <= step * (1 + 1e-5)).all()


def test_a_ue8m0_scale_is_the_smallest_power_of_two_that_holds_the_block():
    x = awkward(40, 256, seed=2)
    _, plain = kernels.act_quant(x)
    _, power = kernels.act_quant(x, scale_fmt="ue8m0")
    mantissa, _ = torch.frexp(power)
    assert (mantissa == 0.5).all() and (power >= plain).all() and (power < 2 * plain).all()


def test_block_scales_hold_precision_where_one_scale_per_tensor_would_not():
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(3))
    x[:, 7] *= 1e6  # an outlier channel: under one common scale the rest falls below E4M3's smallest value
    blocked = kernels.act_dequant(*kernels.act_quant(x))
    scale = x.abs().max() / 448
    tensorwide = (x / scale).to(torch.float8_e4m3fn).float() * scale
    quiet = slice(128, None)
    error = [((y - x)[:, quiet].norm() / x[:, quiet].norm()).item() for y in (blocked, tensorwide)]
    assert error[0] < 0.04 and error[1] > 0.5


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.act_quant(torch.zeros(2, 100)),
        lambda: kernels.act_quant(torch.zeros(2, 128), block_size=64),
        lambda: kernels.act_quant(torch.zeros(2, 128), scale_fmt="e5m2"),
        lambda: kernels.act_quant(torch.zeros(2, 128, dtype=torch.int32)),
        lambda: kernels.weight_dequant(torch.zeros(128, 128), torch.ones(1, 1), dtype=torch.float32),
        lambda: kernels.fp8_gemm(*[torch.zeros(2, 128)] * 4, out_dtype=torch.float32),
        lambda: kernels.fp8_gemm(
            fp8(2, 128), torch.ones(2, 1), fp8(128, 256).T, torch.ones(2, 1), out_dtype=torch.float32
        ),
    ],
)
def test_a_wrong_operand_is_refused_with_a_sentence(call):
    with pytest.raises(ValueError, match=r"\w+ .*"):
        call()
