"""`python -m kernels.tune`: makes `kernels/gemm/tuned.csv`, tiles for FP8 products of few rows, on the card
at hand (Hopper).

Products are tuned where they stand: in decode layers made of this package's ops, with norms, attention and SwiGLU
between them. So it counts what a tile costs its reader, and what it leaves to the next product's weight, which is asked
for meanwhile. (A product timed by itself, or among norms alone, chose tiles that cost a step up to 5%: NOTES.md.) One
weight after the other gets the candidate that is best for the whole layer. Times are of CUDA graphs of more layers than
the L2 cache holds. The number of splits is chosen for one row and for 32 together, because it may not depend on rows;
lines are kept only where the layer beats the rule by more than noise. A candidate whose result is wrong ends the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from tqdm import tqdm

import kernels
from kernels.bench import ROTATED_BYTES, TOLERANCE, Case, microseconds
from kernels.gemm.sm90_streamed import BLOCK_N, streamed, streamed_tile, streams
from kernels.gemm.tuned import TABLE, Tuned, read_table, write_table
from kernels.launch import capability, is_hopper, multiprocessors, shared_memory

SPLITS = (1, 2, 4)  # of K
BLOCKS = (8, 16)  # of K on their way, at most
PROGRAMS = 64, 512  # fewer leave multiprocessors idle, more take too many partial sums
MARGIN = 0.005  # of a layer's time: what repeated runs differ by
ROWS = 1, 32
LENGTH = 256  # tokens that attention sees
Lines = dict[tuple[int, int], Tuned]  # by (N, K)


class Shape(NamedTuple):
    """Of a dense decoder with grouped-query attention. Without `inner` a layer ends after attention: of a mixture of
    experts only that part has products of this kind."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    def weights(self) -> list[tuple[int, int]]:
        attended = self.heads * self.head_dim
        found = [(attended + 2 * self.kv_heads * self.head_dim, self.hidden), (self.hidden, attended)]
        return found + ([(2 * self.inner, self.hidden), (self.hidden, self.inner)] if self.inner else [])


class Layers:
    """Decode layers of random weights, each with a cache of its own, for `rows` rows."""

    def __init__(self, rows: int, shape: Shape):
        s, half, pages = shape, shape.head_dim // 2, -(-LENGTH // 64)
        self.shape = s
        count = max(2, ROTATED_BYTES // sum(n * k for n, k in s.weights()))
        self.cases = [[Case(rows, n, k, 1) for n, k in s.weights()] for _ in range(count)]
        cuda = {"device": "cuda"}
        values = torch.randn(count, rows * pages, 64, 2 * s.kv_heads * s.head_dim, **cuda).bfloat16()
        self.caches = [kernels.KV(layer) for layer in values]
        self.pages = torch.arange(rows * pages, dtype=torch.int32, **cuda).view(rows, pages)
        self.lengths = torch.full((rows,), LENGTH, dtype=torch.int32, **cuda)
        self.slots = self.pages[:, -1].long() * 64 + 63
        self.angles = torch.rand(rows, 2, half, **cuda)
        self.residual, self.norm = (
            torch.zeros(rows, s.hidden, **cuda).bfloat16(),
            torch.ones(s.hidden, **cuda).bfloat16(),
        )
        self.head_norm = torch.ones(s.head_dim, **cuda).bfloat16()

    def product(self, case: Case, a: kernels.Formed, lines: Lines) -> torch.Tensor:
        _, n, k = case.shape
        b, b_s = case.weights[0]
        tile = streamed_tile(len(a.q), n, k // 128, multiprocessors(b), shared_memory(b), lines.get((n, k)))
        return streamed(a.q, b, a.s, b_s, torch.bfloat16, tile=tile)

    def run(self, lines: Lines) -> None:
        s, form, x, partials = self.shape, kernels.Form(plain=False, fp8=True), self.residual, []
        attended = s.heads * s.head_dim
        starts, scale = (0, attended, attended + s.kv_heads * s.head_dim), s.head_dim**-0.5
        norms = self.head_norm, self.head_norm
        for cases, cache in zip(self.cases, self.caches, strict=True):
            x, act = kernels.add_norm(x, partials, self.norm, 1e-6, form)
            found = self.product(cases[0], act, lines)
            q = kernels.rope_heads(
                found, starts, norms, self.angles, self.slots, cache, heads=s.heads, eps=1e-6, dtype=torch.bfloat16
            )
            out = kernels.gqa_decode(q, cache, self.pages, self.lengths, form, scale=scale, kv_heads=s.kv_heads)
            partials = [self.product(cases[1], out, lines)]
            if s.inner:
                x, act = kernels.add_norm(x, partials, self.norm, 1e-6, form)
                inner = kernels.swiglu(self.product(cases[2], act, lines), form, dtype=torch.bfloat16)
                partials = [self.product(cases[3], inner, lines)]

    def time(self, lines: Lines) -> float:
        """Microseconds of a layer. Raises `ArithmeticError` where a product is wrong."""
        for case in self.cases[0]:
            if not (error := case.error(self.product(case, kernels.Formed(None, case.a, case.a_s), lines))) < TOLERANCE:
                raise ArithmeticError(f"{case.shape}, {lines}: relative error {error:.1e}")
        return microseconds([lambda: self.run(lines)]) / len(self.cases)


def candidates(card: str, n: int, k: int) -> Iterable[Tuned]:
    """Lines without times. Every program has two blocks of K at least."""
    few, many = PROGRAMS
    for splits in SPLITS:
        programs = -(-n // BLOCK_N) * splits
        enough, bearable = programs >= few or splits == SPLITS[-1], programs <= many or splits == SPLITS[0]
        if enough and bearable and k // 128 >= 2 * splits:
            yield from (Tuned(card, n, k, splits, a, b, 0.0, 0.0) for a in BLOCKS for b in BLOCKS)


def tune(card: str, shape: Shape) -> list[Tuned]:
    """The lines of a layer's weights; none where the rule is as good."""
    layers = [Layers(rows, shape) for rows in ROWS]
    known: dict[tuple, float] = {}

    def times(lines: Lines) -> list[float]:
        """For each of ROWS; what only the other rows would see is not timed again."""
        found = []
        for rows, some in zip(ROWS, layers, strict=True):
            seen = (rows, *((n, k, v.splits, v.blocks_16 if rows == 1 else v.blocks_32) for (n, k), v in lines.items()))
            if seen not in known:
                known[seen] = some.time(lines)
            found.append(known[seen])
        return found

    ruled, lines = times({}), {}
    for weight in tqdm(sorted(shape.weights(), key=lambda w: -w[0] * w[1]), unit="weight", leave=False):
        options = [lines, *({**lines, weight: line} for line in candidates(card, *weight))]
        lines = min(options, key=lambda option: sum(t / r for t, r in zip(times(option), ruled, strict=True)))
    again = [[some.time(which) for some in layers] for which in ({}, lines) * 3]  # in turn: clocks drift
    before, after = ([statistics.median(t) for t in zip(*again[i::2], strict=True)] for i in (0, 1))
    print(f"{card} {shape}: microseconds of a layer for {ROWS} rows by the rule {before}, by the table {after}")
    if sum(a / b for a, b in zip(after, before, strict=True)) > len(ROWS) * (1 - MARGIN):
        return []
    return [line._replace(us_1=round(after[0], 2), us_32=round(after[1], 2)) for line in lines.values()]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=int, nargs=5, metavar=tuple(name.upper() for name in Shape._fields), action="append",
        required=True, help="a model's sizes, such as 4096 32 8 128 12288 for Qwen3-8B; INNER 0 for a mixture of "
        "experts; may be repeated",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help=f"put what was found into {TABLE.name}")
    args = parser.parse_args()
    shapes = [Shape(*sizes) for sizes in args.model]
    for shape in shapes:
        if not all(n > 0 and n % 128 == 0 and k > 0 and streams(k) for n, k in shape.weights()):
            parser.error(f"{tuple(shape)}: weights are multiples of 128 both ways, not {shape.weights()}")
        if shape.heads % shape.kv_heads:
            parser.error(f"{tuple(shape)}: HEADS must be a multiple of KV_HEADS")
    if len({weight for shape in shapes for weight in shape.weights()}) < sum(len(s.weights()) for s in shapes):
        parser.error("two of these weights have the same N and K: the table has one line for both; name fewer models")
    if not torch.cuda.is_available() or not is_hopper(device := torch.empty(0, device="cuda")):
        print("error: these products are Hopper's (sm_90), and there is no such card.", file=sys.stderr)
        return 2
    card, table = "sm_{}{}".format(*capability(device)), read_table()
    for shape in shapes:
        for n, k in shape.weights():
            table.pop((card, n, k), None)
        try:
            lines = tune(card, shape)
        except ArithmeticError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        for line in lines:
            print(line)
            table[line[:3]] = line
        if args.write:
            write_table(table.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
