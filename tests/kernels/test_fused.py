"""The ops between products, each against its twin: Triton on a card, or in its interpreter on tiny shapes."""

import pytest
import torch
from compare import assert_bits_equal, assert_close

import kernels
from kernels import KV, Form, Formed, Keep, Routing, reference
from kernels.attention import choose as attention
from kernels.attention import spans
from kernels.attention.gather import gather_kv
from kernels.moe.route import route
from kernels.moe.schedule import schedule
from kernels.norm.add_norm import add_norm
from kernels.norm.choose import add_norm_gate
from kernels.norm.swiglu import swiglu
from kernels.quant import e4m3
from kernels.rope.heads import rope_heads
from kernels.rope.latents import absorb_queries, split_latents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CACHES = {"plain": torch.float32, "fp8": torch.float8_e4m3fn}
FORMS = {"plain": Form(True, False), "fp8": Form(False, True), "both, powers of two": Form(True, True, True)}


def to(device: str, *tensors):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def assert_formed(out: Formed, ref: Formed) -> None:
    """Plain values to float32's accuracy; codes where they differ at all, by one step of a few values."""
    assert [t is None for t in out] == [t is None for t in ref]
    if ref.plain is not None:
        assert_close(out.plain, ref.plain, "float32")
    if ref.q is not None:
        assert_close(out.s, ref.s, "float32")
        steps = (out.q.cpu().view(torch.uint8).int() - ref.q.view(torch.uint8).int()).abs()
        assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("counts", [(), (1,), (3, 2)], ids=str)
def test_add_norm_kernel_equals_its_twin(form, counts):
    torch.manual_seed(1)
    x, weight = torch.randn(3, 384), torch.rand(384)
    partials = [torch.randn(count, 3, 384) for count in counts]
    total, ref = reference.add_norm(x, partials, weight, 1e-6, form)
    got_total, got = add_norm(*to(DEVICE, x), to(DEVICE, *partials), *to(DEVICE, weight), 1e-6, form)
    assert_bits_equal(got_total, total)
    assert_formed(got, ref)


def test_add_norm_kernel_takes_any_width_and_strided_parts():
    x, weight, partials = torch.randn(2, 200), torch.rand(200), torch.randn(2, 3, 200).transpose(0, 1)
    _, ref = reference.add_norm(x, [partials], weight, 1e-6, FORMS["plain"])
    _, out = add_norm(x.to(DEVICE), [partials.to(DEVICE)], weight.to(DEVICE), 1e-6, FORMS["plain"])
    assert_formed(out, ref)


@pytest.mark.parametrize(("experts", "dim"), [(5, 200), (37, 256), (64, 384)])
def test_a_gates_logits_equal_their_twins_and_are_a_rows_own(experts, dim):
    generator = torch.Generator().manual_seed(experts)
    x, weight, gate = (torch.randn(*s, generator=generator) for s in ((6, dim), (dim,), (experts, dim)))
    partials = torch.randn(2, 6, dim, generator=generator)
    total, ref, logits = reference.add_norm_gate(x, [partials], weight, 1e-6, FORMS["plain"], gate)
    there = to(DEVICE, x, partials, weight, gate)
    got_total, got, got_logits = add_norm_gate(there[0], [there[1]], there[2], 1e-6, FORMS["plain"], there[3])
    assert_bits_equal(got_total, total)
    assert_formed(got, ref)
    assert_close(got_logits.sum(0), logits.sum(0), "float32")
    alone = add_norm_gate(there[0][3:4], [there[1][:, 3:4]], there[2], 1e-6, FORMS["plain"], there[3])[2]
    assert_bits_equal(alone[:, 0].contiguous(), got_logits[:, 3].contiguous())  # in programs of fewer experts


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("rows", [1, 70])
def test_swiglu_kernel_equals_its_twin(form, rows):
    partials = torch.randn(2, rows, 2 * 384, generator=torch.Generator().manual_seed(rows)) * 3
    ref = reference.swiglu(partials, form, dtype=torch.float32)
    assert_formed(swiglu(partials.to(DEVICE), form, dtype=torch.float32), ref)


@pytest.mark.parametrize("sigmoid", [True, False], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "uncorrected"])
@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), [(8, 4, 2, 2), (24, 3, 1, 6), (16, 1, 1, 3)])
def test_route_kernel_chooses_and_weighs_as_its_twin(sigmoid, corrected, experts, groups, kept, top_k):
    torch.manual_seed(experts)
    partials, bias = torch.randn(2, 5, experts), torch.randn(experts) * 0.2 if corrected else None
    rule = Routing(top_k, groups, kept, sigmoid, normalised=sigmoid, scaling=2.5, shared=groups - 1)
    ref_experts, ref_weights = reference.route(partials, bias, rule)
    got_experts, got_weights = route(*to(DEVICE, partials, bias), rule)
    assert got_experts.tolist() == ref_experts.tolist()
    assert_close(got_weights, ref_weights, "float32")


@pytest.mark.parametrize("experts", [16, 24])
def test_route_kernel_names_real_experts_even_for_logits_that_are_nan(experts):
    partials = torch.randn(1, 2, experts)
    partials[0, 0, 3] = float("nan")
    for sigmoid in (True, False):
        chosen, _ = route(partials.to(DEVICE), None, Routing(4, 1, 1, sigmoid, True, 1.0))
        assert chosen.min() >= 0 and chosen.max() < experts


def test_a_schedule_visits_every_choice_once_and_with_its_expert():
    chosen = torch.randint(0, 7, (50, 3), generator=torch.Generator().manual_seed(2)).int().to(DEVICE)
    plan, seen = schedule(chosen, 7, 16), []
    for expert, first, last in zip(plan.expert.tolist(), plan.first.tolist(), plan.last.tolist(), strict=True):
        places = plan.order[first:last]
        assert last - first <= 16 and (chosen.flatten()[places] == expert).all()
        seen += places.tolist()
    assert sorted(seen) == list(range(150))


def two_caches(tokens: int, *widths: int, dtype: torch.dtype, across: int = 0) -> tuple[KV, KV]:
    """For a kernel and for its twin."""
    return tuple(
        KV.zeros(-(-tokens // 8), 8, widths=widths, dtype=dtype, device=d, across=across) for d in (DEVICE, "cpu")
    )


def assert_kept(ours: KV, theirs: KV) -> None:
    """The same codes and scales, but for an inverse square root's last bit."""
    if theirs.scales is None:
        return assert_close(ours.values, theirs.values, "float32")
    assert_close(ours.scales, theirs.scales, "float32")
    steps = (ours.values.cpu().view(torch.uint8).int() - theirs.values.view(torch.uint8).int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01


@pytest.mark.parametrize("held", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(("normed", "biased"), [(True, False), (False, True)], ids=["qk-norm", "bias"])
@pytest.mark.parametrize(("dim", "rows"), [(32, 4), (48, 4), (32, 67)])
def test_rope_heads_kernel_equals_its_twin(normed, biased, dim, rows, held):
    torch.manual_seed(dim)
    heads, kv_heads = 3, 2
    starts, width = (0, 256, 384), 384 + kv_heads * dim
    partials, angles = torch.randn(2, rows, width), torch.rand(rows, 2, dim // 2)
    norms = (torch.rand(dim), torch.rand(dim)) if normed else None
    slots, last = torch.randperm(70)[:rows], {"heads": heads, "eps": 1e-6, "dtype": torch.float32}
    ours, theirs = two_caches(70, *[dim] * 2 * kv_heads, dtype=held, across=kv_heads * dim)
    bias = torch.randn(width) if biased else None
    ref = reference.rope_heads(partials, starts, norms, angles, slots, theirs, bias=bias, **last)
    got_norms, got_bias = norms and to(DEVICE, *norms), None if bias is None else bias.to(DEVICE)
    given = (*to(DEVICE, partials), starts, got_norms, *to(DEVICE, angles, slots), ours)
    got = rope_heads(*given, bias=got_bias, **last)
    assert_close(got, ref, "float32")
    assert_kept(ours, theirs)


@pytest.mark.parametrize("held", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("query", [True, False], ids=["q-lora", "no-q-lora"])
def test_split_latents_kernel_equals_its_twin(form, query, held):
    torch.manual_seed(3)
    latent, rotary, kv_at = 48, 16, 256
    partials, angles = torch.randn(2, 3, kv_at + latent + rotary), torch.rand(3, 2, rotary // 2)
    q_norm, kv_norm, slots = torch.rand(256) if query else None, torch.rand(latent), torch.tensor([1, 5, 2])
    ours, theirs = two_caches(6, latent, rotary, dtype=held)
    keep = Keep(kv_at, kv_norm, 1e-6, slots, theirs)
    ref = reference.split_latents(partials, q_norm, angles, keep, form, dtype=torch.float32, eps=1e-3)
    keep = Keep(kv_at, kv_norm.to(DEVICE), 1e-6, slots.to(DEVICE), ours)
    got = split_latents(*to(DEVICE, partials, q_norm, angles), keep, form, dtype=torch.float32, eps=1e-3)
    assert_kept(ours, theirs)
    assert (got is None) == (ref is None) and (got is None or assert_formed(got, ref) is None)


@pytest.mark.parametrize("held", [None, *CACHES.values()], ids=["queries only", *CACHES])
def test_absorb_queries_kernel_equals_its_twin(held):
    torch.manual_seed(4)
    partials, absorb, angles = torch.randn(2, 3, 4 * 48 + 96 + 16), torch.randn(4, 96, 32), torch.rand(3, 2, 8)
    norm, slots = torch.rand(96), torch.tensor([1, 5, 2])
    caches = two_caches(6, 96, 16, dtype=held or torch.float32)
    ours, theirs = (
        Keep(4 * 48, norm.to(kv.values.device), 1e-6, slots.to(kv.values.device), kv) if held else None for kv in caches
    )
    ref = reference.absorb_queries(partials, absorb, angles, theirs, dtype=torch.float32)
    got = absorb_queries(*to(DEVICE, partials, absorb, angles), ours, dtype=torch.float32)
    assert_close(got, ref, "float32")
    assert_kept(*caches)


LENGTHS = [1, 16, 37, 16 * 40 + 3]  # the last has more pages than there are spans


HELD = {"plain": torch.float32, "fp8": torch.float8_e4m3fn, "decoded": torch.float8_e4m3fn}


def ragged(*widths: int, dtype: torch.dtype, page: int = 16, across: int = 0):
    """A paged cache in which only what a row wrote may be read: the rest is NaN."""
    pages = torch.randperm(4 * 41).view(4, 41).int()
    values, scales = torch.randn(4 * 41, page, sum(widths)), torch.rand(4 * 41, len(widths), page) ** 4 + 1e-5
    scaled = dtype != torch.float32
    cache = KV((values * 100).clamp(-448, 448).to(dtype), scales, widths, across) if scaled else KV(values)
    for row, length in enumerate(LENGTHS):
        for at in range(length, pages.shape[1] * page):
            nobodys = pages[row, at // page], at % page
            for columns in cache.by_token() if scaled else [values.view(torch.uint8)]:
                columns[nobodys] = 0xFF  # NaN in either format
            scales[nobodys[0], :, nobodys[1]] = float("nan")
    return cache, pages, torch.tensor(LENGTHS, dtype=torch.int32)


def there(cache: KV) -> KV:
    scales = None if cache.scales is None else cache.scales.to(DEVICE)
    return cache._replace(values=cache.values.to(DEVICE), scales=scales)


@pytest.mark.parametrize(
    ("heads", "value", "form", "held"), [(3, 40, "plain", "plain"), (4, 64, "fp8", "fp8"), (2, 128, "fp8", "decoded")]
)
def test_mla_decode_kernels_equal_their_twin_on_ragged_paged_rows(heads, value, form, held):
    torch.manual_seed(value)
    cache, pages, lengths = ragged(32, 16, dtype=HELD[held])
    q, expand = torch.randn(4, heads, 48), torch.randn(heads, value, 32)
    ref = reference.mla_decode(q, cache, pages, lengths, expand, FORMS[form], scale=0.2)
    where = to(DEVICE, pages, lengths)
    operands = q.to(DEVICE), there(cache), *where, expand.to(DEVICE), FORMS[form]
    out = attention.mla_decode(*operands, scale=0.2, decode=held == "decoded" or None)
    assert_formed(out, ref)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "form", "held"),
    [
        (8, 2, 32, "fp8", "plain"),
        (18, 1, 64, "plain", "plain"),
        (8, 2, 32, "fp8", "fp8"),
        (18, 1, 64, "plain", "fp8"),
    ],
)
def test_gqa_decode_kernels_equal_their_twin_on_ragged_paged_rows(heads, kv_heads, dim, form, held):
    torch.manual_seed(heads)
    cache, pages, lengths = ragged(*[dim] * 2 * kv_heads, dtype=HELD[held], across=kv_heads * dim)
    q, form = torch.randn(4, heads, dim), FORMS[form]
    ref = reference.gqa_decode(q, cache, pages, lengths, form, scale=0.2, kv_heads=kv_heads)
    where = to(DEVICE, pages, lengths)
    out = attention.gqa_decode(q.to(DEVICE), there(cache), *where, form, scale=0.2, kv_heads=kv_heads)
    assert_formed(out, ref)
    # across pages; and a value alone, which was E4M3 before, and often lies on a tie of E4M3
    for window in (21, *[1] * form.plain):
        about = {"scale": 0.2, "kv_heads": kv_heads, "window": window}
        ref = reference.gqa_decode(q, cache, pages, lengths, form, **about)
        assert_formed(attention.gqa_decode(q.to(DEVICE), there(cache), *where, form, **about), ref)
    if form.plain:
        places = pages[2, torch.arange(37) // 16] * 16 + torch.arange(37) % 16
        seen = kernels.gather_kv(cache, places.long(), dtype=torch.float32)
        k, v = seen.unflatten(-1, (2, kv_heads, dim)).permute(1, 2, 0, 3)
        for window in (None, 21):
            ref = reference.gqa_decode(q, cache, pages, lengths, form, scale=0.2, kv_heads=kv_heads, window=window)
            seen = k[:, -(window or 37) :], v[:, -(window or 37) :]
            exact = torch.nn.functional.scaled_dot_product_attention(q[2][:, None], *seen, scale=0.2, enable_gqa=True)
            assert_close(ref.plain[2], exact.flatten(), "float32")


def test_gather_kernel_copies_what_is_not_scaled():
    cache, pages, _ = ragged(48, dtype=torch.float32)
    places = (pages[3, torch.arange(37) // 16] * 16 + torch.arange(37) % 16).long()
    out = gather_kv(there(cache), places.to(DEVICE), dtype=torch.float32)
    assert_bits_equal(out, reference.gather_kv(cache, places, dtype=torch.float32))


@pytest.mark.parametrize("widths", [(32,) * 6, (64, 16)], ids=["heads", "a latent and its rotary key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 1 + (DEVICE == "cuda")], ids=str)
def test_gather_kernel_restores_the_bits_of_its_twin_wherever_tokens_lie(widths, dtype):
    torch.manual_seed(len(widths))
    cache, pages, _ = ragged(*widths, dtype=HELD["fp8"], across=96 if len(widths) > 2 else 0)
    places = pages[2:, torch.arange(37) // 16] * 16 + torch.arange(37) % 16  # two rows' tokens, in no order of pages
    places = places.flatten().long()
    ref = reference.gather_kv(cache, places, dtype=dtype)
    assert_bits_equal(gather_kv(there(cache), places.to(DEVICE), dtype=dtype), ref)


def test_how_many_programs_share_the_spans_changes_no_bit(monkeypatch):
    torch.manual_seed(3)
    form, q, expand = FORMS["plain"], torch.randn(4, 2, 48), torch.randn(2, 24, 32)
    heads, latents = ragged(*[32] * 2, dtype=HELD["fp8"], across=32), ragged(32, 16, dtype=HELD["plain"])

    def outputs() -> list[torch.Tensor]:
        cache, *where = there(heads[0]), *to(DEVICE, *heads[1:])
        gqa = attention.gqa_decode(q[..., :32].to(DEVICE), cache, *where, form, scale=0.2, kv_heads=1)
        cache, *where = there(latents[0]), *to(DEVICE, *latents[1:], expand)
        mla = attention.mla_decode(q.to(DEVICE), cache, *where, form, scale=0.2)
        return [gqa.plain, mla.plain]

    many = outputs()
    monkeypatch.setattr(spans, "PROGRAMS", 1)  # all spans of a row one after another
    assert all(torch.equal(a, b) for a, b in zip(outputs(), many, strict=True))


SHAPES = {  # queries, tokens, heads, key-value heads, width, width of a value
    "GQA, from the start": (70, 70, 4, 2, 32, 32),
    "GQA, a later piece": (40, 103, 4, 1, 16, 16),
    "MLA: a rotary part, narrower values": (33, 65, 2, 2, 48, 24),
    "one query": (1, 31, 2, 2, 8, 8),
    "heads that are blocks": (20, 40, 2, 1, 32, 128),
}


@pytest.mark.parametrize(("queries", "tokens", "heads", "groups", "width", "value"), SHAPES.values(), ids=SHAPES)
def test_causal_attention_kernel_equals_its_twin(queries, tokens, heads, groups, width, value):
    torch.manual_seed(tokens)
    q, both = torch.randn(queries, heads, width), torch.randn(tokens, groups, width + value)
    k, v = both.split([width, value], dim=-1)  # strided, as they lie in a cache
    form = FORMS["both, powers of two" if heads * value % 128 == 0 else "plain"]
    ref = reference.causal_attention(q, k, v, form, scale=0.3)
    both = both.to(DEVICE)
    out = attention.causal_attention(q.to(DEVICE), *both.split([width, value], dim=-1), form, scale=0.3)
    assert_formed(out, ref)
    for window in (9, 50):
        ref = reference.causal_attention(q, k, v, form, scale=0.3, window=window)
        split = both.split([width, value], dim=-1)
        assert_formed(attention.causal_attention(q.to(DEVICE), *split, form, scale=0.3, window=window), ref)
    at, seen = torch.arange(queries)[:, None] + tokens - queries, torch.arange(tokens)[None]
    there = (seen <= at) & (seen > at - 50)
    heads_first = (t.transpose(0, 1)[None] for t in (q, *(x.repeat_interleave(heads // groups, 1) for x in (k, v))))
    exact = torch.nn.functional.scaled_dot_product_attention(*heads_first, there, scale=0.3)
    assert_close(ref.plain, exact[0].transpose(0, 1).flatten(1), "float32")


PIECES = {  # queries, tokens, heads, key-value heads, width
    "from the start": (300, 300, 4, 2, 128),
    "a later piece": (256, 2304, 8, 2, 128),
    "that begins within a block of keys": (77, 1000, 8, 2, 128),
    "one query": (1, 5, 4, 1, 128),
    "narrow heads": (513, 700, 6, 2, 64),
    "more tiles than multiprocessors": (700, 701, 40, 8, 64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "tokens", "heads", "groups", "width"), PIECES.values(), ids=PIECES)
def test_causal_attention_by_warps_with_roles_equals_its_twin(
    queries, tokens, heads, groups, width, dtype, monkeypatch
):
    """Gluon has no interpreter: elsewhere than on Hopper the other kernel is asked."""
    monkeypatch.setattr(attention, "FEW_QUERIES", 0)
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(queries, heads, width, generator=generator).to(DEVICE, dtype)
    both = torch.randn(tokens, 2 * groups, width, generator=generator).to(DEVICE, dtype)
    k, v = both.split(groups, dim=1)  # as they lie in a cache
    ref = reference.causal_attention(q.double(), k.double(), v.double(), FORMS["plain"], scale=0.09).plain
    out = attention.causal_attention(q, k, v, FORMS["plain"], scale=0.09)
    assert_close(out.plain, ref, "bfloat16" if dtype == torch.bfloat16 else "float16")
    for form in list(FORMS.values())[1:]:
        after = e4m3.formed(out.plain, form)
        for _ in range(3):
            got = attention.causal_attention(q, k, v, form, scale=0.09)
            assert_bits_equal(got.s, after.s)
            assert_bits_equal(got.q, after.q)


def test_causal_attention_refuses_what_does_not_fit():
    q, k = torch.zeros(3, 4, 8), torch.zeros(2, 2, 8)
    with pytest.raises(ValueError, match="fit together"):
        kernels.causal_attention(q, k, k, FORMS["plain"], scale=1.0)
    with pytest.raises(ValueError, match="no whole blocks"):
        kernels.causal_attention(q[:2], k, k, FORMS["fp8"], scale=1.0)
