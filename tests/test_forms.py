"""One checkpoint in both forms of its weights, side by side."""

from __future__ import annotations

import pytest
from running import engine_of

from playground import EngineError, RequestError, SamplingParams, load
from playground.inspect.columns import read_columns, titles
from playground.inspect.fork import Alignment
from playground.inspect.run import Run

PROMPT = "The old fox"


def finished(run):
    for event in run.stream:
        run.add(event)
    return run


@pytest.fixture(scope="module")
def both(storyteller):
    """The same setting and noise, on FP8 and on BF16 weights: of the first seed with which they part."""
    for seed in range(20):
        settings = [{"weights": form, "temperature": 1.2, "seed": seed} for form in ("fp8", "bf16")]
        params, forms = read_columns(settings, True)
        streams = storyteller.compare(PROMPT, params, 40, forms, inspect=True)
        runs = [finished(Run.of(s, storyteller.tokenizer, PROMPT)) for s in streams]
        if runs[0].ids != runs[1].ids:
            return runs
    pytest.fail("20 runs of 40 tokens, and quantisation changed none of them")


def test_a_column_writes_what_a_playground_loaded_in_its_form_writes(both, storyteller):
    with load(device="cpu", dtype="bf16") as restored:
        for run, playground in zip(both, (storyteller, restored), strict=True):
            assert run.text == "".join(e.text for e in playground.stream(PROMPT, run.params, 40))
    assert both[0].params.seed == both[1].params.seed


def test_where_weights_differ_the_fork_gives_each_column_its_own_raw_probabilities(both):
    found = Alignment(both)
    found.update()
    assert [name.endswith(f"{form} weights") for name, form in zip(titles(both), ("FP8", "BF16"), strict=True)]
    for row in found.fork["rows"]:
        assert row["raw"] is None and any(cell["raw"] is not None for cell in row["cells"])
    first = found.fork["rows"][0]["cells"]
    assert first[0]["raw"] != first[1]["raw"]


def test_columns_that_can_not_all_begin_leave_none_running(storyteller):
    params = [SamplingParams("greedy")] * 2
    with pytest.raises(RequestError, match="2 settings and 1 forms"):
        storyteller.compare("word " * 30, params, 40, ["fp8"])
    with pytest.raises(RequestError, match="from 1 to 2048"):
        storyteller.compare("word " * 30, params, 4000, ["fp8", "bf16"])
    assert not storyteller.client.running


@pytest.mark.parametrize("weights", ["int4", 8, True, ["fp8"], {"fp8": 1}, "FP8", "x" * 10_000])
def test_weights_that_do_not_exist_are_refused(weights):
    with pytest.raises(RequestError, match="choose fp8 or bf16"):
        read_columns([{"weights": weights}, {}], True)


def test_the_second_form_is_loaded_once_and_closed_with_the_first():
    with load(device="cpu", context=128) as playground:
        other = playground.in_form("bf16")
        engine = engine_of(other)
        assert engine_of(playground.in_form("bf16")) is engine and other.in_form("bf16") is other
        assert engine_of(playground).model.config.quantization and not engine.model.config.quantization
        assert playground.loaded_forms == ("fp8", "bf16")
    assert engine.model is None
    with pytest.raises(EngineError, match="closed"):
        other.stream("Once")
