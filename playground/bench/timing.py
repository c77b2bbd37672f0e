"""How the bench measures an engine: rates, times to first tokens, what an arriving prompt costs the others, kernels."""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch

import kernels
from kernels.bench import Case, microseconds
from playground.bench.floors import family_of, prompts_alone, step_bytes
from playground.checkpoint.config import CheckpointError
from playground.engine.decoder import PATIENCE
from playground.engine.engine import Engine
from playground.engine.requests import Request
from playground.engine.settings import SamplingParams
from playground.model.layers import Product
from playground.model.transformer import Transformer

RUNS, FIRST_TOKENS = 3, 7


def prompt_ids(model: Transformer, length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist())


def add_rows(engine: Engine, rows: int, prompt: int, tokens: int, inspect: bool) -> list:
    """Queues `rows` prompts of their own."""
    params = [SamplingParams("gumbel", 1.0, seed=row) for row in range(rows)]
    requests = [
        Request(
            prompt_ids(engine.model, prompt, row), p, tokens, ignore_eos=True, trace_scales=inspect, inspect=inspect
        )
        for row, p in enumerate(params)
    ]
    return [engine.add([request])[0] for request in requests]


def write(engine: Engine, rows: int, prompt: int, tokens: int, inspect: bool = False) -> list:
    """Runs rows to their end; they hold their times."""
    running = add_rows(engine, rows, prompt, tokens, inspect)
    while engine.busy:
        engine.step()
    return running


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << (31 if device.type == "cuda" else 27), dtype=torch.uint8, device=device).fill_(1)
    target, seconds = torch.empty_like(source), []
    for _ in range(6):
        _synchronise(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steady_rate(engine: Engine, rows: int, prompt: int, tokens: int, inspect: bool) -> float:
    """Tokens per second while all rows write: from the moment when the last of them has its first token to the moment
    when the first of them ends, counting what was written in between and nothing else."""
    written, began = [], 0.0
    running = add_rows(engine, rows, prompt, tokens, inspect)
    while not any(row.finished for row in running):
        engine.step()
        if not began and all(row.new_ids for row in running):
            began, written = time.perf_counter(), [len(row.new_ids) for row in running]
    ended, count = time.perf_counter(), sum(len(row.new_ids) for row in running)
    while engine.busy:
        engine.step()
    if not began or count <= sum(written):
        raise CheckpointError(f"{tokens} tokens are too few to see {rows} rows write together; use more --tokens.")
    return (count - sum(written)) / (ended - began)


def _all_running(rows: list) -> None:
    if any(row.finished for row in rows):
        raise CheckpointError(f"{len(rows)} rows with prompts as long as these never write together; use fewer.")


def first_token_times(engine: Engine, prompt: int, tokens: int, inspect: bool) -> list[float]:
    """Milliseconds of some requests, one right behind the other, sorted."""
    rows = [row for _ in range(FIRST_TOKENS) for row in write(engine, 1, prompt, tokens, inspect)]
    return sorted((row.first_token - row.submitted) * 1e3 for row in rows)


def measure(engine: Engine, rows: int, prompt: int, tokens: int, rate: float, inspect: bool) -> dict:
    """One case, warmed up: medians of some runs. First tokens of requests that write all their tokens, and of those
    that end with the first, which leave the card no rest between prompts."""
    on_card = engine.model.device.type == "cuda"
    for _ in range(1 + (PATIENCE // tokens + 1 if on_card else 0)):  # until the steps are on recordings of their own
        write(engine, rows, prompt, tokens if on_card else 4, inspect)
    if on_card:
        torch.cuda.reset_peak_memory_stats(engine.model.device)
    rates = [steady_rate(engine, rows, prompt, tokens, inspect) for _ in range(RUNS)]
    speed, waits = statistics.median(rates), first_token_times(engine, prompt, tokens, inspect)
    size = sum(step_bytes(engine.model, rows, prompt + tokens // 2, engine.runner.cache.kv.values.dtype).values())
    case = {
        "rows": rows,
        "prompt": prompt,
        "tokens": tokens,
        "tokens_per_second": round(speed, 1),
        "spread": round((max(rates) - min(rates)) / speed, 4),
        "floor_tokens_per_second": round(rows * rate / size, 1),
        "share_of_floor": round(speed * size / rows / rate, 3),
        "ttft_ms": {"p50": round(statistics.median(waits), 2), "max": round(waits[-1], 2)},
        "ttft_in_a_row_ms": round(statistics.median(first_token_times(engine, prompt, 1, inspect)), 2),
    }
    if on_card:
        case["memory_gb"] = round(torch.cuda.max_memory_allocated(engine.model.device) / 1e9, 2)
    return case


def arrival(engine: Engine, rows: int, prompt: int, arriving: int) -> dict:
    """What a prompt of `arriving` tokens costs rows that write while it comes: the longest time between two tokens of
    one of them, beside the median one. Warmed up."""
    gaps: list[float] = []
    for _ in range(4):  # the first meet kinds of pieces for the first and second time
        running, gaps, seen = add_rows(engine, rows, prompt, 64, False), [], {}
        while not all(len(row.new_ids) >= 8 for row in running):
            engine.step()
        _all_running(running)
        request = Request(prompt_ids(engine.model, arriving, 99), SamplingParams("greedy"), 1, ignore_eos=True)
        engine.add([request])
        while engine.busy:
            engine.step()
            for row in running:
                if row.last_token != seen.get(id(row), row.last_token):
                    gaps.append((row.last_token - seen[id(row)]) * 1e3)
                seen[id(row)] = row.last_token
    return {
        "rows": rows,
        "arriving": arriving,
        "longest_wait_ms": round(max(gaps), 2),
        "median_wait_ms": round(statistics.median(gaps), 2),
    }


def _profiled(run) -> Counter[str]:
    """Microseconds of every kernel that `run` launches, by name."""
    found: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:48]] += event.device_time
    return found


def _by_family(found: Counter[str], floors: dict[str, float]) -> list[dict]:
    """Families, each followed by its kernels, largest first; `floors` in microseconds."""
    families: Counter[str] = Counter()
    for name, us in found.items():
        families[family_of(name)] += us
    lines = []
    for family, us in families.most_common():
        floor = round(floors[family], 1) if family in floors else None
        lines.append({"family": family, "us": round(us, 1), "floor_us": floor})
        kernels_of = [(n, t) for n, t in found.most_common() if family_of(n) == family]
        lines += [{"family": family, "kernel": name, "us": round(t, 1)} for name, t in kernels_of]
    return lines


def kernel_times(
    model: Transformer, rows: int, prompt: int, cache_dtype: torch.dtype, rate: float, inspect: bool
) -> dict[str, list]:
    """Where a decode step's time goes, and a prompt's, every kernel after the one before it has ended."""
    steps = 10
    with kernels.one_after_another():
        engine = Engine(model, None, rows, context=prompt + 128, cache_dtype=cache_dtype, share_prefixes=False)
        for _ in range(2):
            write(engine, 1, prompt, 1, inspect)
        fed = _profiled(lambda: write(engine, 1, prompt, 1, inspect))
        running = add_rows(engine, rows, prompt, 128, inspect)
        while not all(len(row.new_ids) >= 4 for row in running):
            engine.step()
        found = _profiled(lambda: [engine.step() for _ in range(steps)])
        _all_running(running)
        while engine.busy:
            engine.step()
    sizes = step_bytes(model, rows, prompt + 8, cache_dtype)
    each = Counter({name: us / steps for name, us in found.items()})
    return {
        "step": _by_family(each, {family: size / rate * 1e6 for family, size in sizes.items()}),
        "prompt": _by_family(fed, {}),
    }


def against_torch(model: Transformer, rows: int) -> list[dict]:
    """The FP8 products of a step with `rows` rows, each alone on weights that the L2 cache has forgotten: ours, which
    may leave partial sums to be added in passing, and torch's (cuBLASLt with the same blocks, and BF16). Those of
    experts have no counterpart there."""
    shapes: Counter[tuple[int, int]] = Counter()
    prefill = prompts_alone(model)
    for part in model.modules():
        multiplied = isinstance(part, Product) and part.multiplied and id(part) not in prefill
        if multiplied and part.fp8 and not part.pieces and len(part.stacks) == 1:
            shapes[part.outputs, part.inputs] += 1
    lines = []
    for (n, k), count in shapes.items():
        case = Case(rows, n, k)
        calls = {"ours": [lambda i=i, case=case: case.ours(i) for i in range(len(case.weights))], **case.against()}
        line = {"n": n, "k": k, "calls": count}
        for name, each in calls.items():
            try:
                line[f"{name}_us"] = round(microseconds(each), 2)
            except (RuntimeError, AttributeError):
                line[f"{name}_us"] = None  # this torch or this card has no such product
        lines.append(line)
    return lines
