import pytest
import torch
from compare import assert_bits_equal, assert_close

import kernels
from kernels import Form, reference, tune
from kernels.gemm import choose as gemm
from kernels.gemm import narrow, tma, tuned
from kernels.gemm import sm90_specialized as specialized
from kernels.gemm import sm90_streamed as streamed
from kernels.norm.swiglu import swiglu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # cpu: Triton's interpreter, hence tiny shapes there
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
hopper = pytest.mark.skipif(CUDA and not HOPPER, reason="only cards of sm_90 have these instructions")
INTERPRETED = [(1, 64, 128), (3, 100, 256), (17, 130, 128), (16, 160, 384)]
ISSUE = [(m, n, k) for m in (1, 2, 3, 16, 63, 129, 1000) for n in (64, 576, 1000, 4096) for k in (128, 512, 4096)]


def operands(m: int, n: int, k: int):
    generator = torch.Generator().manual_seed(m * n + k)
    a = torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator) * 4
    b = torch.randn(n, k, generator=generator) * 0.05
    return [t.to(DEVICE) for t in (*reference.act_quant(a, 128, None), *reference.weight_quant(b, 128, None))]


def exact_product(a, a_s, b, b_s) -> torch.Tensor:
    return reference.act_dequant(a, a_s, 128).double() @ reference.weight_dequant(b, b_s, dtype=torch.float64).T


@pytest.mark.parametrize(("m", "n", "k"), ISSUE if CUDA else INTERPRETED)
@pytest.mark.parametrize("decode", [False, True], ids=["fp8-units", "decode-in-kernel"])
def test_fp8_gemm_kernel_multiplies_its_dequantised_operands(m, n, k, decode):
    a, a_s, b, b_s = operands(m, n, k)
    exact = exact_product(a, a_s, b, b_s)
    out = gemm.fp8_gemm(a, a_s, b, b_s, out_dtype=torch.float32, decode=decode)
    assert_close(out, exact, "fp8 unit" if CUDA and not decode else "float32")
    if CUDA:
        assert_close(gemm.fp8_gemm(a, a_s, b, b_s, out_dtype=torch.bfloat16, decode=decode), exact, "bfloat16")


@pytest.mark.parametrize(("m", "n", "k"), [(33, 576, 512), (300, 1000, 1024)] if CUDA else [(33, 130, 256)])
@pytest.mark.parametrize("tile", [tma.Tile(64, 128, 1, 3), tma.Tile(64, 64, 2, 4)], ids=["whole K", "K cut"])
def test_a_product_of_copied_tiles_multiplies_its_dequantised_operands(m, n, k, tile):
    if CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor memory accelerator on this card")
    ops = operands(m, n, k)
    a, a_s, b, b_s = ops
    partials = tma.tma_product(a, b, a_s, b_s, torch.float32, tile)
    assert len(partials) == tile.splits
    assert_close(gemm.add_up(partials, dtype=torch.float32), exact_product(*ops), "fp8 unit" if CUDA else "float32")


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [(257, 136, 128, 1)]
    + [(m, n, k, splits) for m, n, k in ((300, 1000, 384), (1000, 64, 4096), (513, 576, 7168)) for splits in (1, 3)],
)
@pytest.mark.parametrize("programs", [None, 3], ids=["each its tile", "several tiles in turn"])
@pytest.mark.parametrize("wide", [1, 2])
def test_a_product_of_warps_with_roles_multiplies_its_dequantised_operands(m, n, k, programs, splits, wide):
    """Gluon has no interpreter: this kernel is shown to compile without a card, and to be right only on one."""
    ops = operands(m, n, k)
    a, a_s, b, b_s = ops
    cut = specialized.Cut(wide, splits)
    out, again = (specialized.specialized_product(a, b, a_s, b_s, torch.bfloat16, cut, programs) for _ in range(2))
    assert len(out) == splits and torch.equal(out, again)
    exact = exact_product(*ops)
    assert_close(gemm.add_up(out, dtype=torch.float32), exact, "bfloat16" if splits == 1 else "fp8 unit")


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("m", "inner", "k"), [(100, 128, 384), (300, 640, 128), (513, 1152, 1024)])
@pytest.mark.parametrize("programs", [None, 3], ids=["each its tile", "several tiles in turn"])
def test_swiglu_at_the_end_of_a_product_has_the_bits_of_swiglu_behind_it(m, inner, k, programs):
    a, a_s, b, b_s = operands(m, 2 * inner, k)
    out = specialized.specialized_swiglu(a, b, a_s, b_s, torch.bfloat16, programs)
    both = specialized.specialized_product(a, b, a_s, b_s, torch.bfloat16)
    after = swiglu(both, Form(plain=False, fp8=True), dtype=torch.bfloat16)
    assert out.plain is None and torch.equal(out.s, after.s)
    assert torch.equal(out.q.view(torch.uint8), after.q.view(torch.uint8))


@pytest.mark.parametrize("rows", [2, 40, 300] if CUDA else [2, 40])
def test_a_gated_product_is_swiglu_of_the_product(rows):
    a, a_s, b, b_s = operands(rows, 256, 128)
    given = [t.cpu() for t in (a, b, a_s, b_s)]
    ref = reference.gemm_swiglu(*given, form=Form(plain=True, fp8=False), dtype=torch.float32).plain
    out = gemm.gemm_swiglu(a, b, a_s, b_s, form=Form(plain=True, fp8=False), dtype=torch.float32).plain
    assert_close(out, ref, "fp8 unit" if CUDA else "float32")


def test_a_gated_product_refuses_halves_that_are_no_whole_blocks():
    a, a_s, b, b_s = (t.cpu() for t in operands(2, 192, 128))
    with pytest.raises(ValueError, match="two multiples of 128"):
        kernels.gemm_swiglu(a, b, a_s, b_s, form=Form(plain=True, fp8=False), dtype=torch.float32)


@pytest.mark.parametrize("k_blocks", [1, 2, 32, 96])
def test_a_product_of_many_rows_falls_into_units_that_keep_half_of_the_card_busy_or_is_none(k_blocks):
    assert specialized.cut_for(64, 24576, k_blocks, 132) is None
    for rows in (65, 128, 256, 1000, 4096):
        for n in (128, 4096, 6144, 24576):
            if cut := specialized.cut_for(rows, n, k_blocks, 132):
                units = specialized.tiles_of(rows, n, cut.wide) * cut.splits
                assert units > 58 and (cut.splits == 1 or (units <= 132 and k_blocks >= 32))
    assert specialized.cut_for(4096, 4096, k_blocks, 132) == specialized.WHOLE


def test_a_piece_of_k_without_a_block_is_refused():
    a, a_s, b, b_s = (t.cpu() for t in operands(2, 192, 128))
    with pytest.raises(ValueError, match="every piece needs a block"):
        specialized.specialized_product(a, b, a_s, b_s, torch.bfloat16, specialized.Cut(1, 2), programs=4)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 128), (3, 136, 640), (16, 576, 1536), (17, 1000, 512), (32, 130, 4096)]
)
@pytest.mark.parametrize("tile", [(1, 2, 2), (1, 2, 6), (2, 1, 3), (3, 2, 2)], ids=lambda t: "x".join(map(str, t)))
def test_a_product_whose_weight_comes_early_multiplies_its_dequantised_operands(m, n, k, tile):
    """Gluon has no interpreter, as above."""
    ops = operands(m, n, k)
    a, a_s, b, b_s = ops
    tile = streamed.Tile(*tile, 16 if m <= 16 else 32)
    partials = streamed.streamed(a, b, a_s, b_s, torch.bfloat16, tile=tile)
    assert len(partials) == tile.splits
    wider = a.view(torch.uint8).repeat(1, 2).view(a.dtype)[:, :k]  # rows that do not lie close
    assert torch.equal(streamed.streamed(wider, b, a_s, b_s, torch.bfloat16, tile=tile), partials)
    exact = exact_product(*ops)
    assert_close(gemm.add_up(partials, dtype=torch.float32), exact, "bfloat16" if tile.splits == 1 else "fp8 unit")
    if tile.splits == 1:  # the same sums in the same order as by the other kernel
        other = narrow.narrow(a, b, a_s, b_s, tile=narrow.Tile(64, 1, 4, 3, 2))
        assert torch.equal(partials, other.to(torch.bfloat16))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize(("n", "k"), [(200, 128), (576, 1408), (128, 2176)])
@pytest.mark.parametrize("weighted", [False, True])
def test_products_of_experts_by_copies_have_the_bits_of_those_by_pointers(rows, n, k, weighted):
    torch.manual_seed(n)
    experts = torch.stack([torch.randperm(7)[:3] for _ in range(rows)]).int().to(DEVICE)
    a, a_s, b, b_s = operands(3 * rows if weighted else rows, 7 * n, k)
    b, b_s = b.unflatten(0, (7, n)), torch.rand(7, -(-n // 128), k // 128, device=DEVICE)
    weights = torch.rand(rows, 3, device=DEVICE) if weighted else None
    out = streamed.streamed(a, b, a_s, b_s, torch.bfloat16, experts, weights)
    assert torch.equal(out, narrow.narrow(a, b, a_s, b_s, experts, weights))


@pytest.mark.parametrize("choices", [1, 8, 256])
@pytest.mark.parametrize(("n", "k_blocks"), [(2816, 16), (2048, 11), (128, 1), (1024, 56)])
def test_programs_of_experts_have_room_beside_each_other(choices, n, k_blocks):
    tile = streamed.expert_tile(choices, n, k_blocks, 132, 232448)
    together = min(-(-n // streamed.BLOCK_N * choices) // 132, streamed.WAVE)
    each = tile.stages * tile.chunk * (streamed.BLOCK_N + 16) * 128 + streamed.RESERVED
    assert tile.splits == 1 and max(together, 1) * each <= 232448


@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (6144, 4096), (24576, 4096), (4096, 12288), (1024, 3072), (64, 128)]
)
def test_how_k_is_cut_does_not_follow_the_rows(n, k):
    tiles = [streamed.streamed_tile(rows, n, k // 128, 132, 232448) for rows in (1, 2, 16, 17, 32)]
    assert len({tile.splits for tile in tiles}) == 1
    for tile in tiles:
        ring = tile.stages * tile.chunk * (streamed.BLOCK_N + tile.block_m) * 128
        assert 1 <= tile.stages * tile.chunk <= max(2, streamed.MOST_BLOCKS)
        assert ring <= 232448


def test_a_product_comes_early_only_where_its_scales_have_room():
    assert streamed.streams(128)
    assert not streamed.streams(100)
    assert not streamed.streams(2 * streamed.LONGEST_K)
    tile = streamed.streamed_tile(32, 16384, streamed.LONGEST_K // 128, 132, 232448)
    scales = streamed.LONGEST_K // 128 * 32 * 4
    assert scales + tile.stages * tile.chunk * (streamed.BLOCK_N + 32) * 128 <= 232448 - 1024


def test_a_tuned_tile_is_taken_as_far_as_the_card_has_room():
    line = tuned.Tuned("sm_90", 4096, 4096, 4, 8, 4, 5.0, 6.0)
    few, many = (streamed.streamed_tile(rows, 4096, 32, 132, 232448, line) for rows in (1, 32))
    assert few.splits == many.splits == 4
    assert (few.stages * few.chunk, many.stages * many.chunk) == (8, 4)
    tight = streamed.streamed_tile(32, 4096, 32, 132, 60000, line._replace(blocks_32=16))
    assert tight.stages * tight.chunk * (streamed.BLOCK_N + 32) * 128 <= 60000


def test_the_table_of_tiles_holds_what_kernels_can_do(tmp_path):
    lines = tuned.read_table()
    for (card, n, k), line in lines.items():
        assert card == "sm_90" and n % 128 == 0 and streamed.streams(k)
        assert line in {c._replace(blocks_16=line.blocks_16, blocks_32=line.blocks_32, us_1=line.us_1, us_32=line.us_32)
                        for c in tune.candidates(card, n, k)}  # fmt: skip
        assert 0 < line.us_1 <= line.us_32 * 1.1
    tuned.write_table(lines.values(), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == tuned.TABLE.read_bytes()


def test_tuning_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune", "--model", "256", "2", "1", "128", "0"])
    assert tune.main() == 2
    assert "no such card" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["tune", "--model", "200", "2", "1", "128", "0"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "multiples of 128" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_finds_lines_for_a_layer_or_leaves_the_rule():
    shape = tune.Shape(512, 8, 2, 128, 1024)
    assert all(line[1:3] in shape.weights() and line.splits in tune.SPLITS for line in tune.tune("sm_90", shape))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (63, 576, 512), (129, 1000, 4096)])
def test_the_fp8_gemm_twin_multiplies_its_dequantised_operands(m, n, k):
    ops = [t.cpu() for t in operands(m, n, k)]
    assert_close(reference.fp8_gemm(*ops, out_dtype=torch.float32), exact_product(*ops), "float32")


@pytest.mark.parametrize("shape", [(1, 40, 96), (5, 33, 130), (20, 64, 64)])
def test_plain_gemm_kernel_equals_its_twin(shape):
    m, n, k = shape
    a, b = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    assert_close(gemm.plain_gemm(a, b, out_dtype=torch.float32), a.double() @ b.double().T, "float32")


@pytest.mark.parametrize("rows", [2, 3, 16, 17, 32])
@pytest.mark.parametrize("n", [512, 130])
def test_a_row_of_an_fp8_product_has_the_same_bits_alone_and_in_company(rows, n):
    a, a_s, b, b_s = operands(rows, n, 512)
    experts = torch.stack([torch.arange(2)] * rows).int().to(DEVICE)
    weights, scales = (torch.stack([t, t]) for t in (b.view(torch.uint8), b_s))
    weights = weights.view(b.dtype)
    together = kernels.fp8_gemm(a, a_s, b, b_s, out_dtype=torch.float32)
    chosen = kernels.expert_gemm(a, weights, experts, a_s, scales, out_dtype=torch.float32)
    for row in range(rows):
        one = slice(row, row + 1)
        assert_bits_equal(kernels.fp8_gemm(a[one], a_s[one], b, b_s, out_dtype=torch.float32), together[one])
        alone = kernels.expert_gemm(a[one], weights, experts[one], a_s[one], scales, out_dtype=torch.float32)
        assert_bits_equal(alone, chosen[one])


@pytest.mark.parametrize("rows", [2, 3, 16, 17, 32])
@pytest.mark.parametrize(("n", "k"), [(512, 512), (130, 128), (33, 130), (5, 33)])
def test_a_row_of_a_plain_product_has_the_same_bits_alone_and_in_company(rows, n, k):
    """Wherever it lies in memory."""
    a, b = torch.randn(rows, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    together = kernels.plain_gemm(a, b, out_dtype=torch.float32)
    shifted = torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape)
    for row in range(rows):
        one = slice(row, row + 1)
        for alone in (a[one], a[one].clone(), shifted[one]):
            assert_bits_equal(kernels.plain_gemm(alone, b, out_dtype=torch.float32), together[one])


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "plain"])
@pytest.mark.parametrize(("rows", "share"), [(3, True), (2, False), (40, True), (34, False)])
def test_expert_gemm_kernels_take_each_row_to_the_experts_it_chose(rows, share, fp8):
    torch.manual_seed(rows)
    experts, count, n, k = torch.stack([torch.randperm(5)[:2] for _ in range(rows)]).int(), rows * 2, 130, 128
    a, a_s, b, b_s = operands(rows if share else count, 5 * 256, k)
    b, b_s = b.view(5, 256, k)[:, :n].contiguous(), b_s.view(5, 2, 1)
    if not fp8:
        a, b = reference.act_dequant(a, a_s, 128), torch.randn(5, n, k, device=DEVICE)
        a_s = b_s = None
    weights = torch.rand(rows, 2)
    given = [None if t is None else t.cpu() for t in (a, b, experts, a_s, b_s, weights)]
    ref = reference.expert_gemm(*given, out_dtype=torch.float32)
    there = [None if t is None else t.to(DEVICE) for t in given]
    out = gemm.expert_gemm(*there, out_dtype=torch.float32)
    assert_close(out, ref, "fp8 unit" if fp8 and CUDA else "float32")


def test_partial_sums_of_a_long_k_add_up_to_the_product():
    a, a_s, b, b_s = operands(2, 64, 2048)
    partials = gemm.gemm_partials(a, b, a_s, b_s, out_dtype=torch.bfloat16)
    assert len(partials) > 1 and partials.dtype == torch.float32
    assert_close(
        gemm.add_up(partials, dtype=torch.float32), exact_product(a, a_s, b, b_s), "fp8 unit" if CUDA else "float32"
    )
