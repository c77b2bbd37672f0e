"""Real tokenizers against transformers: `PYTHONPATH=. python tests/real_tokenizers.py FOLDER...`, each with a
tokenizer.json and maybe a tokenizer_config.json. Not part of the tests: the files are large, and not ours.

For 2,000 strings and 2,000 random sequences of ids: ids as transformers has them (of text without control tokens, which
can't be typed here, and without a first one that only `add_bos_token` asks for), decoded text, streamed text, and,
where there is a chat template, a conversation's ids.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from test_tokenizer import SCRIPTS, streamed, strings
from transformers import PreTrainedTokenizerFast

from playground.checkpoint.chat import ChatTemplate
from playground.checkpoint.tokenizer import Tokenizer

COUNT = 2000
TALK = [
    {"role": "user", "content": "Hello there, é 日本 🦊!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": " And you? "},
]


def differences(folder: Path) -> dict[str, list]:
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer(folder, 1 << 30)
    found: dict[str, list] = {"encode": [], "decode": [], "stream": [], "stream of ids": [], "chat": []}
    control = set(ours.control_tokens)
    for text in SCRIPTS + strings(COUNT):
        ids = ours.encode(text)
        if not any(token in text for token in control) and ids != ours.first + theirs(text)["input_ids"]:
            found["encode"].append(text)
        if ours.decode(ids) != theirs.decode(ids, skip_special_tokens=True):
            found["decode"].append(text)
        if streamed(ours, ids) != ours.decode(ids):
            found["stream"].append(text)
    chance, known = random.Random(7), sorted(ours.inner.get_vocab().values())
    for _ in range(COUNT):
        ids = chance.choices(known, k=chance.randint(1, 25))
        if ours.decode(ids) != theirs.decode(ids, skip_special_tokens=True):
            found["decode"].append(ids)
        if streamed(ours, ids).replace("\ufffd", "") != ours.decode(ids).replace("\ufffd", ""):
            found["stream of ids"].append(ids)
    template = ChatTemplate.read(folder, ours)
    if template and getattr(theirs, "chat_template", None):
        for count in (1, 3):
            expected = theirs.apply_chat_template(TALK[:count], add_generation_prompt=True, return_dict=False)
            if list(template.encode(TALK[:count])) != list(expected):
                found["chat"].append(count)
    return found


def main() -> int:
    wrong = 0
    for folder in map(Path, sys.argv[1:]):
        for what, cases in differences(folder).items():
            wrong += len(cases)
            print(f"{folder.name}: {what}: {len(cases)} differ", *map(repr, cases[:3]), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
