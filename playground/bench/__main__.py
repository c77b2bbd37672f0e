"""`python -m playground.bench`: how fast a model writes, against the floor that the card's memory sets.

First a gate: every product, those of experts too, against its dequantised operands, SwiGLU at a product's end against
SwiGLU behind it, a prompt's attention against float64, and a row's tokens alone against the same row in company. Red
gate, no figures. Then, for each number of rows: tokens per second of all rows together, time to first token, the share
of the floor (bytes that a step must read, at the rate at which this card copies), and memory; a table, and a JSON
object for each case. `--kernels` adds where the time of a step and of a prompt goes, kernel by kernel, run one after
another; `--arriving` what a prompt costs the rows that write while it comes; `--against torch` the same products by
torch.
Instead, `--curve` shows what the KV cache buys, and `--start` how long a new process takes to a model's first token.

`--page` measures what visitors get: it starts app.py and sends it many streams over HTTP, all at once and one every
100 ms. For each number of `--streams`, per line: tokens per second while those write together whom the page admitted
at first (from the last of their first texts to the first end), and over the whole time from the first request to the
last token; the share of what the engine alone writes with as many rows, inspector on; milliseconds from sending a
request to its first text, also in a first, cold pass; milliseconds between events; how far the slowest is behind the
mean; who was refused, and in which words. `--page --start` takes the time from starting Python to the page, and to the
first text of a run. A `--shape` is written as a random checkpoint first, which `--keep FOLDER` saves for the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

import kernels
from playground.arguments import add_model_arguments, model_options
from playground.bench.page import bench_page
from playground.bench.shapes import SHAPES, random_model
from playground.bench.starting import start_times
from playground.bench.timing import against_torch, arrival, copy_rate, kernel_times, measure
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.hub import EMBEDDED, find
from playground.engine.curve import cache_curve
from playground.engine.engine import Engine, driven
from playground.engine.gate import faults
from playground.engine.loading import choose_cache, choose_device, load_model, plain_dtype
from playground.model.transformer import Transformer
from playground.terminal import ended


def print_cases(cases: list[dict]) -> None:
    print(
        f"{'rows':>5} {'prompt':>7} {'tok/s':>9} {'floor':>9} {'share':>6} {'TTFT ms':>8} {'worst':>8} {'in a row':>8} "
        f"{'GB':>6}"
    )
    for case in cases:
        ttft = case["ttft_ms"]
        print(
            f"{case['rows']:>5} {case['prompt']:>7} {case['tokens_per_second']:>9.1f} "
            f"{case['floor_tokens_per_second']:>9.1f} {case['share_of_floor']:>6.1%} {ttft['p50']:>8.2f} "
            f"{ttft['max']:>8.2f} {case['ttft_in_a_row_ms']:>8.2f} {case.get('memory_gb', 0):>6.2f}"
        )


def print_arrivals(lines: list[dict]) -> None:
    for line in lines:
        print(
            f"a prompt of {line['arriving']} tokens comes while {line['rows']} write: they wait "
            f"{line['longest_wait_ms']} ms at most for a token, {line['median_wait_ms']} ms in the median"
        )


def print_kernels(what: str, lines: list[dict]) -> None:
    print(f"{what}, each kernel after the other, microseconds")
    for line in lines:
        floor = f"floor {line['floor_us']:>9.1f}" if line.get("floor_us") else ""
        print(
            f"{line['us']:>10.1f}  {floor:<15}  {'  ' if 'kernel' in line else ''}{line.get('kernel', line['family'])}"
        )


def print_products(lines: list[dict]) -> None:
    print(f"{'N x K':>14} {'calls':>6} {'ours us':>9} {'cuBLASLt':>9} {'BF16':>9}")
    for line in lines:
        times = [line[f"{name}_us"] for name in ("ours", "cublaslt", "bf16")]
        shown = " ".join(f"{'-':>9}" if t is None else f"{t:>9.2f}" for t in times)
        print(f"{line['n']:>7} x{line['k']:>5} {line['calls']:>6} {shown}")


def bench(name: str, model: Transformer, args: argparse.Namespace, cache_dtype: torch.dtype) -> bool:
    """Prints a model's figures; False where the gate is red."""
    limit, most = model.config.max_position_embeddings, max(*args.rows, 5)
    behind = max(args.tokens, 128 if args.kernels else 0, 64 if args.arriving else 0)  # tokens behind a prompt
    context = max(args.prompt + behind, args.arriving + 1, 128)
    if context > limit:
        raise CheckpointError(f"What is asked for makes {context} tokens, and the context of {name} holds {limit}.")
    room = min(most + bool(args.arriving), kernels.INVARIANT_ROWS)
    engine = Engine(model, None, room, context=context, cache_dtype=cache_dtype, share_prefixes=False)
    if wrong := list(driven(engine, faults(model, engine))):
        print(f"{name}: the gate is red, no figures. {'; '.join(wrong)}", file=sys.stderr)
        return False
    rate = copy_rate(model.device)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    print(f"{name} on {device}, copy {rate / 1e12:.2f} TB/s; gate green", file=sys.stderr)
    about = {"shape": name, "device": device, "cache": str(cache_dtype)[6:]}

    def show(what: str, lines: list[dict], table) -> None:
        if not args.json:
            table(lines)
        for line in lines:
            print(json.dumps({**about, "what": what, **line}), flush=True)

    show("case", [measure(engine, n, args.prompt, args.tokens, rate, args.inspect) for n in args.rows], print_cases)
    if args.arriving:
        writing = [min(rows, room - 1) for rows in args.rows]  # and one that comes
        show("arrival", [arrival(engine, n, args.prompt, args.arriving) for n in writing], print_arrivals)
    if args.kernels:
        times = kernel_times(model, max(args.rows), args.prompt, cache_dtype, rate, args.inspect)
        show("step", times["step"], lambda lines: print_kernels("a step", lines))
        show("prompt", times["prompt"], lambda lines: print_kernels("a prompt", lines))
    if args.against:
        show("product", against_torch(model, max(args.rows)), print_products)
    return True


def curve(model: Transformer, args: argparse.Namespace, cache_dtype: torch.dtype) -> bool:
    limit = model.config.max_position_embeddings - 8
    tokens = min(args.tokens, limit)
    tokens = max(tokens, 64)
    engine = Engine(model, None, 1, context=tokens + 4, cache_dtype=cache_dtype)
    points = driven(engine, cache_curve(engine, (model.config.bos_token_id or 0, 5, 6, 7), tokens))
    rows = [asdict(point) for point in points]
    if args.json:
        print(json.dumps({"device": str(model.device), "rows": rows}))
        return True
    print(f"{'length':>8} {'cached ms/token':>16} {'uncached ms/token':>18}")
    for row in rows:
        print(f"{row['length']:>8} {row['cached_ms']:>16.2f} {row['uncached_ms']:>18.2f}")
    return True


def start(args: argparse.Namespace) -> None:
    """Prints how long new processes take to the first token of a checkpoint, which nothing else has loaded."""
    if args.shape:
        raise CheckpointError("--start loads a checkpoint from its files: name one by --model instead of --shape.")
    device, folder = choose_device(args.device).type, find(args.model) if args.model else EMBEDDED
    options = model_options(args) | {"device": device}
    del options["model"]
    caches = ("empty", "filled") if device == "cuda" else ("unused",)
    for line in start_times(folder, options, caches):
        if not args.json:
            print(
                f"Triton's cache {line['triton_cache']}: imported after {line['imported_s']} s, loaded after "
                f"{line['loaded_s']} s, first token after {line['first_token_s']} s"
            )
        print(json.dumps({"model": args.model or "storyteller", "device": device, "what": "start", **line}), flush=True)


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
    parser.add_argument(
        "--arriving", type=int, default=0, metavar="N", help="also what a prompt of N tokens costs rows that write"
    )
    parser.add_argument(
        "--against", choices=["torch"], help="also the products by cuBLASLt and in BF16, with the most rows (CUDA)"
    )
    parser.add_argument("--curve", action="store_true", help="time per token as the text grows, cache on and off")
    parser.add_argument(
        "--start", action="store_true", help="seconds from starting Python to a checkpoint's first token"
    )
    parser.add_argument(
        "--page", action="store_true", help="what visitors of app.py get, over HTTP; with --start: how soon"
    )
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8, 32, 64], help="of --page: visitors (default 1 8 32 64)"
    )
    parser.add_argument(
        "--every",
        type=float,
        default=0.1,
        metavar="SECONDS",
        help="of --page: between two visitors in the second pattern of arrival (default 0.1; 0: only all at once)",
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", help="of --page: where the random checkpoint of a --shape stays for the next time"
    )
    parser.add_argument("--json", action="store_true", help="JSON lines alone, without the tables")
    add_model_arguments(parser)
    return parser


def main() -> int:
    args = arguments().parse_args()
    try:
        device = choose_device(args.device)
        if not all(1 <= rows <= kernels.INVARIANT_ROWS for rows in args.rows) or args.prompt < 1 or args.tokens < 8:
            raise CheckpointError(f"Use 1 to {kernels.INVARIANT_ROWS} rows, a prompt of 1 and 8 tokens at least.")
        if (args.kernels or args.against) and device.type != "cuda":
            raise CheckpointError("--kernels and --against time the kernels of a CUDA card, and there is none.")
        if not all(1 <= streams <= 1024 for streams in args.streams) or not 0 <= args.every <= 60:
            raise CheckpointError("Use 1 to 1024 streams, and 0 to 60 seconds between them.")
        green = True
        if args.page:
            with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as kept:
                for shape in args.shape or [None]:
                    green &= bench_page(shape, args, Path(kept))
            return 0 if green else 1
        if args.start:
            start(args)
            return 0
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
    sys.exit(ended(main))
