"""Compiling kernels side by side, before anybody waits for them: a dry run asks for every kernel that a piece of work
needs, and threads compile them. Much of that is C++ and ptxas, which let the other threads go on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction


class _Asked(AsyncCompileMode):
    """Leaves without waiting: a kernel that is launched before it is there waits by itself."""

    def __exit__(self, *_) -> None:
        active_mode.set(None)


class _Zeros(TorchFunctionMode):
    """New memory is zeros: what a kernel would have written there may be an index for what comes next."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        zeroed = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, torch.Tensor.new_empty: _new_zeros}
        return zeroed.get(function, function)(*args, **(kwargs or {}))


def _new_zeros(tensor: torch.Tensor, *size, **more) -> torch.Tensor:
    return tensor.new_zeros(*size, **more)


@contextmanager
def only_compiled(pool: Executor) -> Iterator[list[Future]]:
    """Within it, launches do not run: what they need is compiled on the threads of `pool`, as the list tells. Whatever
    torch itself does is done, on zeros in place of the kernels' results. One at a time, and nothing else may launch
    meanwhile."""
    run = JITFunction.run

    def ask(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    asked = _Asked(pool, ignore_errors=True)
    JITFunction.run = ask
    try:
        with asked, _Zeros():
            yield asked.raw_futures
    finally:
        JITFunction.run = run
