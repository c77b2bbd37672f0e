"""300 damaged folders: each is accepted and writes, or is refused in a sentence, in seconds and without much memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from families import theirs

from playground import CheckpointError
from playground.checkpoint.chat import ChatTemplate
from playground.checkpoint.hub import EMBEDDED
from playground.checkpoint.tokenizer import Tokenizer
from playground.engine.engine import Engine
from playground.engine.loading import load_model
from playground.engine.requests import Request
from playground.engine.settings import RequestError, SamplingParams, suggested_by

EACH = 50
SECONDS, MEMORY = 10, 1 << 30
ODD = [
    None, -1, 0, 1, 3, 7, 2**31, 2**63, 10**400, 1e308, 1e-300, float("nan"), float("inf"), 0.5, True, False, "", "x",
    "a" * 100_000, [], {}, [[]], [0], [-1, 2], {"": None}, [None] * 1000, "4096", "\ud800",
]  # fmt: skip
HOSTILE = {
    "rope_scaling": [{"rope_type": kind} for kind in ("yarn", "llama3", "linear", "dynamic", "longrope", "no", None, 5)]
    + [{"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 2}]
    + [{"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1e30]}],
    "quantization_config": [{"quant_method": kind} for kind in ("fp8", "compressed-tensors", "modelopt", "gptq", [], 1)]
    + [{"quant_method": "fp8", "modules_to_not_convert": ["(a+)+" * 9, None]}, {"weight_block_size": [64, 0]}],
    "sliding_window": [0, -5, 1, 2**40, "all"],
    "layer_types": [["sliding_attention"], ["x"] * 3, "full_attention", [3]],
    "model_type": ["deepseek_v3", "llama", "mistral", "qwen3_moe", "smollm3", "gpt2", "", None, ["qwen3"]],
    "architectures": [[], None, "Qwen3ForCausalLM"],
    "head_dim": [1, 2, 14, 31, 255, 257, 2**20],
    "eos_token_id": [-1, [], [4095, 4096], "</s>", [[1]], 2**40],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small model with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("sound")
    theirs("qwen3", vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (EMBEDDED / name).is_file():
            shutil.copy(EMBEDDED / name, folder)
    return folder


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")


def a_field_of_the_config(folder, luck: random.Random) -> None:
    config = read(folder / "config.json")
    inner = [value for value in config.values() if isinstance(value, dict)]
    target = luck.choice([config] * 4 + inner)
    if name := luck.choice([*target] or [""]):
        target[name] = luck.choice(ODD)
    if luck.random() < 0.2:
        target.pop(name, None)
    write(folder / "config.json", config)


def fields_that_mean_something(folder, luck: random.Random) -> None:
    config = read(folder / "config.json")
    for name in luck.sample(sorted(HOSTILE), luck.randint(1, 2)):
        config[name] = luck.choice(HOSTILE[name])
    write(folder / "config.json", config | {"use_sliding_window": luck.random() < 0.5})


def bytes_of_a_text_file(folder, luck: random.Random) -> None:
    path = folder / luck.choice([p.name for p in sorted(folder.glob("*.json"))])
    data = bytearray(path.read_bytes())
    for _ in range(luck.choice([1, 3, 30])):
        data[luck.randrange(len(data))] = luck.randrange(256)
    path.write_bytes(bytes(data[: luck.choice([len(data), len(data) // 2, len(data) - 1])]))


def the_tokenizer(folder, luck: random.Random) -> None:
    raw = read(folder / "tokenizer.json")
    target = raw
    for _ in range(luck.randint(1, 3)):
        name = luck.choice(sorted(target))
        if not isinstance(target[name], dict) or luck.random() < 0.3 or not target[name]:
            break
        target = target[name]
    target[luck.choice(sorted(target))] = luck.choice(ODD)
    write(folder / "tokenizer.json", raw)


def the_weights(folder, luck: random.Random) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    kind = luck.randrange(5)
    if kind == 0:  # the header's length
        data[:8] = struct.pack("<Q", luck.choice([0, 1, size - 1, size + 1, 2**40, 2**63, len(data)]))
    elif kind == 1:  # the header
        for _ in range(luck.choice([1, 5])):
            data[8 + luck.randrange(size)] = luck.randrange(32, 127)
    elif kind == 2:  # the end
        data = data[: luck.randrange(len(data))]
    elif kind == 3:  # names, types and shapes
        header = json.loads(data[8 : 8 + size])
        one = header[luck.choice([name for name in sorted(header) if name != "__metadata__"])]
        one[luck.choice(sorted(one))] = luck.choice([*ODD, "F8_E4M3", "I64", "BOOL", [0], [2**40], [0, 2**40]])
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        data = struct.pack("<Q", len(text)) + text + data[8 + size :]
    else:  # numbers
        start = 8 + size + luck.randrange(1000)
        data[start : start + 4000] = luck.randbytes(4000)
    path.write_bytes(bytes(data))


def a_file_itself(folder, luck: random.Random) -> None:
    path = folder / luck.choice([p.name for p in sorted(folder.iterdir())])
    kind = luck.randrange(6)
    if kind == 0:
        path.write_bytes(b"")
        return
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(folder / "nothing")
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        os.mkfifo(path)


KINDS = [a_field_of_the_config, fields_that_mean_something, bytes_of_a_text_file, the_tokenizer, the_weights,
         a_file_itself]  # fmt: skip


def write_a_little(folder) -> None:
    """What a page does with a folder: everything read, a few tokens written."""
    model, _ = load_model(folder, torch.device("cpu"), context=64)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    template = ChatTemplate.read(folder, tokenizer)
    if (folder / "generation_config.json").is_file():
        suggested_by(read(folder / "generation_config.json"))
    prompt = tuple(tokenizer.encode("Once upon"))
    if template:
        template.encode([{"role": "user", "content": "Hi"}])
    engine = Engine(model, tokenizer, max_rows=1)
    engine.add([Request(prompt, SamplingParams("greedy"), 3)])
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("damage", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.timeout(300)
def test_a_damaged_folder_writes_or_is_refused_in_a_sentence(damage, sound, tmp_path):
    write_a_little(sound)
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, 0
    for number in range(EACH):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder)
        damage(folder, random.Random(f"{damage.__name__} {number}"))
        start = time.monotonic()
        try:
            write_a_little(folder)
        except (CheckpointError, RequestError) as error:
            refused += 1
            assert 10 < len(str(error)) < 1000 and "Traceback" not in str(error), (number, error)
        except Exception as error:
            raise AssertionError(f"{damage.__name__} {number}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < SECONDS, number
        shutil.rmtree(folder)
    assert refused > EACH // 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY
