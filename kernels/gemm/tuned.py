"""Measured tiles of FP8 products of few rows: `tuned.csv`, which `python -m kernels.tune` makes. What isn't in it
follows the rule in `sm90_streamed.py`, so nothing is ever tuned while a model starts.

A line holds for one generation of cards and one weight `[N, K]`: into how many splits K is cut, which is the same for
any number of rows, and up to how many blocks of K a program has on their way, for up to 16 rows and for up to 32."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.launch import capability

TABLE = Path(__file__).with_name("tuned.csv")


class Tuned(NamedTuple):
    card: str  # such as sm_90
    n: int
    k: int
    splits: int
    blocks_16: int
    blocks_32: int
    us_1: float  # microseconds of a whole layer that has all lines of its model, for one row
    us_32: float  # for 32 rows


def read_table(path: Path = TABLE) -> dict[tuple[str, int, int], Tuned]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = [
            Tuned(
                *(kind(line[name]) for name, kind in zip(Tuned._fields, (str, *[int] * 5, float, float), strict=True))
            )
            for line in csv.DictReader(file)
        ]
    return {line[:3]: line for line in lines}


def write_table(lines: Iterable[Tuned], path: Path = TABLE) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Tuned._fields)
        writer.writerows(sorted(lines))


_table = cache(read_table)


def tuned(weight: torch.Tensor) -> Tuned | None:
    """What the table has for products with `weight [N, K]` on its card."""
    if not weight.is_cuda:
        return None
    major, minor = capability(weight)
    return _table().get((f"sm_{major}{minor}", *weight.shape))
