"""Streamed text is exactly what decoding the whole sequence gives, for both kinds of tokenizer that we meet."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, trainers

from playground.checkpoint.hub import EMBEDDED
from playground.checkpoint.tokenizer import TextStream, Tokenizer

SCRIPTS = [
    "The quick brown fox", "Ça va très bien, merci", "Привет, мир", "Γειά σου Κόσμε", "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "வணக்கம் உலகம்", "สวัสดีชาวโลก", "你好，世界", "こんにちは世界", "안녕하세요", "გამარჯობა", "Բարև աշխարհ",
    "ሰላም ልዑል", "ᚠᛇᚻ᛫ᛒᛦᚦ", "𐍅𐌿𐌻𐍆𐌹𐌻𐌰", "𓀀𓂀𓃀", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "Z̷͎̈a̵͉͝l̶̰̈g̸̱͆o̴̗̊",
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇺🇳🇫🇷", "❤️‍🔥", "a\u200db\u200cc", "\u202eabc\u202c", "e\u0301 e\u0308", "\ufeffbom",
    "\u00a0\u2003 x", "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x41>", "<|im_start|>", "▁▁", "  two  spaces ",
    "\n\n\t\r\n", "\x00\x01\x7f", "\ufffd", "\ufffd\ufffd", "def f(x):\n    return x**2  # é", "a" * 40, "",
]  # fmt: skip


def byte_fallback_tokenizer(path) -> None:
    """As Llama 2 and Mistral: no byte-level alphabet; what the vocabulary lacks becomes tokens `<0xNN>`."""
    inner = Library(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)], show_progress=False
    )
    inner.train_from_iterator(["the quick brown fox jumps over a lazy dog " * 3, "ça va très bien"], trainer)
    inner.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request, tmp_path_factory):
    if request.param == "byte-level":
        return Tokenizer(EMBEDDED, 4096)
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_fallback_tokenizer(folder)
    return Tokenizer(folder, 1000)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(map(stream.push, ids)) + stream.flush()


def strings(count: int) -> list[str]:
    chance = random.Random(5)
    return [chance.choice(("", " ")).join(chance.choices(SCRIPTS, k=chance.randint(1, 5))) for _ in range(count)]


def test_2000_strings_stream_to_what_decoding_the_whole_gives(tokenizer):
    for text in SCRIPTS + strings(2000):
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), repr(text)


def test_2000_random_sequences_of_ids_with_broken_utf8_do_so_too(tokenizer):
    chance, size = random.Random(6), tokenizer.inner.get_vocab_size()
    for _ in range(2000):
        ids = [chance.randrange(size) for _ in range(chance.randint(1, 25))]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), ids


def test_byte_level_text_comes_back_exactly():
    tokenizer = Tokenizer(EMBEDDED, 4096)
    for text in SCRIPTS + strings(300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_goes_on_inside_of_a_character_that_was_begun_before():
    storyteller = Tokenizer(EMBEDDED, 1 << 30)
    ids = storyteller.encode("one 👍 two")
    whole = TextStream(storyteller)
    pieces = [whole.push(i) for i in ids] + [whole.flush()]
    for at in range(len(ids)):
        later = TextStream(storyteller, begun=ids[:at])
        assert [later.push(i) for i in ids[at:]] + [later.flush()] == pieces[at:]
