"""Text files of documents separated by `<|endoftext|>` lines: reading, holding out, training a tokenizer, packing."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 file, in order, without the separator lines and without surrounding blank space."""
    text = path.read_text(encoding="utf-8")
    return [doc for part in text.split(END_OF_TEXT) if (doc := part.strip())]


def is_held_out(document: str) -> bool:
    """1% of all documents, chosen by content, so that an exact copy never stands on the other side."""
    return zlib.crc32(document.encode()) % 100 == 0


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every string has an encoding. Id 0 is `<|endoftext|>`, put before each encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer


def encode_all(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Each document's ids (uint16), beginning with `<|endoftext|>`."""
    return [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(documents)]


def windows(
    sources: list[tuple[list[np.ndarray], float]], length: int, batch: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches `[batch, length + 1]` of token ids, with the running number of each token's document.

    A pass takes every document of a source `copies` times (a fraction: that share of them, drawn anew each pass),
    shuffles them all, joins them and cuts windows; what is left over opens the next pass.
    """
    need = batch * (length + 1)
    tokens, numbers = np.empty(0, np.uint16), np.empty(0, np.int32)
    while True:
        docs = []
        for source, copies in sources:
            docs += source * int(copies)
            docs += [source[i] for i in rng.permutation(len(source))[: int(len(source) * (copies % 1))]]
        order = rng.permutation(len(docs))
        tokens = np.concatenate([tokens, *(docs[i] for i in order)])
        joined = np.repeat(np.arange(len(docs), dtype=np.int32), [len(docs[i]) for i in order])
        numbers = np.concatenate([numbers - len(docs), joined])
        used = len(tokens) // need * need
        for start in range(0, used, need):
            part = slice(start, start + need)
            yield tokens[part].reshape(batch, -1), numbers[part].reshape(batch, -1)
        tokens, numbers = tokens[used:], numbers[used:]
