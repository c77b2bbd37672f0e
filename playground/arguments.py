"""The command-line options that every entry point shares, with their environment variables."""

from __future__ import annotations

import argparse
import os


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="FOLDER|ID",
        default=os.environ.get("PLAYGROUND_MODEL"),
        help="a checkpoint folder, or a Hub id such as Qwen/Qwen3-0.6B-FP8, with @revision if you like "
        "(default: $PLAYGROUND_MODEL, else the embedded storyteller)",
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
        default=int(os.environ["PLAYGROUND_CONTEXT"]) if "PLAYGROUND_CONTEXT" in os.environ else None,
        metavar="TOKENS",
        help="longest prompt and continuation of a row; less needs less memory (default: what the model can)",
    )


def model_options(args: argparse.Namespace) -> dict:
    """What `playground.load` takes, from the options above."""
    return {"model": args.model, "device": args.device, "dtype": args.dtype, "context": args.context}
