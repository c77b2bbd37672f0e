"""How long a new process takes from starting Python to a model's first token: `python -m playground.bench --start`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from playground.checkpoint.config import CheckpointError

PROMPT = "Once upon a time, there was a little girl"


def read_once(folder: Path) -> None:
    """Brings a checkpoint's files into the page cache, so that what is measured behind it is not the disk."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as weights:
            while weights.read(16 << 20):
                pass


def start_times(folder: Path, options: dict, caches: tuple[str, ...]) -> Iterator[dict]:
    """Seconds since starting Python, of a process for each state of Triton's `caches`: first there is none, then what
    the process before has left. `options` of `playground.load`. Raises `CheckpointError` where such a process fails."""
    read_once(folder)
    with tempfile.TemporaryDirectory() as cache:
        for state in caches:
            task = json.dumps([time.time(), str(folder), options])
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            command = [sys.executable, "-m", "playground.bench.starting", task]
            ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if ended.returncode:
                raise CheckpointError("The process that was to load the model failed; what it said stands above.")
            yield {"triton_cache": state, **json.loads(ended.stdout.splitlines()[-1])}


def main() -> int:
    began, folder, options = json.loads(sys.argv[1])
    times = {}

    def note(what: str) -> None:
        times[f"{what}_s"] = round(time.time() - began, 2)

    from playground.api import load  # part of what is measured

    note("imported")
    try:
        with load(folder, **options) as playground:
            note("loaded")
            next(iter(playground.stream(PROMPT, max_new_tokens=1)))
            note("first_token")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
