"""The command-line options that every entry point shares, with their environment variables."""

from __future__ import annotations

import argparse
import os


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        default=os.environ.get("PLAYGROUND_MODEL"),
        help="checkpoint in the Hub's DeepSeek-V3 format: config.json, tokenizer.json, safetensors "
        "(default: $PLAYGROUND_MODEL, else the embedded storyteller)",
    )
    parser.add_argument(
        "--device",
        default=os.environ.get("PLAYGROUND_DEVICE", "auto"),
        help="auto (a CUDA card if there is one), cuda or cpu (default: $PLAYGROUND_DEVICE, else auto)",
    )
