"""Asks for the kernels of some products as a dry run on a Hopper card would, without one, and lets two processes
compile them. Prints how many there were, how many were done, and how many of them are not in Triton's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from compile_for import JITFunction, cached, pretend, products

from kernels.compiling import Compilers, only_asked_for

compilers, wanted, run = Compilers(2), {}, JITFunction.run
pretend(90, 227 << 10)
JITFunction.run = run  # not the one that compiles for the test of all targets


def ask(key, one) -> None:
    wanted[key] = one
    compilers.ask(key, one)


def binaries() -> int:
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))


with only_asked_for(ask):
    products(1)
    cached(70, torch.bfloat16)
while not compilers.look(1):
    pass
compilers.close()
before = binaries()
for one in wanted.values():
    one.compile()
print(json.dumps({"asked": len(wanted), "done": compilers.done, "missed": binaries() - before}))
