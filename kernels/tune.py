"""`python -m kernels.tune`: makes `kernels/tuned.csv`, the table of tiles for FP8 products of few rows, on the card at
hand (Hopper).

Every candidate is timed as it stands in a model: behind it comes the norm that adds up its partial sums, so that more of
them cost what their reader pays, and the next product's weight is asked for meanwhile. Times are of CUDA graphs that
rotate through more weights than the L2 cache holds. A candidate whose result is wrong ends the run. The number of pieces
is chosen for one row and for 32 together, because it may not depend on rows; a line is taken over only where it beats
the rule by more than noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial

import torch
from tqdm import tqdm

import kernels
from kernels.bench import TOLERANCE, Case, microseconds
from kernels.launch import capability, is_hopper, multiprocessors, shared_memory
from kernels.streamed import BLOCK_N, streamed, streamed_tile, streams
from kernels.tuned import TABLE, Tuned, read_table, write_table

SPLITS = (1, 2, 4)  # pieces of K
BLOCKS = (4, 8, 16)  # of K on their way, at most
PROGRAMS = 64, 512  # fewer leave multiprocessors idle, more take too many partial sums
MARGIN = 0.01  # what repeated runs differ by
ROWS = 1, 32


class Chain:
    """A product of `rows` rows and the norm behind it."""

    def __init__(self, rows: int, n: int, k: int):
        self.case = Case(rows, n, k)
        self.residual = torch.zeros(rows, n, dtype=torch.bfloat16, device="cuda")
        self.norm = torch.ones(n, dtype=torch.bfloat16, device="cuda")

    def call(self, line: Tuned | None, index: int) -> torch.Tensor:
        case, (b, b_s) = self.case, self.case.weights[index]
        (rows, k), n = case.a.shape, len(b)
        tile = streamed_tile(rows, n, k // 128, multiprocessors(b), shared_memory(b), line)
        parts = streamed(case.a, b, case.a_s, b_s, torch.bfloat16, tile)
        kernels.add_norm(self.residual, [parts], self.norm, 1e-6, kernels.Form(plain=False, fp8=True))
        return parts

    def time(self, line: Tuned | None) -> float:
        """Raises `ArithmeticError` where the product is wrong."""
        if not (error := self.case.error(self.call(line, 0))) < TOLERANCE:
            raise ArithmeticError(f"{line}: relative error {error:.1e}")
        return microseconds([partial(self.call, line, index) for index in range(len(self.case.weights))])


def candidates(card: str, n: int, k: int) -> Iterable[Tuned]:
    """Lines without times. Every program has two blocks of K at least."""
    few, many = PROGRAMS
    for splits in SPLITS:
        programs = -(-n // BLOCK_N) * splits
        enough, bearable = programs >= few or splits == SPLITS[-1], programs <= many or splits == SPLITS[0]
        if enough and bearable and k // 128 >= 2 * splits:
            yield from (Tuned(card, n, k, splits, blocks, blocks, 0.0, 0.0) for blocks in BLOCKS)


def tune(card: str, n: int, k: int) -> Tuned | None:
    """The best line for a weight, or None where the rule is as good."""
    chains = [Chain(rows, n, k) for rows in ROWS]
    ruled = [chain.time(None) for chain in chains]
    best: dict[int, list[tuple[float, int]]] = {}
    for line in candidates(card, n, k):
        times = [chain.time(line) for chain in chains]
        kept = best.setdefault(line.splits, [(float("inf"), 0)] * len(ROWS))
        best[line.splits] = [min(old, (new, line.blocks_16)) for old, new in zip(kept, times, strict=True)]
    if not best:
        return None
    relative = {s: sum(t / r for (t, _), r in zip(found, ruled, strict=True)) for s, found in best.items()}
    splits = min(relative, key=relative.get)
    if relative[splits] > len(ROWS) * (1 - MARGIN):
        return None
    (us_1, blocks_16), (us_32, blocks_32) = best[splits]
    return Tuned(card, n, k, splits, blocks_16, blocks_32, round(us_1, 2), round(us_32, 2))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weight", type=int, nargs=2, metavar=("N", "K"), action="append", default=[],
        help="a weight's shape; may be repeated (default: those in the table)",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help=f"put what was found into {TABLE.name}")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not is_hopper(device := torch.empty(0, device="cuda")):
        print("error: these products are Hopper's (sm_90), and there is no such card.", file=sys.stderr)
        return 2
    card, table = "sm_{}{}".format(*capability(device)), read_table()
    shapes = [tuple(shape) for shape in args.weight] or [(n, k) for at, n, k in table if at == card]
    if wrong := [shape for shape in shapes if min(shape) < 1 or shape[0] % 128 or not streams(shape[1])]:
        print(f"error: N and K are multiples of 128, not {wrong[0]}.", file=sys.stderr)
        return 2
    for n, k in tqdm(shapes, unit="weight"):
        line = tune(card, n, k)
        tqdm.write(f"{n} x {k}: " + (str(line) if line else "the rule is as good"))
        table.pop((card, n, k), None)
        if line:
            table[line[:3]] = line
        if args.write:
            write_table(table.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
