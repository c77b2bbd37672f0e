"""`python -m playground.evaluate FILE`: bits per byte of a text file under a model.

The file holds documents separated by `<|endoftext|>` lines. Each document is scored by itself, from the token that
begins a text; the bits of all its tokens are divided by its UTF-8 bytes. A document longer than the context is scored
in windows that overlap by half, each token with at least half a context before it. With `--cache-dtype fp8` every
token reads the keys and values before it, and its own, from such a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import kernels
from playground.arguments import add_model_arguments
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.hub import EMBEDDED, find
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.cache import PagedCache
from playground.engine.loading import choose_device, load_model
from playground.model.step import Step
from playground.model.transformer import Transformer
from playground.terminal import ended
from playground.train.corpus import read_documents


@torch.inference_mode()
def document_nats(model: Transformer, ids: list[int], cache: kernels.KV | None = None) -> float:
    """Negative log-likelihood, in nats, of `ids[1:]` given what stands before each. `cache` has room for a context."""
    context, done, nats = model.config.max_position_embeddings, 1, 0.0
    while done < len(ids):
        start = 0 if done == 1 else done - context // 2
        window = torch.tensor(ids[start : start + context], device=model.device)
        places = torch.arange(len(window), device=model.device)
        hidden = model(window, Step(places, None if cache is None else places), cache)
        scored = slice(done - start - 1, len(window) - 1)
        logprobs = model.logits(hidden[scored]).log_softmax(-1)
        targets = window[done - start :]
        nats -= logprobs.gather(-1, targets[:, None]).double().sum().item()
        done = start + len(window)
    return nats


def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, documents: list[str], cache: kernels.KV | None = None
) -> float:
    """`cache` as in `document_nats`."""
    nats = size = 0.0
    for document in tqdm(documents, unit="doc", disable=not sys.stderr.isatty()):
        nats += document_nats(model, tokenizer.encode(document), cache)
        size += len(document.encode())
    return nats / math.log(2) / size


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m playground.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="UTF-8 text, documents separated by <|endoftext|> lines")
    add_model_arguments(parser)
    args = parser.parse_args()
    try:
        documents = read_documents(args.file)
        if not documents:
            raise CheckpointError(f"{args.file} holds no text; give a file with at least one document.")
        folder, device = find(args.model) if args.model else EMBEDDED, choose_device(args.device)
        model, room = load_model(folder, device, None, args.dtype, args.context, args.cache_dtype)
        kept = room.cache_dtype != model.dtype  # else a forward's own keys and values are the same
        cache = PagedCache(model.config, room.context, device, room.cache_dtype).kv if kept else None
        value = bits_per_byte(model, Tokenizer(folder, model.config.vocab_size), documents, cache)
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"bits_per_byte": round(value, 6)}))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
