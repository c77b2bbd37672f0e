"""Which regular expressions of a file are refused: those that can take time without end, and no others."""

from __future__ import annotations

import json

import pytest

from playground.checkpoint.config import CheckpointError
from playground.checkpoint.hub import EMBEDDED
from playground.checkpoint.patterns import may_never_end
from playground.checkpoint.tokenizer import Tokenizer

REAL = {
    "cl100k, Llama 3, Qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "DeepSeek-V3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"
    r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}",
    "BLOOM, with brackets in a class": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "a repeated word": "(abc)+",
    "a group that may be there": "(a+)?b",
    "a bracket as a class's first": "[]a]+",
}


@pytest.mark.parametrize("pattern", REAL.values(), ids=REAL)
def test_patterns_of_real_tokenizers_are_accepted(pattern):
    assert not may_never_end(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|aa)+$", "(?:a*)*b", "((a+))+b", "x(a{2,})*y", "(([a-z])+.)+[A-Z]", r"(\s+x){2,}"]
)
def test_a_tokenizer_whose_pattern_repeats_repetitions_is_refused_by_name(pattern, tmp_path):
    raw = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, raw["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match="may take forever"):
        Tokenizer(tmp_path, 4096)
