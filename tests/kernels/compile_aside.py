"""Asks for the kernels of some products as a dry run on a Hopper card would, without one, and lets two processes
compile them. Prints how many there were, how many were done, what failed, how many are not in Triton's cache, and how
many are others than this process makes of them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from compile_for import ENTRIES, JITFunction, cached, pretend, products

from kernels.compiler import compiled
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
    ENTRIES["act_quant"](torch.zeros(4, 256))
while not compilers.look(1):
    pass
compilers.close()
before = binaries()
theirs = [compiled(one).asm["ptx"] for one in wanted.values()]
found = {"asked": len(wanted), "done": compilers.done, "failed": compilers.failed, "missed": binaries() - before}
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
ours = [compiled(one).asm["ptx"] for one in list(wanted.values())[::3]]
print(json.dumps(found | {"others": sum(a != b for a, b in zip(theirs[::3], ours, strict=True))}))
