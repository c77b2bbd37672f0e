"""The page as a user starts it: `python app.py` in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY_SECONDS = 15


@contextmanager
def serve(*arguments: str):
    """Yields the address of `python app.py` with these arguments, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--device", "cpu", "--port", str(port), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "app.py ended"
            assert time.monotonic() - began < 4 * READY_SECONDS, "the page did not come up"
            try:
                urllib.request.urlopen(url, timeout=2).read()
                break
            except OSError:
                time.sleep(0.1)
        print(f"\npage ready {time.monotonic() - began:.1f} s after Python started")
        yield url
    finally:
        process.terminate()
        process.wait(10)
