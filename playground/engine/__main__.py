"""`python -m playground.engine`: the engine in a process of its own. Started by the page, not by people."""

from __future__ import annotations

import argparse
import os
import sys

from playground.engine.process import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.engine", description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="the file descriptor that it shares with the page")
    code = serve(parser.parse_args().socket)
    sys.stdout.flush()
    os._exit(code)  # at once: threads that read and write, and the card's own, have nothing to clear up


if __name__ == "__main__":
    main()
