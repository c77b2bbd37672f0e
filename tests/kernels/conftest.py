"""Compiling for other cards takes minutes: it begins with the first test here and is asked about by the last."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes of shared memory that one program may have, by compute capability (CUDA programming guide, table of limits)
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@pytest.fixture(scope="session", autouse=True)
def compiling(request, tmp_path_factory):
    """By capability, the process that compiles for such a card and the bytes that a program may have there. All run at
    once; none of them finds anything compiled before."""
    items = [item for item in request.session.items if "test_targets" in item.nodeid]
    wanted = {item.callspec.params["capability"] for item in items}
    script = Path(__file__).with_name("compile_for.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {}
    for capability, shared in ((c, SHARED[c]) for c in SHARED if c in wanted):
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
        command = [sys.executable, str(script), str(capability), str(shared)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(environment)}
        processes[capability] = (subprocess.Popen(command, **pipes), shared)
    yield processes
    for process, _ in processes.values():
        process.kill()
