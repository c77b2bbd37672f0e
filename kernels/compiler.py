"""`python -m kernels.compiler SOCKET...`: compiles kernels for another process, one process for each socket. Started by
`compiling.py`. None of them touches a card: of it they know the name."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import socket
import sys
from contextlib import suppress
from typing import Any

import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.compiling import LONGEST, SIZE, Wanted


class Card:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0


class Unpickler(pickle.Unpickler):
    """Of what `compiling.py` pickled in the same program."""

    def persistent_load(self, known: tuple[str, str, str]) -> JITFunction:
        module, name, key = known
        function = getattr(importlib.import_module(module), name)
        function.hash = key
        return function


def compiled(wanted: Wanted) -> Any:
    """The kernel, from Triton's cache or into it."""
    source = GluonASTSource if wanted.function.is_gluon() else ASTSource
    made = source(wanted.function, wanted.signature, wanted.constants, wanted.attributes)
    return triton.compile(made, target=wanted.target, options=wanted.options)


def make_launcher(kernel: Any) -> None:
    """Before 3.7, Triton launches kernels of each signature by C code of their own, which gcc takes 0.25 s for."""
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def work(line: socket.socket) -> None:
    """Until the other side is gone: a task, and in answer a dot, or what was wrong with it."""
    stream = line.makefile("rb")
    while len(head := stream.read(SIZE.size)) == SIZE.size:
        said, task = b".", stream.read(*SIZE.unpack(head))
        try:
            wanted = Wanted(*Unpickler(io.BytesIO(task)).load())
            driver.set_active(Card(wanted.target))  # some kernels ask what they are compiled for
            make_launcher(compiled(wanted))
        except Exception as error:
            said = f"{type(error).__name__}: {error}".encode()[:LONGEST]
        with suppress(OSError):
            line.sendall(said)


def main() -> None:
    lines = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    for line in lines:
        if os.fork() == 0:
            for other in lines:
                if other is not line:
                    other.close()
            work(line)
            os._exit(0)
    for line in lines:
        line.close()
    for _ in lines:
        os.wait()


if __name__ == "__main__":
    main()
