"""`python -m kernels.bench`: one block-scaled FP8 product against the card, for the shapes of Qwen3-8B and DeepSeek-V3.

Each case first multiplies fresh random operands and is compared with their dequantised product; a wrong result prints
no figure. Times are of CUDA graphs that rotate through more weights than the L2 cache holds. For a single row the
product is left as the partial sums that its readers add up; `--against torch` times cuBLASLt (FP8) and BF16 beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys

import torch
import torch.nn.functional as F

import kernels

SHAPES = [(4096, 4096), (6144, 4096), (24576, 4096), (4096, 12288), (7168, 2048), (24576, 1536)]  # N, K
TOLERANCE = 4e-3  # rounding of the result to bfloat16
ROTATED_BYTES = 256 << 20


class Case:
    """Operands of one product, with as many weights as make the L2 cache forget."""

    def __init__(self, m: int, n: int, k: int, count: int | None = None):
        generator = torch.Generator("cuda").manual_seed(m + n + k)
        a = torch.randn(m, k, device="cuda", generator=generator).bfloat16()
        self.plain, self.shape = a, (m, n, k)
        self.a, self.a_s = kernels.act_quant(a)
        count = count or max(2, math.ceil(ROTATED_BYTES / (n * k)))
        weights = (torch.randn(n, k, device="cuda", generator=generator).bfloat16() for _ in range(count))
        self.weights = [kernels.weight_quant(w) for w in weights]

    def ours(self, index: int) -> torch.Tensor:
        return kernels.gemm_partials(
            self.a, self.weights[index][0], self.a_s, self.weights[index][1], out_dtype=torch.bfloat16
        )

    def error(self, partials: torch.Tensor) -> float:
        """Of a product with the first weight, relative."""
        weight = kernels.weight_dequant(*self.weights[0], dtype=torch.float32).double()
        exact = kernels.act_dequant(self.a, self.a_s).double() @ weight.T
        out = kernels.add_up(partials, dtype=torch.float32).double()
        return ((out - exact).norm() / exact.norm()).item()

    def against(self) -> dict[str, list]:
        """The same product by torch: BF16, and FP8 with the same blocks where cuBLASLt has it."""
        (m, _, k), plain = self.shape, [kernels.weight_dequant(*w, dtype=torch.bfloat16) for w in self.weights]
        calls = {"bf16": [lambda w=w: F.linear(self.plain, w) for w in plain]}
        rows = -(-m // 4) * 4  # cuBLASLt wants the scales of A along M, and M padded to 4, and those of B along K
        a = F.pad(self.a.view(torch.uint8), (0, 0, 0, rows - m)).view(self.a.dtype)
        a_s = torch.ones(k // 128, rows, device="cuda").T
        a_s[:m] = self.a_s
        pad = -(-(k // 128) // 4) * 4
        scales = [F.pad(s, (0, pad - k // 128)).T[: k // 128] for _, s in self.weights]
        calls["cublaslt"] = [
            lambda q=q, s=s: torch._scaled_mm(a, q.T, a_s, s, out_dtype=torch.bfloat16)
            for (q, _), s in zip(self.weights, scales, strict=True)
        ]
        return calls


def microseconds(calls: list) -> float:
    """Median time of a call, of replays of a graph that makes all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    times = []
    for _ in range(9):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / repeats / len(calls))
    return statistics.median(times)


def run(m: int, n: int, k: int, against: bool) -> dict:
    """One line of the table. Raises `ArithmeticError` where the product is wrong."""
    case = Case(m, n, k)
    if not (error := case.error(case.ours(0))) < TOLERANCE:
        raise ArithmeticError(f"M={m} N={n} K={k}: relative error {error:.1e}; no figures")
    line = {
        "m": m,
        "n": n,
        "k": k,
        "us": round(microseconds([lambda i=i: case.ours(i) for i in range(len(case.weights))]), 2),
    }
    if against:
        for name, calls in case.against().items():
            try:
                line[name] = round(microseconds(calls), 2)
            except (RuntimeError, AttributeError) as reason:
                line[name] = None
                print(f"{name} can't do M={m} N={n} K={k}: {str(reason).splitlines()[0]}", file=sys.stderr)
    line["tb_per_s"] = round(n * k / line["us"] / 1e6, 2)
    line["tflop_per_s"] = round(2 * m * n * k / line["us"] / 1e6, 1)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 4096], help="M (default 1 16 4096)")
    parser.add_argument("--against", choices=["torch"], help="also cuBLASLt's FP8 product and the BF16 one")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this measures a CUDA card, and there is none.", file=sys.stderr)
        return 2
    for m in args.rows:
        lines = []
        for n, k in SHAPES:
            try:
                lines.append(run(m, n, k, args.against == "torch"))
            except ArithmeticError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(
                json.dumps(lines[-1]) if args.json else "  ".join(f"{name} {v}" for name, v in lines[-1].items()),
                flush=True,
            )
        unit = "tflop_per_s" if m > 64 else "tb_per_s"
        print(
            f"M={m}: geometric mean {statistics.geometric_mean(line[unit] for line in lines):.2f} {unit}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
