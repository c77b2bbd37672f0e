"""`python -m kernels.tune`: makes `kernels/tuned.csv`, the table of tiles for FP8 products of few rows, on the card at
hand (Hopper).

Weights are tuned as they follow each other in a layer, each product with the norm behind it that adds up its partial
sums: what a tile costs its reader counts, and what it leaves to the next product's weight, which is asked for
meanwhile. (A product tuned by itself chose tiles that cost a step 5%: NOTES.md.) One weight after the other gets the
candidate that is best for the whole layer. Times are of CUDA graphs of as many layers as the L2 cache forgets. The
number of pieces is chosen for one row and for 32 together, because it may not depend on rows; lines are kept only where
the layer beats the rule by more than noise. A candidate whose result is wrong ends the run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable

import torch
from tqdm import tqdm

import kernels
from kernels.bench import TOLERANCE, Case, microseconds
from kernels.launch import capability, is_hopper, multiprocessors, shared_memory
from kernels.streamed import BLOCK_N, streamed, streamed_tile, streams
from kernels.tuned import TABLE, Tuned, read_table, write_table

SPLITS = (1, 2, 4)  # pieces of K
BLOCKS = (8, 16)  # of K on their way, at most
PROGRAMS = 64, 512  # fewer leave multiprocessors idle, more take too many partial sums
MARGIN = 0.005  # of a layer's time: what repeated runs differ by
ROWS = 1, 32
LAYERS = 4
Lines = dict[tuple[int, int], Tuned]  # by (N, K)


class Layers:
    """Products of `rows` rows with weights `[N, K]`, one after another, with the norm behind each; LAYERS times."""

    def __init__(self, rows: int, shapes: list[tuple[int, int]]):
        self.cases = [Case(rows, n, k, LAYERS) for n, k in shapes]
        self.residuals = [torch.zeros(rows, n, dtype=torch.bfloat16, device="cuda") for n, _ in shapes]
        self.norms = [torch.ones(n, dtype=torch.bfloat16, device="cuda") for n, _ in shapes]

    def product(self, case: Case, index: int, lines: Lines) -> torch.Tensor:
        b, b_s = case.weights[index]
        (rows, k), n = case.a.shape, len(b)
        tile = streamed_tile(rows, n, k // 128, multiprocessors(b), shared_memory(b), lines.get((n, k)))
        return streamed(case.a, b, case.a_s, b_s, torch.bfloat16, tile)

    def run(self, lines: Lines) -> None:
        form = kernels.Form(plain=False, fp8=True)
        for index in range(LAYERS):
            for case, residual, norm in zip(self.cases, self.residuals, self.norms, strict=True):
                kernels.add_norm(residual, [self.product(case, index, lines)], norm, 1e-6, form)

    def time(self, lines: Lines) -> float:
        """Microseconds of a layer. Raises `ArithmeticError` where a product is wrong."""
        for case in self.cases:
            if not (error := case.error(self.product(case, 0, lines))) < TOLERANCE:
                raise ArithmeticError(f"{lines}: relative error {error:.1e}")
        return microseconds([lambda: self.run(lines)]) / LAYERS


def candidates(card: str, n: int, k: int) -> Iterable[Tuned]:
    """Lines without times. Every program has two blocks of K at least."""
    few, many = PROGRAMS
    for splits in SPLITS:
        programs = -(-n // BLOCK_N) * splits
        enough, bearable = programs >= few or splits == SPLITS[-1], programs <= many or splits == SPLITS[0]
        if enough and bearable and k // 128 >= 2 * splits:
            yield from (Tuned(card, n, k, splits, a, b, 0.0, 0.0) for a in BLOCKS for b in BLOCKS)


def tune(card: str, shapes: list[tuple[int, int]]) -> list[Tuned]:
    """The lines of a layer's weights; none where the rule is as good."""
    layers = [Layers(rows, shapes) for rows in ROWS]
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
    for shape in tqdm(sorted(shapes, key=lambda s: -s[0] * s[1]), unit="weight", leave=False):
        options = [lines, *({**lines, shape: line} for line in candidates(card, *shape))]
        lines = min(options, key=lambda option: sum(t / r for t, r in zip(times(option), ruled, strict=True)))
    again = [[some.time(which) for some in layers] for which in ({}, lines) * 3]  # in turn: clocks drift
    before, after = ([statistics.median(t) for t in zip(*again[i::2], strict=True)] for i in (0, 1))
    print(f"{card} {shapes}: by the rule {before}, by the table {after} microseconds for {ROWS} rows")
    if sum(a / b for a, b in zip(after, before, strict=True)) > len(ROWS) * (1 - MARGIN):
        return []
    return [line._replace(us_1=round(after[0], 2), us_32=round(after[1], 2)) for line in lines.values()]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layer", nargs="+", metavar="NxK", action="append", required=True,
        help="a layer's weights in the order in which they are multiplied, such as 6144x4096 4096x4096 24576x4096 "
        "4096x12288 for Qwen3-8B; may be repeated",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help=f"put what was found into {TABLE.name}")
    args = parser.parse_args()
    try:
        layers = [[tuple(map(int, shape.split("x"))) for shape in layer] for layer in args.layer]
        if not all(n > 0 and n % 128 == 0 and k > 0 and streams(k) for layer in layers for n, k in layer):
            raise ValueError
    except ValueError:
        parser.error("a weight is NxK, two multiples of 128, such as 6144x4096")
    if not torch.cuda.is_available() or not is_hopper(device := torch.empty(0, device="cuda")):
        print("error: these products are Hopper's (sm_90), and there is no such card.", file=sys.stderr)
        return 2
    card, table = "sm_{}{}".format(*capability(device)), read_table()
    for layer in layers:
        for n, k in layer:
            table.pop((card, n, k), None)
        for line in tune(card, layer):
            print(line)
            table[line[:3]] = line
        if args.write:
            write_table(table.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
