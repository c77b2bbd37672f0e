"""The command-line options that every entry point shares, with their environment variables."""

from __future__ import annotations

import argparse
import os

from playground.engine.requests import Options


def add_model_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """`several`: the option may be repeated, and the variable may hold several models with commas between."""
    parser.add_argument(
        "--model",
        metavar="FOLDER|ID",
        action="append" if several else "store",
        default=None if several else next(iter(_models_of_environment()), None),
        help="a checkpoint folder, or a Hub id such as Qwen/Qwen3-0.6B-FP8, with @revision if you like; "
        + ("repeat it and the page offers a choice " if several else "")
        + "(default: $PLAYGROUND_MODEL, else the embedded storyteller)",
    )
    parser.add_argument(
        "--device",
        default=os.environ.get("PLAYGROUND_DEVICE", "auto"),
        help="auto (a CUDA card if there is one), cuda or cpu (default: $PLAYGROUND_DEVICE, else auto)",
    )
    parser.add_argument(
        "--dtype",
        default=os.environ.get("PLAYGROUND_DTYPE", "auto"),
        help="auto and fp8 run FP8, quantising a plain checkpoint at load; bf16 leaves projections unquantised "
        "(default: $PLAYGROUND_DTYPE, else auto)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=os.environ.get("PLAYGROUND_CONTEXT") or None,
        metavar="TOKENS",
        help="longest prompt and continuation of a row; less needs less memory "
        "(default: $PLAYGROUND_CONTEXT, else what the model can)",
    )
    parser.add_argument(
        "--cache-dtype",
        default=os.environ.get("PLAYGROUND_CACHE_DTYPE", "plain"),
        help="plain keeps the KV cache unquantised; fp8 keeps it in E4M3 with a scale for each key and value: half of "
        "the room and of the reading, for a small error (default: $PLAYGROUND_CACHE_DTYPE, else plain)",
    )


def _models_of_environment() -> list[str]:
    whole = os.environ.get("PLAYGROUND_MODEL", "")
    if os.path.isdir(whole):  # whose name may hold a comma
        return [whole]
    return [name.strip() for name in whole.split(",") if name.strip()]


def engine_options(args: argparse.Namespace) -> Options:
    """What an engine with several models takes, from the options above."""
    models = tuple(dict.fromkeys(args.model or _models_of_environment()))
    return Options(models, "", args.device, args.dtype, args.context, args.cache_dtype)


def model_options(args: argparse.Namespace) -> dict:
    """What `playground.load` takes, from the options above."""
    return {name: getattr(args, name) for name in ("model", "device", "dtype", "context", "cache_dtype")}
