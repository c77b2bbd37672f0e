"""Compiling kernels on all cores, before anybody waits for them: a dry run asks for every kernel that a piece of work
needs, and processes (`compiler.py`) compile them into Triton's cache on disk. Threads would not do: most of the work of
compiling is Python.
"""

from __future__ import annotations

import io
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

SIZE = struct.Struct("<I")  # of a task, in bytes
LONGEST = 1000  # bytes of an error


class Wanted(NamedTuple):
    """One kernel to compile: what Triton makes a launch's arguments into."""

    function: Any  # JITFunction
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    target: Any


class _Pickler(pickle.Pickler):
    """Kernels cross by name: both sides have them. Their key in Triton's cache crosses as well, since it depends on
    which kernel a process has looked at first."""

    def persistent_id(self, value: Any) -> tuple[str, str, str] | None:
        from triton.runtime.jit import JITFunction

        return (value.fn.__module__, value.fn.__name__, value.cache_key) if isinstance(value, JITFunction) else None


class Compilers:
    """`count` processes, which take a few seconds to import what they need; what is asked for meanwhile waits. They end
    when this process does, or with `close`."""

    def __init__(self, count: int):
        pairs = [socket.socketpair() for _ in range(count)]
        theirs = [pair[1].fileno() for pair in pairs]
        command = [sys.executable, "-m", "kernels.compiler", *map(str, theirs)]
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(command, pass_fds=theirs, **quiet)
        for _, their in pairs:
            their.close()
        self.lines = [ours for ours, _ in pairs]
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
                said = line.recv(LONGEST)
            if said:
                self.idle.append(line)
                self.failed += [said.decode(errors="replace")] if said != b"." else []
        while self.waiting and self.idle:
            line, task = self.idle.popleft(), self.waiting.popleft()
            try:
                line.sendall(SIZE.pack(len(task)) + task)
                self.busy.add(line)
            except OSError:  # it is gone; the others do its work
                self.waiting.appendleft(task)
        return not self.busy and not (self.waiting and self.idle)

    def close(self) -> None:
        for line in self.lines:
            line.close()
        # they take a moment to end, for which nobody need wait
        threading.Thread(target=self.process.wait, name="compilers' end", daemon=True).start()
        self.lines, self.idle, self.busy = [], deque(), set()


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
    from triton.runtime.jit import JITFunction

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


def compilers() -> Compilers | None:
    """As many as there are cores, up to 16; None where nothing can be forked, or there is no card to compile for."""
    if not hasattr(os, "fork") or sys.platform == "darwin" or not torch.cuda.is_available():
        return None
    return Compilers(min(os.cpu_count() or 1, 16))
