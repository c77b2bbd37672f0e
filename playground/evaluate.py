"""`python -m playground.evaluate FILE`: bits per byte of a text file under a model.

The file holds documents separated by `<|endoftext|>` lines. Each document is scored by itself, from the token that
begins a text; the bits of all its tokens are divided by its UTF-8 bytes. A document longer than the context is scored
in windows that overlap by half, each token with at least half a context before it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from playground.api import EMBEDDED, choose_device, load_model
from playground.arguments import add_model_arguments
from playground.config import CheckpointError
from playground.corpus import read_documents
from playground.hub import find
from playground.model.step import Step
from playground.model.transformer import Transformer
from playground.tokenizer import Tokenizer


@torch.inference_mode()
def document_nats(model: Transformer, ids: list[int]) -> float:
    """Negative log-likelihood, in nats, of `ids[1:]` given what stands before each."""
    context, done, nats = model.config.max_position_embeddings, 1, 0.0
    while done < len(ids):
        start = 0 if done == 1 else done - context // 2
        window = torch.tensor(ids[start : start + context], device=model.device)
        hidden = model(window, Step(torch.arange(len(window), device=model.device), slots=None))
        scored = slice(done - start - 1, len(window) - 1)
        logprobs = model.logits(hidden[scored]).log_softmax(-1)
        targets = window[done - start :]
        nats -= logprobs.gather(-1, targets[:, None]).double().sum().item()
        done = start + len(window)
    return nats


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, documents: list[str]) -> float:
    nats = size = 0.0
    for document in tqdm(documents, unit="doc", disable=not sys.stderr.isatty()):
        nats += document_nats(model, tokenizer.encode(document))
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
        model, _ = load_model(folder, device, form=args.dtype, context=args.context)
        value = bits_per_byte(model, Tokenizer(folder, model.config.vocab_size), documents)
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"bits_per_byte": round(value, 6)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
