"""`python -m playground.bench`: how fast a model writes, against the floor that the card's memory sets.

First a gate: every product against its dequantised operands, and a row's tokens alone against the same row in company.
Red gate, no figures. Then, for each number of rows: tokens per second of all rows together, time to first token, the
share of the floor (bytes that a step must read, at the rate at which this card copies), and memory. `--kernels` adds
the time of every kernel of a step with the most rows, run one after another. `--curve` shows what the KV cache buys
instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

import kernels
from playground.api import EMBEDDED, choose_cache, choose_device, load_model, plain_dtype
from playground.arguments import add_model_arguments
from playground.config import CheckpointError
from playground.engine.cache import token_bytes
from playground.engine.engine import Engine
from playground.engine.request import Request, SamplingParams
from playground.engine.service import Service
from playground.hub import find
from playground.inspect.curve import cache_curve
from playground.model.attention import LatentAttention
from playground.model.layers import Activation, Product
from playground.model.moe import Gate
from playground.model.transformer import Transformer
from playground.shapes import SHAPES, random_model

GATE = 4e-3  # rounding of a result to bfloat16, as the tests of the kernels allow it
RUNS, FIRST_TOKENS = 3, 9


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


@torch.inference_mode()
def product_error(product: Product, rows: int) -> float:
    """Relative error of a product of random rows against its dequantised operands, in float64."""
    x = torch.randn(rows, product.inputs, device=product.weight.device).to(product.dtype)
    formed = kernels.formed(x, kernels.Form(not product.fp8, product.fp8))
    a, b = formed.plain, product.weight[0]
    if product.fp8:
        a = kernels.act_dequant(formed.q, formed.s)
        b = kernels.weight_dequant(b, product.scale[0], dtype=torch.float32)
    exact = a.double() @ b.double().T
    restored = a if product.fp8 and product.decoded is not None else None
    out = kernels.add_up(product(Activation(formed, restored)), dtype=torch.float32)
    return ((out.double() - exact).norm() / exact.norm()).item()


def gate(model: Transformer, engine: Engine) -> list[str]:
    """What is wrong, in words; empty where figures may be printed."""
    wrong, seen = [], set()
    for name, part in model.named_modules():
        if not isinstance(part, Product) or not part.multiplied or part.pieces:
            continue
        if (shape := (part.outputs, part.inputs, part.fp8)) not in seen:
            seen.add(shape)
            errors = [product_error(part, rows) for rows in (1, kernels.INVARIANT_ROWS, 200)]
            if not max(errors) < GATE:  # NaN is wrong, too
                wrong.append(f"{name}: relative error {max(errors):.1e}")
    alone, together = write(engine, 1, 64, 32)[0], write(engine, 5, 64, 32)[0]
    if alone.new_ids != together.new_ids:
        wrong.append("a row writes other tokens alone than in company")
    return wrong


def step_bytes(model: Transformer, rows: int, length: int, cache_dtype: torch.dtype) -> float:
    """The fewest bytes that a step reads: every weight that it uses, once, and the cache of each row."""
    c, total = model.config, model.lm_head.weight.nbytes
    prefill = {id(part.expand_latent) for part in model.modules() if isinstance(part, LatentAttention)}
    for part in model.modules():
        if isinstance(part, LatentAttention):  # in the form that decode absorbs
            total += part.absorb_keys.nbytes + part.absorb_values.nbytes
        elif isinstance(part, Gate):
            total += part.weight.nbytes
        elif id(part) in prefill:
            continue
        elif isinstance(part, Product) and part.multiplied and part.weight is not None:
            size = part.weight.nbytes + (part.scale.nbytes if part.fp8 else 0)
            size = size if part.decoded is None else part.decoded.nbytes  # what a CPU reads
            if len(part.stacks) > 1:  # experts: those that at least one of the rows is expected to choose
                missed = (1 - c.moe.num_experts_per_tok / c.moe.n_routed_experts) ** rows
                size *= (c.moe.n_routed_experts * (1 - missed) + part.spare) / len(part.weight)
            total += size
    return total + rows * length * token_bytes(c, cache_dtype)


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


def measure(engine: Engine, rows: int, prompt: int, tokens: int, rate: float, inspect: bool) -> dict:
    """One case, warmed up: medians of some runs."""
    write(engine, rows, prompt, 4, inspect)
    rates = []
    for _ in range(RUNS):
        rates.append(steady_rate(engine, rows, prompt, tokens, inspect))
    waits = sorted(
        r.first_token - r.submitted for _ in range(FIRST_TOKENS) for r in write(engine, 1, prompt, 1, inspect)
    )
    speed = statistics.median(rates)
    floor = rows * rate / step_bytes(engine.model, rows, prompt + tokens // 2, engine.cache.kv.values.dtype)
    return {
        "rows": rows,
        "prompt": prompt,
        "tokens": tokens,
        "tokens_per_second": round(speed, 1),
        "spread": round((max(rates) - min(rates)) / speed, 4),
        "floor_tokens_per_second": round(floor, 1),
        "share_of_floor": round(speed / floor, 3),
        "ttft_ms": {"p50": round(statistics.median(waits) * 1e3, 2), "p95": round(waits[-1] * 1e3, 2)},
    }


def kernel_times(model: Transformer, rows: int, prompt: int, cache_dtype: torch.dtype) -> list[dict]:
    """Microseconds of every kernel in a decode step, largest first."""
    steps = 10
    with kernels.one_after_another():
        engine = Engine(model, None, rows, context=prompt + 128, cache_dtype=cache_dtype, share_prefixes=False)
        running = add_rows(engine, rows, prompt, 128, inspect=False)
        while not all(len(row.new_ids) >= 4 for row in running):
            engine.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name[:48], []).append(event.device_time)
    rows = [{"kernel": n, "calls": len(t) / steps, "us": round(sum(t) / steps, 1)} for n, t in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def bench(name: str, model: Transformer, args: argparse.Namespace, cache_dtype: torch.dtype) -> bool:
    """Prints a model's table, or JSON lines; False where the gate is red."""
    limit, context = model.config.max_position_embeddings, max(args.prompt + args.tokens, 128)
    if context > limit:
        raise CheckpointError(f"--prompt and --tokens make {context} tokens, and the context of {name} holds {limit}.")
    engine = Engine(model, None, max(*args.rows, 5), context=context, cache_dtype=cache_dtype, share_prefixes=False)
    if wrong := gate(model, engine):
        print(f"{name}: the gate is red, no figures. {'; '.join(wrong)}", file=sys.stderr)
        return False
    rate = copy_rate(model.device)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    print(f"{name} on {device}, copy {rate / 1e12:.2f} TB/s; gate green", file=sys.stderr)
    if not args.json:
        print(f"{'rows':>5} {'prompt':>7} {'tok/s':>9} {'floor':>9} {'share':>6} {'TTFT ms':>8} {'p95':>8}")
    for rows in args.rows:
        case = measure(engine, rows, args.prompt, args.tokens, rate, args.inspect)
        if args.json:
            print(json.dumps({"shape": name, "device": device, "cache": str(cache_dtype)[6:], **case}), flush=True)
            continue
        ttft, share = case["ttft_ms"], case["share_of_floor"]
        print(
            f"{rows:>5} {args.prompt:>7} {case['tokens_per_second']:>9.1f} {case['floor_tokens_per_second']:>9.1f} "
            f"{share:>6.1%} {ttft['p50']:>8.2f} {ttft['p95']:>8.2f}",
            flush=True,
        )
    if model.device.type == "cuda":
        print(f"memory, at most: {torch.cuda.max_memory_allocated(model.device) / 1e9:.2f} GB", file=sys.stderr)
    if args.kernels:
        for row in kernel_times(model, max(args.rows), args.prompt, cache_dtype):
            print(
                json.dumps(row) if args.json else f"{row['us']:>9.1f} us  {row['calls']:>6.1f} calls  {row['kernel']}"
            )
    return True


def curve(model: Transformer, args: argparse.Namespace, cache_dtype: torch.dtype) -> bool:
    limit = model.config.max_position_embeddings - 8
    tokens = min(args.tokens, limit)
    tokens = max(tokens, 64)
    service = Service(Engine(model, None, 1, context=tokens + 4, cache_dtype=cache_dtype))
    rows = list(cache_curve(service, [model.config.bos_token_id or 0, 5, 6, 7], tokens))
    service.close()
    if args.json:
        print(json.dumps({"device": str(model.device), "rows": rows}))
        return True
    print(f"{'length':>8} {'cached ms/token':>16} {'uncached ms/token':>18}")
    for row in rows:
        print(f"{row['length']:>8} {row['cached_ms']:>16.2f} {row['uncached_ms']:>18.2f}")
    return True


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m playground.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="random weights of this shape; may be repeated"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="rows that write together (default 1)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default 128)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that each row writes (default 256)")
    parser.add_argument(
        "--inspect", action="store_true", help="with each token's alternatives, noise and activation scales"
    )
    parser.add_argument("--kernels", action="store_true", help="also each kernel's time, with the most rows (CUDA)")
    parser.add_argument("--curve", action="store_true", help="time per token as the text grows, cache on and off")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_model_arguments(parser)
    return parser


def main() -> int:
    args = arguments().parse_args()
    try:
        device = choose_device(args.device)
        if not all(1 <= rows <= kernels.INVARIANT_ROWS for rows in args.rows) or args.prompt < 1 or args.tokens < 8:
            raise CheckpointError(f"Use 1 to {kernels.INVARIANT_ROWS} rows, a prompt of 1 and 8 tokens at least.")
        if args.kernels and device.type != "cuda":
            raise CheckpointError("--kernels times the kernels of a CUDA card, and there is none.")
        green = True
        for shape in args.shape or [None]:
            if shape:
                model = random_model(shape, device, plain_dtype(device))
            else:
                folder = find(args.model) if args.model else EMBEDDED
                model, _ = load_model(folder, device, None, args.dtype, args.context, args.cache_dtype)
            name, cache_dtype = shape or args.model or "storyteller", choose_cache(args.cache_dtype, model.dtype)
            with torch.inference_mode():
                green &= curve(model, args, cache_dtype) if args.curve else bench(name, model, args, cache_dtype)
            del model
        return 0 if green else 1
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
