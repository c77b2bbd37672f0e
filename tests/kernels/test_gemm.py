import pytest
import torch
from compare import assert_bits_equal, assert_close

import kernels
from kernels import attention, gemm, norm, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # cpu: Triton's interpreter, hence tiny shapes there
INTERPRETED = [(1, 64, 128), (3, 100, 256), (17, 130, 128), (16, 160, 384)]
ISSUE = [(m, n, k) for m in (1, 2, 3, 16, 63, 129, 1000) for n in (64, 576, 1000, 4096) for k in (128, 512, 4096)]


def operands(m: int, n: int, k: int):
    generator = torch.Generator().manual_seed(m * n + k)
    a = torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator) * 4
    b = torch.randn(n, k, generator=generator) * 0.05
    return [t.to(DEVICE) for t in (*reference.act_quant(a, 128, None), *reference.weight_quant(b, 128, None))]


def exact_product(a, a_s, b, b_s) -> torch.Tensor:
    return reference.act_dequant(a, a_s, 128).double() @ reference.weight_dequant(b, b_s, 128, torch.float64).T


@pytest.mark.parametrize(("m", "n", "k"), ISSUE if CUDA else INTERPRETED)
@pytest.mark.parametrize("decode", [False, True], ids=["fp8-units", "decode-in-kernel"])
def test_fp8_gemm_kernel_multiplies_its_dequantised_operands(m, n, k, decode):
    a, a_s, b, b_s = operands(m, n, k)
    exact = exact_product(a, a_s, b, b_s)
    out = gemm.fp8_gemm(a, a_s, b, b_s, torch.float32, decode=decode)
    assert_close(out, exact, "fp8 unit" if CUDA and not decode else "float32")
    if CUDA:
        assert_close(gemm.fp8_gemm(a, a_s, b, b_s, torch.bfloat16, decode=decode), exact, "bfloat16")


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (63, 576, 512), (129, 1000, 4096)])
def test_the_fp8_gemm_twin_multiplies_its_dequantised_operands(m, n, k):
    ops = [t.cpu() for t in operands(m, n, k)]
    assert_close(reference.fp8_gemm(*ops, torch.float32), exact_product(*ops), "float32")


@pytest.mark.parametrize("shape", [(1, 40, 96), (5, 33, 130), (20, 64, 64)])
def test_plain_gemm_kernel_equals_its_twin(shape):
    m, n, k = shape
    a, b = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    assert_close(gemm.plain_gemm(a, b, torch.float32), a.double() @ b.double().T, "float32")


def test_batched_gemm_kernel_takes_transposed_views():
    a, b = torch.randn(4, 3, 64, device=DEVICE).transpose(0, 1), torch.randn(3, 40, 64, device=DEVICE)
    assert_close(gemm.plain_gemm(a, b, torch.float32), a.double() @ b.double().mT, "float32")


def ragged_cache(heads=3, value_dim=32, rope=16, page=16):
    lengths = torch.tensor([1, page, 2 * page + 5], dtype=torch.int32)
    pages = torch.tensor([[5, 0, 0], [2, 0, 0], [1, 4, 3]], dtype=torch.int32)
    cache = torch.full((6, page, value_dim + rope), float("nan"))  # poison: only what a row wrote may be read
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            cache[pages[row, t // page], t % page] = torch.randn(value_dim + rope)
    return torch.randn(3, heads, value_dim + rope), cache, pages, lengths


def test_mla_decode_kernel_equals_its_twin_on_ragged_paged_rows():
    q, cache, pages, lengths = ragged_cache()
    ref = reference.mla_decode(q, cache, pages, lengths, 0.2, 32)
    out = attention.mla_decode(*(t.to(DEVICE) for t in (q, cache, pages, lengths)), 0.2, 32)
    assert_close(out, ref, "float32")


def test_rms_norm_kernel_equals_its_twin_on_a_slice_of_a_wider_row():
    x, w = torch.randn(5, 200)[:, :130], torch.rand(130)
    assert_close(norm.rms_norm(x.to(DEVICE), w.to(DEVICE), 1e-6), reference.rms_norm(x, w, 1e-6), "float32")


@pytest.mark.parametrize("rows", [2, 3, 16])
def test_a_row_of_a_product_has_the_same_bits_alone_and_in_company(rows):
    a, a_s, b, b_s = operands(rows, 512, 512)
    together = kernels.fp8_gemm(a, a_s, b, b_s, out_dtype=torch.float32) if CUDA else None
    plain = reference.act_dequant(a, a_s, 128)
    weight = reference.weight_dequant(b, b_s, 128, torch.float32)
    plain_together = kernels.plain_gemm(plain, weight, out_dtype=torch.float32)
    for row in range(rows):
        one = slice(row, row + 1)
        assert_bits_equal(kernels.plain_gemm(plain[one], weight, out_dtype=torch.float32), plain_together[one])
        if CUDA:
            assert_bits_equal(kernels.fp8_gemm(a[one], a_s[one], b, b_s, out_dtype=torch.float32), together[one])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 3, 16), (18, 1, 48)])
def test_gqa_decode_kernel_equals_its_twin_on_ragged_paged_rows(heads, kv_heads, dim):
    torch.manual_seed(1)
    rows, page = 3, 16
    lengths = torch.tensor([1, 16, 37], dtype=torch.int32)
    pages = torch.randperm(9).view(rows, 3).int()
    cache = torch.randn(9, page, 2 * kv_heads * dim)
    q = torch.randn(rows, heads, dim)
    ref = reference.gqa_decode(q, cache, pages, lengths, 0.2, kv_heads)
    out = attention.gqa_decode(*(t.to(DEVICE) for t in (q, cache, pages, lengths)), 0.2, kv_heads)
    assert_close(out, ref, "float32")
    plain = torch.nn.functional.scaled_dot_product_attention(
        q[2][:, None],
        *cache[pages[2]].flatten(0, 1)[:37].unflatten(-1, (2, kv_heads, dim)).permute(1, 2, 0, 3),
        scale=0.2,
        enable_gqa=True,
    )
    assert_close(ref[2], plain[:, 0], "float32")
