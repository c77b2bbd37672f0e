"""Compiling kernels on all cores, before anybody waits for them: a dry run asks for every kernel that a piece of work
needs, and processes compile them into Triton's cache on disk. Threads would not do: most of compiling is Python.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

_SIZE = struct.Struct("<I")
_LONGEST = 1000  # bytes of an error


class Wanted(NamedTuple):
    """One kernel to compile: what Triton makes a launch's arguments into."""

    function: JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    target: Any

    def compile(self) -> None:
        source = GluonASTSource if self.function.is_gluon() else ASTSource
        made = source(self.function, self.signature, self.constants, self.attributes)
        triton.compile(made, target=self.target, options=self.options)


class _Pickler(pickle.Pickler):
    """Kernels cross by name: both sides have them. Their key in Triton's cache crosses as well, since it depends on
    which kernel a process has looked at first."""

    def persistent_id(self, value: Any) -> tuple[str, str, str] | None:
        return (value.fn.__module__, value.fn.__name__, value.cache_key) if isinstance(value, JITFunction) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, known: tuple[str, str, str]) -> JITFunction:
        module, name, key = known
        function = getattr(importlib.import_module(module), name)
        function.hash = key
        return function


class Compilers:
    """`count` processes, forked from this one before it touches a card: they share what it has imported, and know the
    card by name alone. They end when this process does, or with `close`."""

    def __init__(self, count: int, strangers: tuple[socket.socket, ...] = ()):
        """`strangers`: sockets of this process whose other side waits for their end."""
        self.lines: list[socket.socket] = []
        self.processes: list[int] = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            if (process := os.fork()) == 0:
                for line in (ours, *self.lines, *strangers):
                    os.close(line.fileno())
                _work(theirs)
            theirs.close()
            self.lines.append(ours)
            self.processes.append(process)
        self.idle, self.busy = deque(self.lines), set()
        self.waiting: deque[bytes] = deque()
        self.asked, self.done = set(), 0
        self.failed: list[str] = []  # what could not be compiled, and why: it is told again where it is launched

    def ask(self, key: Any, wanted: Wanted) -> None:
        if key not in self.asked:
            self.asked.add(key)
            text = io.BytesIO()
            _Pickler(text).dump(tuple(wanted))
            self.waiting.append(text.getvalue())
        self.look()

    def look(self, seconds: float = 0.0) -> bool:
        """Hands out work and hears what is done, for so long at most; whether all of it is."""
        for line in select.select(list(self.busy), [], [], 0 if self.waiting and self.idle else seconds)[0]:
            self.busy.discard(line)
            self.done, said = self.done + 1, b""
            with suppress(ConnectionError):
                said = line.recv(_LONGEST)
            if said:
                self.idle.append(line)
                self.failed += [said.decode(errors="replace")] if said != b"." else []
        while self.waiting and self.idle:
            line, task = self.idle.popleft(), self.waiting.popleft()
            try:
                line.sendall(_SIZE.pack(len(task)) + task)
                self.busy.add(line)
            except OSError:  # it is gone; the others do its work
                self.waiting.appendleft(task)
        return not self.busy and not (self.waiting and self.idle)

    def close(self) -> None:
        for line in self.lines:
            line.close()
        for process in self.processes:
            with suppress(ChildProcessError):
                os.waitpid(process, 0)
        self.lines, self.processes, self.idle, self.busy = [], [], deque(), set()


def _work(line: socket.socket) -> None:
    """A compiler's life."""
    stream, null = line.makefile("rb"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    while len(head := stream.read(_SIZE.size)) == _SIZE.size:
        said, task = b".", stream.read(*_SIZE.unpack(head))
        try:
            Wanted(*_Unpickler(io.BytesIO(task)).load()).compile()
        except Exception as error:
            said = f"{type(error).__name__}: {error}".encode()[:_LONGEST]
        with suppress(OSError):
            line.sendall(said)
    os._exit(0)


class _Zeros(TorchFunctionMode):
    """New memory is zeros: what a kernel would have written there may be an index for what comes next."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        zeroed = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, torch.Tensor.new_empty: _new_zeros}
        return zeroed.get(function, function)(*args, **(kwargs or {}))


def _new_zeros(tensor: torch.Tensor, *size, **more) -> torch.Tensor:
    return tensor.new_zeros(*size, **more)


@contextmanager
def only_asked_for(ask: Callable[[Any, Wanted], object]) -> Iterator[None]:
    """Within it, launches do not run: what they would have to compile first is asked for. Whatever torch itself does is
    done, on zeros in place of the kernels' results. Nothing else may launch meanwhile."""
    run, compile_ = JITFunction.run, JITFunction._do_compile
    placeholders: list[tuple[dict, Any]] = []

    def dry(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    def asked(self, key, signature, device, constants, options, attributes, warmup):
        kernels, _, target, *_ = self.device_caches[device]
        ask((self, key), Wanted(self, signature, constants, attributes, dict(options.__dict__), target))
        kernels[key] = self  # the next launch alike has nothing to ask for
        placeholders.append((kernels, key))

    JITFunction.run, JITFunction._do_compile = dry, asked
    try:
        with _Zeros():
            yield
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_
        for kernels, key in placeholders:
            kernels.pop(key, None)


def compilers_of(strangers: tuple[socket.socket, ...]) -> Compilers | None:
    """As many as there are cores, up to 16; None where nothing can be forked, or there is no card to compile for."""
    if not hasattr(os, "fork") or sys.platform == "darwin" or not torch.cuda.is_available():
        return None
    return Compilers(min(os.cpu_count() or 1, 16), strangers)
