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


class Page:
    """A page that runs."""

    def __init__(self, url: str, process: subprocess.Popen):
        self.url, self.process = url, process

    @property
    def engine(self) -> int | None:
        """The process id of its engine, None where it has none."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        found = [int(pid) for file in children for pid in file.read_text().split()]
        return next((pid for pid in found if b"playground.engine" in command_of(pid)), None)


def command_of(pid: int) -> bytes:
    """Empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def serve_page(
    *arguments: str, root: Path = ROOT, environment: dict | None = None, reached_at: str = "127.0.0.1", **options
):
    """`python app.py` of the tree at `root` with these arguments, on a free port; `options` of `Popen`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--device", "cpu", "--port", str(port), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {})
    environment.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=root, env=environment, **options)
    url = f"http://{reached_at}:{port}"
    try:
        while True:
            assert process.poll() is None, "app.py ended"
            assert time.monotonic() - began < 4 * READY_SECONDS, "the page did not come up"
            try:
                urllib.request.urlopen(url, timeout=2).read()
                break
            except OSError:
                time.sleep(0.1)
        print(f"\npage answers {time.monotonic() - began:.1f} s after Python started")
        yield Page(url, process)
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def serve(*arguments: str):
    """As `serve_page`; yields the address alone."""
    with serve_page(*arguments) as page:
        yield page.url
