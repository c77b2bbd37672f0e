"""What only a card can show. Run with `python -m pytest tests -m gpu`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from compare import assert_bits_equal, assert_close
from families import prefill, theirs, tokens
from serving import ROOT

import kernels
from kernels import reference
from playground import SamplingParams
from playground.checkpoint.files import Checkpoint
from playground.checkpoint.hub import EMBEDDED
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.decoder import EagerDecoder
from playground.engine.engine import Engine
from playground.engine.events import Failure, TokenEvent
from playground.engine.loading import load_model
from playground.engine.prefill import Prefill
from playground.engine.requests import Request
from playground.model.step import Step

pytestmark = pytest.mark.gpu
PROMPTS = [
    "Once upon a time",
    "One day, a little girl named Lily found a",
    "The fox looked at the old clock and said,",
    "Tom and his grandmother went to the sea. There",
    "The king had three sons, and the youngest",
    "It was a cold night and the wind",
    "A frog and a mouse lived",
    '"Where are you going?" asked the bird.',
]
# Two best logits closer than this may change places. A sum in another order moves a value by about 1e-6; where that
# crosses a rounding boundary of E4M3, or the gate's choice of an expert, the logits move for real. On the CPU alone,
# noise of 1e-6 on every product moved the gap of the two best by 0.08 (rms) and at most 0.66 over these 512 tokens.
NEAR_TIE = 0.7
NOISE = 1e-6


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(EMBEDDED, Checkpoint(EMBEDDED).config.vocab_size)


@pytest.fixture(scope="module")
def on_cpu():
    return load_model(EMBEDDED, torch.device("cpu"))[0]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def on_gpu(request):
    return load_model(EMBEDDED, torch.device("cuda"), request.param)[0]


@pytest.fixture(scope="module")
def requests(tokenizer):
    return [Request(tuple(tokenizer.encode(p)), SamplingParams("greedy"), 64, ignore_eos=True) for p in PROMPTS]


@pytest.fixture(scope="module")
def greedy_on_cpu(on_cpu, requests):
    return write(on_cpu, requests)


def write(model, requests, decoder=None, cache_dtype=None) -> list[list[int]]:
    engine = Engine(model, None, cache_dtype=cache_dtype)
    if decoder:
        engine.runner.decoder = decoder(model, engine.runner.cache)
    rows = [engine.add([r])[0] for r in requests]
    while engine.busy:
        engine.step()
    return [row.new_ids for row in rows]


def forced_logits(model, request, ids: list[int]) -> torch.Tensor:
    """`[len(ids), vocab]` on the CPU: the logits of every step of a run that is made to write `ids`."""
    engine, seen, logits = Engine(model, None), [], model.logits
    runner = engine.runner
    runner.decoder, runner.prefill = EagerDecoder(model, runner.cache), Prefill(model, runner.cache, None)

    def record(hidden):
        seen.append(logits(hidden))
        return torch.nn.functional.one_hot(torch.tensor([ids[len(seen) - 1]]), seen[-1].shape[-1]).to(seen[-1])

    model.logits = record
    try:
        engine.add([request])
        while engine.busy:
            assert not any(isinstance(event, Failure) for _, event in engine.step())
    finally:
        del model.logits
    return torch.cat(seen).cpu()


@pytest.mark.parametrize("length", [3, 40, 100, 300])
def test_a_recorded_prefill_leaves_the_same_bits_as_an_eager_one(on_gpu, length):
    engine = Engine(on_gpu, None, 2, context=512)
    prompt = torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    found = []
    for prefill_ in (Prefill(on_gpu, engine.runner.cache, None), engine.runner.prefill, engine.runner.prefill):
        fed = prefill_.feed(prompt, 0, list(range(8)), True, True)
        found.append((fed.logits.clone(), fed.trace.flat().clone(), engine.runner.cache.kv.values[:, :5].clone()))
        engine.runner.cache.kv.values.zero_()
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_bits_equal(a, b)


MIXED = [
    SamplingParams("greedy"),
    SamplingParams("gumbel", 0.8, seed=1),
    SamplingParams("gumbel", 1.3, top_k=40, top_p=0.9, seed=2),
    SamplingParams("multinomial", 0.9, min_p=0.02, seed=3),
]


@pytest.mark.parametrize("chosen", [MIXED[:2], MIXED], ids=["no filter", "filters"])
def test_what_is_shown_of_a_draw_on_the_card_chooses_the_token_that_was_drawn(on_gpu, tokenizer, chosen):
    prompt, found = tuple(tokenizer.encode(PROMPTS[0])), []
    for inspect in (False, True):
        engine = Engine(on_gpu, None)
        group = engine.add([Request(prompt, p, 100, ignore_eos=True, inspect=inspect) for p in chosen])
        events = {row: [] for row in group}
        while engine.busy:
            for row, event in engine.step():
                if isinstance(event, TokenEvent):
                    events[row].append(event)
        found.append([[e.id for e in events[row]] for row in group])
    assert found[0] == found[1]
    for row, p in zip(group, chosen, strict=True):
        for event in events[row]:
            i = event.insight
            assert abs(i.logprob - event.logprob) < 1e-3
            if p.is_greedy:
                assert i.rank == 0 and i.raw[0][0] == event.id
            elif p.sampler == "gumbel":
                assert max(i.scores, key=lambda s: s[1] + s[2])[0] == event.id
            else:
                assert i.interval[0] < i.uniform <= i.interval[1]


@pytest.mark.parametrize("at", [1, 30, 61])
def test_a_branch_on_the_card_has_the_bits_of_its_parent(on_gpu, tokenizer, at):
    engine, prompt = Engine(on_gpu, None), tuple(tokenizer.encode(PROMPTS[0]))

    def write(ids, tokens, parent=None):
        row = engine.add([Request(ids, MIXED[1], tokens, ignore_eos=True, keep=True)], parent)[0]
        logprobs = []
        while engine.busy:
            logprobs += [e.logprob for r, e in engine.step() if r is row and isinstance(e, TokenEvent)]
        return row, logprobs

    row, logprobs = write(prompt, 90)
    branch, found = write(prompt + tuple(row.new_ids[:at]), 90 - at, row)
    assert branch.new_ids == row.new_ids[at:] and found == logprobs[at:]


def gap_moves(model, requests, texts, expected) -> torch.Tensor:
    """By how much the gap between the two logits that are best in `expected` moves in `model`, for every token."""
    moves = []
    for request, ids, right in zip(requests, texts, expected, strict=True):
        best = right.topk(2).indices
        gaps = [(t.gather(1, best) @ torch.tensor([1.0, -1.0])) for t in (right, forced_logits(model, request, ids))]
        moves.append((gaps[1] - gaps[0]).abs())
    return torch.cat(moves)


def test_greedy_text_equals_the_cpu_twins_but_for_near_ties(on_cpu, on_gpu, requests, greedy_on_cpu, tokenizer, capsys):
    lines = []
    for request, a, b in zip(requests, greedy_on_cpu, write(on_gpu, requests), strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is None:
            continue
        logits = forced_logits(on_cpu, request, a)[at]
        gap = (logits[a[at]] - logits[b[at]]).item()
        lines.append(f"token {at} of {tokenizer.decode(list(request.prompt))!r}: gap {gap:.4f}")
        assert abs(gap) < NEAR_TIE, lines[-1]
    with capsys.disabled():
        print(f"\ngreedy {on_gpu.dtype}: {8 - len(lines)} of 8 prompts equal for 64 tokens; near-ties: {lines}")


def test_logits_differ_from_the_cpu_twins_no_more_than_rounding_noise_moves_those(
    on_cpu, on_gpu, requests, greedy_on_cpu, monkeypatch, capsys
):
    expected = [forced_logits(on_cpu, r, ids) for r, ids in zip(requests, greedy_on_cpu, strict=True)]
    found = gap_moves(on_gpu, requests, greedy_on_cpu, expected)
    plain, generator = reference.plain_gemm, torch.Generator().manual_seed(0)

    def noisy(a, b, *, out_dtype):
        out = plain(a, b, out_dtype=out_dtype)
        return out * (1 + NOISE * torch.randn(out.shape, generator=generator))

    monkeypatch.setattr(reference, "plain_gemm", noisy)
    noise = gap_moves(on_cpu, requests, greedy_on_cpu, expected)
    rms = [t.square().mean().sqrt().item() for t in (found, noise)]
    with capsys.disabled():
        print(
            f"\ngap moves {on_gpu.dtype}: rms {rms[0]:.3f} max {found.max():.3f}; noise {rms[1]:.3f} {noise.max():.3f}"
        )
    assert rms[0] < 1.5 * rms[1]


def test_a_seed_replays_on_the_gpu_alone_and_in_a_batch(on_gpu, tokenizer):
    samplers = ("gumbel", "multinomial", "greedy", "gumbel")
    requests = [
        Request(tuple(tokenizer.encode(p)), SamplingParams(s, 0.9, seed=i), 48, ignore_eos=True)
        for i, (p, s) in enumerate(zip(PROMPTS, samplers, strict=False))
    ]
    together = write(on_gpu, requests)
    assert together == write(on_gpu, requests)
    for request, ids in zip(requests, together, strict=True):
        assert write(on_gpu, [request]) == [ids]


def test_noise_has_the_same_bits_on_the_gpu():
    seeds, positions = torch.arange(4) * 2**40 + 3, torch.arange(4)
    words = [kernels.uniform_noise(seeds.to(d), positions.to(d)).cpu() for d in ("cpu", "cuda")]
    assert_bits_equal(*words)
    a, b = (kernels.gumbel_noise(seeds.to(d), positions.to(d), 1000).cpu() for d in ("cpu", "cuda"))
    assert (a - b).abs().max() < 1e-13  # the same integers; the logarithms of the two libraries differ in the last bit


def test_draws_of_seeded_rows_agree_between_cpu_and_gpu():
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)) * 3
    seeds, at = torch.arange(500), torch.arange(500) * 7
    ones = torch.ones(500, dtype=torch.float64)
    for draw in (lambda p, s, a: kernels.draw(p, ones.to(p.device), s, a)[0], kernels.draw_multinomial):
        ids = [draw(logits.double().log_softmax(-1).to(d), seeds.to(d), at.to(d)).cpu() for d in ("cpu", "cuda")]
        assert (ids[0] != ids[1]).sum() <= 1


def ragged_rows(rows: int, *widths: int, fp8: bool, across: int = 0):
    torch.manual_seed(0)
    lengths = torch.randint(1, 5000, (rows,), dtype=torch.int32)
    pages = torch.randperm(rows * 79).view(rows, 79).int()
    values = torch.randn(rows * 79, 64, sum(widths))
    if not fp8:
        return kernels.KV(values), pages, lengths
    scales = torch.rand(rows * 79, len(widths), 64) * 0.04 + 1e-4
    return kernels.KV((values * 50).clamp(-448, 448).to(torch.float8_e4m3fn), scales, widths, across), pages, lengths


def on_card(cache: kernels.KV, dtype: torch.dtype) -> kernels.KV:
    if cache.scales is None:
        return kernels.KV(cache.values.to("cuda", dtype))
    return cache._replace(values=cache.values.cuda(), scales=cache.scales.cuda())


@pytest.mark.parametrize("fp8", [False, True], ids=["plain cache", "FP8 cache"])
@pytest.mark.parametrize(("rows", "heads"), [(1, 128), (3, 20), (32, 128)])
def test_mla_decode_at_deepseek_size_equals_its_twin_and_is_row_invariant(rows, heads, fp8):
    cache, pages, lengths = ragged_rows(rows, 512, 64, fp8=fp8)
    q, expand = torch.randn(rows, heads, 576), torch.randn(heads, 128, 512)
    form = kernels.Form(plain=True, fp8=False)
    ref = kernels.mla_decode(q, cache, pages, lengths, expand, form, scale=0.1).plain
    gpu = [q.cuda(), on_card(cache, torch.float32), *(t.cuda() for t in (pages, lengths, expand))]
    assert_close(kernels.mla_decode(*gpu, form, scale=0.1).plain, ref, "float32")
    half = [gpu[0].bfloat16(), on_card(cache, torch.bfloat16), *gpu[2:4], gpu[4].bfloat16()]
    together = kernels.mla_decode(*half, form, scale=0.1).plain
    assert_close(together, ref, "bfloat16 inputs")
    one = kernels.mla_decode(half[0][-1:], half[1], half[2][-1:], half[3][-1:], half[4], form, scale=0.1).plain
    assert_bits_equal(one[0], together[-1])


@pytest.mark.parametrize("fp8", [False, True], ids=["plain cache", "FP8 cache"])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "dim"), [(1, 32, 8, 128), (32, 32, 8, 128), (3, 40, 4, 64)])
def test_gqa_decode_of_many_heads_equals_its_twin_and_is_row_invariant(rows, heads, kv_heads, dim, fp8):
    cache, pages, lengths = ragged_rows(rows, *[dim] * 2 * kv_heads, fp8=fp8, across=kv_heads * dim)
    q, form = torch.randn(rows, heads, dim).bfloat16(), kernels.Form(plain=True, fp8=True)
    gpu = [q.cuda(), on_card(cache, torch.bfloat16), pages.cuda(), lengths.cuda()]
    ref = kernels.gqa_decode(q.float(), cache, pages, lengths, form, scale=0.09, kv_heads=kv_heads)
    together = kernels.gqa_decode(*gpu, form, scale=0.09, kv_heads=kv_heads)
    assert_close(together.plain, ref.plain, "bfloat16 inputs")
    one = kernels.gqa_decode(gpu[0][-1:], gpu[1], gpu[2][-1:], gpu[3][-1:], form, scale=0.09, kv_heads=kv_heads)
    for alone, company in zip(one, together, strict=True):
        assert_bits_equal(alone[0], company[-1])


@pytest.mark.parametrize("fp8", [False, True], ids=["plain cache", "FP8 cache"])
def test_what_another_row_has_left_in_a_page_reaches_nobody(fp8):
    cache, pages, _ = ragged_rows(2, *[128] * 4, fp8=fp8, across=256)
    q, form, cache = (
        torch.randn(2, 8, 128).bfloat16().cuda(),
        kernels.Form(plain=True, fp8=False),
        on_card(cache, torch.bfloat16),
    )
    lengths = torch.tensor([1, 700], dtype=torch.int32).cuda()
    clean = kernels.gqa_decode(q, cache, pages.cuda(), lengths, form, scale=0.09, kv_heads=2).plain
    for row, length in enumerate(lengths.tolist()):
        for columns in cache.by_token() if fp8 else [cache.values.view(torch.uint8)]:
            columns[pages[row, length // 64], length % 64 :] = 0xFF  # NaN in either format
        if fp8:
            cache.scales[pages[row, length // 64], :, length % 64 :] = float("nan")
    assert_bits_equal(kernels.gqa_decode(q, cache, pages.cuda(), lengths, form, scale=0.09, kv_heads=2).plain, clean)


def test_what_another_row_has_left_in_a_page_of_latents_reaches_nobody():
    cache, pages, _ = ragged_rows(2, 512, 64, fp8=False)
    cache, pages, form = on_card(cache, torch.bfloat16), pages.cuda(), kernels.Form(plain=True, fp8=False)
    q, expand = torch.randn(2, 20, 576).bfloat16().cuda(), torch.randn(20, 128, 512).bfloat16().cuda()
    lengths = torch.tensor([1, 700], dtype=torch.int32).cuda()
    clean = kernels.mla_decode(q, cache, pages, lengths, expand, form, scale=0.1).plain
    for row, length in enumerate(lengths.tolist()):
        cache.values[pages[row, length // 64], length % 64 :] = float("nan")
    assert_bits_equal(kernels.mla_decode(q, cache, pages, lengths, expand, form, scale=0.1).plain, clean)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "llama-3", "deepseek-v2-lite", "deepseek-v2"])
def test_every_family_gives_the_cpu_twins_logits(family, tmp_path):
    theirs(family).save_pretrained(tmp_path)
    ids = tokens(200)
    # float32 all through: in bfloat16 a gate near a tie sends a token to other experts, and its logits are others
    models = [load_model(tmp_path, torch.device(d), torch.float32, "bf16")[0] for d in ("cpu", "cuda")]
    with torch.inference_mode():
        right = prefill(models[0], ids)
        found = models[1].logits(models[1](ids.cuda(), Step(torch.arange(200, device="cuda"), None))).cpu()
    assert ((found - right).norm() / right.norm()) < 1e-4
    fp8, _ = load_model(tmp_path, torch.device("cuda"))
    requests = [Request(tuple(tokens(30 + i).tolist()), SamplingParams("gumbel", seed=i), 20) for i in range(3)]
    together = write(fp8, requests)
    assert together == [ids for r in requests for ids in write(fp8, [r])]


def test_an_added_and_normed_row_has_the_same_bits_alone_and_in_company():
    x, w = torch.randn(16, 512, device="cuda").bfloat16(), torch.rand(512, device="cuda").bfloat16()
    parts, form = torch.randn(4, 16, 512, device="cuda"), kernels.Form(plain=True, fp8=True)
    total, together = kernels.add_norm(x, [parts], w, 1e-6, form)
    one_total, one = kernels.add_norm(x[5:6], [parts[:, 5:6]], w, 1e-6, form)
    for alone, company in zip((one_total, *one), (total, *together), strict=True):
        assert_bits_equal(alone[0], company[5])
    gate = torch.randn(60, 512, device="cuda").bfloat16()
    _, gated, logits = kernels.add_norm_gate(x, [parts], w, 1e-6, form, gate)
    *_, one_logits = kernels.add_norm_gate(x[5:6], [parts[:, 5:6]], w, 1e-6, form, gate)
    assert_bits_equal(gated.q, together.q)
    assert_bits_equal(one_logits[:, 0].contiguous(), logits[:, 5].contiguous())


PLAIN = [
    SamplingParams("gumbel", 0.9, seed=1),
    SamplingParams("greedy"),
    SamplingParams("gumbel", 1.0, top_p=0.9, seed=2),
    SamplingParams("multinomial", 1.0, top_k=20, seed=3),
    SamplingParams("gumbel", 2.0, seed=4),
]
PENALISED = [
    SamplingParams("gumbel", 0.9, seed=1, repetition_penalty=1.3),
    SamplingParams("greedy", frequency_penalty=0.5, logit_bias="13:-5"),
    SamplingParams("gumbel", 1.0, top_p=0.9, seed=2, presence_penalty=1.0),
    SamplingParams("multinomial", 1.0, top_k=20, seed=3, repetition_penalty=0.9),
    SamplingParams("gumbel", 2.0, seed=4),
]


@pytest.mark.parametrize("settings", [PLAIN, PENALISED], ids=["plain", "penalised"])
def test_a_recorded_step_writes_what_single_operations_write(on_gpu, tokenizer, settings):
    requests = [
        Request(tuple(tokenizer.encode(p)), s, 20 + 9 * i, ignore_eos=True)
        for i, (p, s) in enumerate(zip(PROMPTS, settings, strict=False))
    ]
    for group in (requests[:2], requests):
        assert write(on_gpu, group) == write(on_gpu, group, EagerDecoder)
    assert write(on_gpu, requests[:1]) == write(on_gpu, requests)[:1]


def test_through_an_fp8_cache_a_row_writes_the_same_alone_in_company_and_eagerly(on_gpu, tokenizer):
    requests = [
        Request(tuple(tokenizer.encode(p)), SamplingParams("gumbel", 1.0, seed=i), 70, ignore_eos=True)
        for i, p in enumerate(PROMPTS[:5])
    ]
    together = write(on_gpu, requests, cache_dtype=torch.float8_e4m3fn)
    assert together == write(on_gpu, requests, EagerDecoder, torch.float8_e4m3fn)
    assert together == [write(on_gpu, [one], cache_dtype=torch.float8_e4m3fn)[0] for one in requests]
    assert together != write(on_gpu, requests)


def test_a_prompt_fits_a_context_that_is_shorter_than_its_recording():
    model, _ = load_model(EMBEDDED, torch.device("cuda"), context=70)
    engine = Engine(model, None, 1, context=70)
    row = engine.add([Request(tuple(range(5, 70)), SamplingParams("greedy"), 5, ignore_eos=True)])[0]
    while engine.busy:
        engine.step()
    assert len(row.new_ids) == 5


SHALLOW = """
import torch
from contextlib import nullcontext
from kernels.compiling import only_asked_for
from playground.checkpoint.hub import EMBEDDED
from playground.engine.engine import Engine
from playground.engine.loading import load_model
from playground.engine.prepare import FULLEST, PLAINEST, dry_prompt, dry_step, shallow
model = load_model(EMBEDDED, torch.device("cuda"))[0]
runner, asked = Engine(model, None, 32, context=512).runner, []
for context in (shallow(model), nullcontext()):
    asked.append(set())
    with only_asked_for(lambda key, wanted: asked[-1].add(key)), context, torch.inference_mode():
        for size in (32, 128):
            dry_prompt(runner, size, True)
        for variant in (PLAINEST, FULLEST):
            dry_step(runner, 4, variant)
short, whole = asked
# what hands results to the host is compiled for the sizes of a whole model's trace, when a step is recorded
print(len(short), sorted({function.fn.__name__ for function, key in whole - short} - {"deliver_kernel"}))
"""


def test_a_shallow_dry_run_asks_for_all_kernels_of_a_whole_one(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SHALLOW], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, missing = done.stdout.splitlines()[-1].split(" ", 1)
    assert int(count) > 20 and missing == "[]", missing
