"""What every command does at the terminal's edge: output that can't be encoded, a reader that has gone, a disk that is
full end a program with an exit code, and at most one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

PIPE_CLOSED = 141  # as a shell reports SIGPIPE


def ended(main: Callable[[], int]) -> int:
    """Runs `main`; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # characters that a terminal's encoding lacks
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read, such as `head`, has enough
        _write_nowhere()
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is not None:  # of a file, not of what is written here
            raise
        _write_nowhere()
        print(f"error: the output can't be written: {error.strerror or error}.", file=sys.stderr)
        return 1


def _write_nowhere() -> None:
    """What is still in a buffer would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
