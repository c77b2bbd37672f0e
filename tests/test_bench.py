"""The bench: figures behind a gate, and the curve of the cache."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import kernels
from playground.bench import __main__ as bench
from playground.bench import floors, timing
from playground.engine import gate


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--json", *arguments])
        code = bench.main()
        return code, *capsys.readouterr()

    return call


@pytest.mark.long
def test_the_bench_prints_figures_of_what_all_rows_write_together(run, monkeypatch):
    monkeypatch.setattr(timing, "RUNS", 1)
    monkeypatch.setattr(timing, "FIRST_TOKENS", 2)
    code, out, _ = run("--rows", "1", "2", "--prompt", "8", "--tokens", "12", "--inspect", "--arriving", "40")
    lines = [json.loads(line) for line in out.splitlines()]
    cases, arrivals = ([line for line in lines if line["what"] == what] for what in ("case", "arrival"))
    assert code == 0 and [line["rows"] for line in (*cases, *arrivals)] == [1, 2, 1, 2]
    for case in cases:
        assert 0 < case["tokens_per_second"] < case["floor_tokens_per_second"]
        assert case["ttft_ms"]["p50"] <= case["ttft_ms"]["max"]
    for line in arrivals:
        assert 0 < line["median_wait_ms"] <= line["longest_wait_ms"]


def test_every_kernel_has_a_family():
    rooms = Path(kernels.__file__).parent.rglob("*.py")
    names = {name for room in rooms for name in re.findall(r"^def (\w+_kernel)\(", room.read_text(), re.MULTILINE)}
    names = {name for name in names if not name.startswith("weight_")}  # of loading
    assert len(names) > 25 and all(floors.family_of(name) != "torch" for name in names), names
    assert floors.family_of("void at::native::copy") == "torch"


@pytest.mark.parametrize("check", ["product_error", "experts_error", "gated_error", "attention_error"])
def test_behind_a_red_gate_there_are_no_figures(check, run, monkeypatch):
    monkeypatch.setattr(gate, check, lambda *_: 0.5)
    code, out, errors = run("--prompt", "8", "--tokens", "12")
    assert code == 1 and out == "" and "the gate is red" in errors


def test_a_row_that_writes_otherwise_in_company_makes_the_gate_red(run, monkeypatch):
    written, params, runs = gate.written, gate.SamplingParams, iter(range(100))

    def other_luck(engine, rows):
        shift = next(runs)
        monkeypatch.setattr(gate, "SamplingParams", lambda *a, seed=0: params(*a, seed=seed + shift))
        return (yield from written(engine, rows))

    monkeypatch.setattr(gate, "written", other_luck)
    code, out, errors = run("--prompt", "8", "--tokens", "12")
    assert code == 1 and out == "" and "other tokens alone" in errors


def test_the_curve_of_the_cache_is_measured_at_growing_lengths(run):
    code, out, _ = run("--curve", "--tokens", "64")
    rows = json.loads(out)["rows"]
    assert code == 0 and [r["length"] for r in rows] == sorted(r["length"] for r in rows)
    assert rows[-1]["uncached_ms"] > rows[-1]["cached_ms"] > 0


def test_a_new_process_says_when_it_had_its_first_token(run):
    code, out, _ = run("--start", "--context", "64")
    line = json.loads(out)
    assert code == 0 and 0 < line["imported_s"] < line["loaded_s"] < line["first_token_s"] < 60


def test_a_process_that_cannot_load_is_told_of(run, tmp_path):
    code, out, errors = run("--start", "--model", str(tmp_path))
    assert code == 2 and out == "" and "what it said stands above" in errors
    assert run("--start", "--shape", "qwen3-0.6b")[0] == 2


def test_what_can_not_be_measured_is_refused_with_a_sentence(run):
    code, _, errors = run("--rows", "99")
    assert code == 2 and "1 to 32 rows" in errors
