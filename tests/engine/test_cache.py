"""The KV cache in E4M3: what it costs in accuracy and in room, and that rows still depend on themselves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import prefill, theirs, tokens
from running import engine_of, replayed

import kernels
from playground import CheckpointError, RequestError, SamplingParams, load
from playground.bench.shapes import SHAPES
from playground.checkpoint.families import parse_config
from playground.engine.cache import PagedCache, token_bytes
from playground.engine.engine import Engine
from playground.engine.loading import load_model
from playground.engine.pages import PAGE_SIZE
from playground.engine.requests import Request
from playground.inspect.book import RunBook
from playground.inspect.receipt import read_receipts
from playground.model.step import Step

FP8, CPU = torch.float8_e4m3fn, torch.device("cpu")
HALF_STEP = 2.0**-4  # of a value with three bits of mantissa, at most; sums over tokens and channels average it


def request(seed: int, prompt, tokens: int = 20, **options) -> Request:
    return Request(tuple(prompt), SamplingParams("gumbel", 1.0, seed=seed), tokens, ignore_eos=True, **options)


def write(model, groups: list[list[Request]], **options) -> list[list[int]]:
    engine = Engine(model, None, cache_dtype=FP8, **options)
    rows = [row for group in groups for row in engine.add(group)]
    while engine.busy:
        engine.step()
    assert engine.pool.used_pages == 0
    return [row.new_ids for row in rows]


@pytest.mark.parametrize("family", ["llama-3", "qwen3", "MLA"])
def test_logits_through_an_fp8_cache_are_as_close_as_e4m3_is(family, tmp_path, small):
    """Of dense models: where a gate chooses another expert, the logits of random weights are others altogether."""
    if family == "MLA":
        model = small(fp8=False, first_k_dense_replace=2)
    else:
        theirs(family).save_pretrained(tmp_path)
        model, _ = load_model(tmp_path, CPU, form="bf16")
    ids = tokens(200)
    exact = prefill(model, ids)
    for pieces in (1, 3):
        error = (prefill(model, ids, pieces, FP8) - exact).norm() / exact.norm()
        assert 0 < error < HALF_STEP


def test_what_a_prefill_leaves_decode_goes_on_from(small):
    """The last token's logits, fed alone behind the others and together with them."""
    model, ids = small(fp8=False), torch.arange(3, 103)
    cache, places, pages = PagedCache(model.config, 128, CPU, FP8), torch.arange(100), torch.tensor([[0, 1]]).int()
    with torch.inference_mode():
        whole = model.logits(model(ids, Step(places, places), cache.kv))[-1]
        last = Step(places[-1:], places[-1:], pages=pages, lengths=torch.tensor([100]).int())
        alone = model.logits(model(ids[-1:], last, cache.kv))[0]
    assert (alone - whole).norm() / whole.norm() < 1e-3  # float32, but for a code that falls to the other side


def test_rows_write_the_same_alone_in_company_and_as_forks_of_a_page_that_is_not_full(small):
    model, prompt = small(), range(1, 71)
    assert len(prompt) % PAGE_SIZE
    groups = [[request(1, prompt), request(2, prompt), request(3, prompt)], [request(4, (0, 8), 33)]]
    together = write(model, groups)
    assert together == [ids for group in groups for one in group for ids in write(model, [[one]])]


def test_a_long_prompt_in_pieces_is_the_same_however_busy_the_engine_is(small):
    model, long = small(), request(5, range(1, 101))
    quiet = write(model, [[long]], prefill_chunk=16)
    assert write(model, [[request(6, (0, 8), 30)], [long]], prefill_chunk=16)[1:] == quiet


def test_a_page_is_copied_with_its_scales(small):
    cache = PagedCache(small().config, 4 * PAGE_SIZE, CPU, FP8)
    for tensor in (cache.kv.values.view(torch.uint8), cache.kv.scales):
        tensor[:, 1] = 3
    cache.copy(1, 2)
    assert (cache.kv.values.view(torch.uint8)[:, 2] == 3).all() and (cache.kv.scales[:, 2] == 3).all()
    assert not cache.kv.scales[:, 3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8])
def test_a_token_takes_of_the_cache_what_the_plan_says(small, dtype):
    config = small().config
    held = PagedCache(config, 4 * PAGE_SIZE, CPU, dtype).kv
    size = held.values.nbytes + (0 if held.scales is None else held.scales.nbytes)
    assert size == token_bytes(config, dtype) * 5 * PAGE_SIZE  # one page is scratch


def test_an_fp8_cache_holds_nearly_twice_what_a_bfloat16_one_does():
    for shape in SHAPES:
        config = parse_config(SHAPES[shape])
        assert 1.9 < token_bytes(config, torch.bfloat16) / token_bytes(config, FP8) <= 2


def test_load_takes_the_form_of_the_cache_and_receipts_know_it(storyteller):
    book, params = RunBook(), SamplingParams("greedy")
    with load(device="cpu", cache_dtype="fp8", context=128) as playground:
        assert engine_of(playground).runner.cache.kv.scales is not None
        (run,) = book.begin(playground, "Once upon a time", [params], 12)
        for event in run.stream:
            run.add(event)
        run.stats = {"finish_reason": "length"}
        (receipt,) = read_receipts(book.receipt(playground, run))
        assert receipt.cache == "fp8" and replayed(book, playground, receipt)["identical"]
        with pytest.raises(RequestError, match="--cache-dtype plain"):
            replayed(book, playground, replace(receipt, cache="plain"))
    with pytest.raises(RequestError, match="--cache-dtype fp8"):
        replayed(book, storyteller, receipt)
    with pytest.raises(CheckpointError, match="choose plain or fp8"):
        load(device="cpu", cache_dtype="int4")


def test_an_e4m3_cache_of_heads_without_its_values_across_is_refused():
    q, pages, lengths = torch.zeros(1, 4, 32), torch.zeros(1, 1).int(), torch.ones(1).int()
    cache = kernels.KV.zeros(1, 16, widths=(32, 32), dtype=FP8, device="cpu")
    with pytest.raises(ValueError, match="across"):
        kernels.gqa_decode(q, cache, pages, lengths, kernels.Form(True, False), scale=1.0, kv_heads=1)
    parts, rope, slots = torch.zeros(1, 1, 192), torch.zeros(1, 2, 16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="across"):
        kernels.rope_heads(parts, (0, 128, 160), None, rope, slots, cache, heads=4, eps=1e-6, dtype=torch.float32)


def test_a_cache_of_another_dtype_than_the_queries_is_refused(small):
    q, pages, lengths = torch.zeros(1, 4, 32), torch.zeros(1, 1).int(), torch.ones(1).int()
    for values in (torch.zeros(1, 16, 64).bfloat16(), torch.zeros(1, 16, 64).to(FP8)):  # the second has no scales
        with pytest.raises(ValueError, match="share a dtype"):
            kernels.gqa_decode(q, kernels.KV(values), pages, lengths, kernels.Form(True, False), scale=1.0, kv_heads=1)
