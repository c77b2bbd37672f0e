"""Kernels that other processes compile are there when they are launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.long
def test_what_a_dry_run_asks_for_is_compiled_by_other_processes_and_found_by_this_one(tmp_path):
    paths = os.pathsep.join(map(str, (HERE, HERE.parents[1])))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "compile_aside.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["asked"] == found["done"] > 20 and found["failed"] == []
    assert found["missed"] == found["others"] == 0
