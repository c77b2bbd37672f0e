"""The front door: arguments, an engine, a page. `python app.py --help`. A Hugging Face Space runs this same file."""

from __future__ import annotations

import argparse
import os
import sys

from playground import CheckpointError
from playground.arguments import add_model_arguments, shelf_options
from playground.shelf import Shelf


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python app.py",
        description="FP8 Playground: watch a block-scaled FP8 language model write, in the browser.",
    )
    add_model_arguments(parser, several=True)
    in_space = "SPACE_ID" in os.environ
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if in_space else "127.0.0.1")
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    parser.add_argument("--host", default=host, help=f"address to listen on (default {host})")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default {port})")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page works offline and tells nobody
    try:
        shelf = Shelf(**shelf_options(args))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from playground.ui.page import CSS, THEME, build_page  # gradio takes seconds: a bad folder is told before

    # Each torch operation lets go of the interpreter lock and asks for it again; with the default of 5 ms the engine
    # waits that long whenever the page is at work. Measured on two cores: 43 against 36 tokens/s.
    sys.setswitchinterval(0.0005)
    page = build_page(shelf)
    page.queue(max_size=32)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            theme=THEME,
            css=CSS,
            show_error=False,
            ssr_mode=False,
            run_history=False,
            allowed_paths=[],
            max_file_size="8mb",
            strict_cors=True,
        )
    except OSError:
        print(f"error: {args.host}:{args.port} can't be listened on; choose another --port.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
