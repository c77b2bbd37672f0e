"""The front door: arguments, an engine, a page. `python app.py --help`. A Hugging Face Space runs this same file."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
import threading
import time

from playground import CheckpointError, EngineError
from playground.arguments import add_model_arguments, engine_options
from playground.engine.events import EngineState
from playground.engine.process import BAD_MODEL, ProcessClient
from playground.shelf import Shelf
from playground.terminal import ended
from playground.ui.words import state_in_words

DRAIN_SECONDS = 5.0  # for what is being written when the program is told to end
CLOSING = "The server is shutting down; try again in a minute."


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
    parser.add_argument("--port", type=port_number, default=port, help=f"port to listen on (default {port})")
    return parser.parse_args()


def port_number(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use a number from 0 to 65535")
    return int(text)


def reach_directly(host: str) -> None:
    """gradio asks the page whether it is up; a proxy that the environment names knows nothing of it."""
    for name in ("no_proxy", "NO_PROXY"):
        known = [one for one in os.environ.get(name, "").split(",") if one]
        os.environ[name] = ",".join(dict.fromkeys([*known, "localhost", "127.0.0.1", "::1", host]))


def open_page(client: ProcessClient, args: argparse.Namespace, models: tuple[str, ...]):
    """Builds the page and puts it on the air, while the engine loads. Raises OSError where it can't listen."""
    from playground.ui.page import HEAD, THEME, build_page
    from playground.ui.visitors import MIDDLEWARE

    page = build_page(Shelf(client, models))
    page.queue(default_concurrency_limit=None)  # rows limit what runs; whoever has none waits in the engine's line
    page.launch(
        server_name=f"[{args.host}]" if ":" in args.host else args.host,  # IPv6, as an address has it
        server_port=args.port,
        prevent_thread_lock=True,
        max_threads=200,  # places in gradio's queue: as many requests can be open at the same time
        state_session_capacity=1000,  # visitors whose runs are remembered
        theme=THEME,
        head=HEAD,
        app_kwargs={"middleware": MIDDLEWARE},
        show_error=False,
        ssr_mode=False,
        run_history=False,
        allowed_paths=[],
        max_file_size="8mb",
        strict_cors=True,
    )
    return page


class Console:
    """Tells on the console what the engine is doing, once a second at most."""

    def __init__(self):
        self.said, self.at = "", 0.0

    def __call__(self, state: EngineState) -> None:
        if state.phase == "ending":
            return  # it will be started again, or can't be, which is told then
        text = state_in_words(state) or "Ready."
        if state.phase == "failed":
            text = f"error: {text}"
        last = state.phase not in ("loading", "preparing")
        if text != self.said and (last or time.monotonic() - self.at > 1):
            self.said, self.at = text, time.monotonic()
            print(text, file=sys.stderr, flush=True)


def drain(client: ProcessClient, page) -> None:
    """Takes nothing new, and gives what is being written, and then painted, some seconds to come to its end."""
    client.closed = CLOSING
    deadline = time.monotonic() + DRAIN_SECONDS
    while (client.running or any(page._queue.active_jobs)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # the last words are on their way


def main() -> int:
    args, ended = parse_arguments(), threading.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: ended.set())
    options = engine_options(args)
    reach_directly(args.host)
    client = ProcessClient(options, Console())
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page works offline and tells nobody
    sys.modules.setdefault("matplotlib", None)  # gradio looks for it at every paint; nothing here draws with it
    try:
        importing = threading.Thread(target=importlib.import_module, args=("gradio",), daemon=True)
        importing.start()  # takes seconds, in which the engine looks at its model
        while client.until_known(0.2) is None:
            if ended.is_set():
                return 0
        importing.join()
        page = open_page(client, args, options.models)
        gc.freeze()  # what is imported stays: to look through it stops all streams for a tenth of a second
        while not ended.wait(0.2) and not client.bad_model:
            pass  # an engine that can't be started any more is told of on the page
        if client.bad_model:
            return BAD_MODEL
        drain(client, page)
        page.close(verbose=False)
        return 0
    except (CheckpointError, EngineError):  # the console has it
        return BAD_MODEL
    except OSError as error:
        words = f"{args.host}:{args.port} can't be listened on ({error}); choose another --host or --port."
        if error.filename is not None:  # gradio keeps uploads in a folder
            words = f"{error.filename} can't be used ({error.strerror}); name another folder in GRADIO_TEMP_DIR."
        print(f"error: {words}", file=sys.stderr)
        return BAD_MODEL
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(ended(main))
