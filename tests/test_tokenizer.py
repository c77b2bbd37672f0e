"""Streamed text is exactly what decoding the whole sequence gives, for both kinds of tokenizer that we meet."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from playground import SamplingParams
from playground.checkpoint.config import CheckpointError
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


def byte_fallback_tokenizer(path, first_only: bool = False) -> None:
    """As Llama 2 and Mistral: no byte-level alphabet; what the vocabulary lacks becomes tokens `<0xNN>`. A space is put
    before every stretch of text, or, as newer ones do, before the first alone."""
    inner = Library(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if first_only:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
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


def storyteller_with(folder, change) -> Tokenizer:
    """The storyteller's tokenizer, changed."""
    inner = Library.from_file(str(EMBEDDED / "tokenizer.json"))
    change(inner)
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder, 5000)


@pytest.mark.parametrize(
    "change", [lambda t: t.enable_truncation(8), lambda t: t.enable_padding(length=64, pad_id=0, pad_token="x")]
)
def test_a_prompt_is_taken_whole_and_unpadded_whatever_the_file_says(tmp_path, change):
    text = "once upon a time there was a little girl, and the quick brown fox jumped over a lazy dog"
    tokenizer, sound = storyteller_with(tmp_path, change), Tokenizer(EMBEDDED, 4096)
    for way in ("encode", "encode_plain", "encode_template"):
        assert getattr(tokenizer, way)(text) == getattr(sound, way)(text)


def test_added_tokens_that_are_ordinary_text_are_matched_as_transformers_does(tmp_path):
    added = [AddedToken(c, normalized=True) for c in [*"øöúÿü", "  ", "    ", "<think>", "<table>"]]
    tokenizer = storyteller_with(tmp_path, lambda t: t.add_tokens(added))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("schön", "Tür über", "größer", "def f():\n    return 1\n        x", "a <think> b</think><table>"):
        assert tokenizer.encode(text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("mark", ["<|User|>", "<｜Assistant｜>", "<|endoftext|>"])
def test_control_tokens_can_not_be_typed_whether_or_not_the_file_calls_them_special(tmp_path, mark):
    tokenizer = storyteller_with(tmp_path, lambda t: t.add_tokens(["<|User|>", "<｜Assistant｜>"]))
    number = tokenizer.added_tokens[mark]
    assert number not in tokenizer.encode(f"a{mark}b")[1:] and number in tokenizer.encode_template(f"a{mark}b")
    parsed = tokenizer.encode(f"a{mark}b", parse_special=True)
    assert parsed == PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))(f"a{mark}b")["input_ids"]
    assert parsed.count(number) >= 1


@pytest.mark.parametrize("first_only", [False, True])
def test_text_that_goes_on_a_prompt_keeps_the_space_that_begins_it(tmp_path, first_only):
    byte_fallback_tokenizer(tmp_path, first_only)
    tokenizer = Tokenizer(tmp_path, 1000)
    whole = tokenizer.encode("the quick brown fox jumps")
    for at in range(1, len(whole)):
        stream = TextStream(tokenizer, begun=whole[:at])
        text = "".join(map(stream.push, whole[at:])) + stream.flush()
        assert tokenizer.decode(whole[:at]) + text == "the quick brown fox jumps"
    fresh = TextStream(tokenizer)
    assert "".join(map(fresh.push, whole)) == "the quick brown fox jumps"


def test_tokens_that_differ_by_a_space_are_spelled_differently(tmp_path):
    byte_fallback_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path, 1000)
    vocab = tokenizer.inner.get_vocab()
    pairs = [(number, vocab["▁" + text], text) for text, number in vocab.items() if "▁" + text in vocab]
    assert pairs
    for alone, spaced, text in pairs:
        assert (tokenizer.spelled(alone), tokenizer.spelled(spaced)) == (plain := text.replace("▁", " "), " " + plain)


def test_a_tokenizer_may_have_an_added_token_more_than_the_model_but_no_word(tmp_path):
    tokenizer = storyteller_with(tmp_path, lambda t: t.add_special_tokens(["<pad>"]))
    assert Tokenizer(tmp_path, 4096).encode("Once") == tokenizer.encode("Once")
    with pytest.raises(CheckpointError, match="tokens up to number 4096, the model only 4000"):
        Tokenizer(tmp_path, 4000)


def test_a_stop_string_alone_is_one_stop_string(storyteller):
    texts = []
    for stop in ("the", ("the",), ["the"]):
        events = storyteller.stream("Once upon a time", SamplingParams("greedy"), 40, stop=stop, ignore_eos=True)
        texts.append("".join(event.text for event in events))
    assert texts[0] == texts[1] == texts[2] and "the" not in texts[0] and texts[0]


def test_what_the_tokenizer_s_own_files_call_the_end_is_known(tmp_path):
    storyteller_with(tmp_path, lambda t: t.add_special_tokens(["<|im_end|>"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}}), encoding="utf-8"
    )
    assert Tokenizer(tmp_path, 5000).eos == (4096,)
