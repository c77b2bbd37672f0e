"""What surrounds the program: proxies, locales, addresses, pipes, disks, limits of memory, odd files."""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from gradio_client import Client
from serving import ROOT, serve_page

from playground import CheckpointError, SamplingParams, load
from playground.arguments import _models_of_environment
from playground.checkpoint import memory, tokenizer
from playground.checkpoint.files import Checkpoint
from playground.checkpoint.hub import EMBEDDED
from playground.inspect.receipt import fingerprint

WRITE = ["-m", "playground", "The café", "--device", "cpu", "--max-new-tokens", "3", "--seed", "1"]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    more = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run([sys.executable, *arguments], **(more | options))


@pytest.mark.long
def test_the_page_does_not_reach_itself_through_a_proxy():
    with socket.socket() as closed:  # a proxy that answers nobody
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        proxies = {name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy")}
        with serve_page(environment=proxies | {"no_proxy": "", "NO_PROXY": ""}) as page:
            assert page.engine


@pytest.mark.long
@pytest.mark.parametrize("host", ["::1", "::"])
def test_the_page_can_be_had_by_ipv6(host):
    with serve_page("--host", host, reached_at="[::1]") as page:
        assert Client(page.url, verbose=False).predict(api_name="/status")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "70000"], {}, "'70000' is no port; use a number from 0 to 65535"),
        ([], {"GRADIO_SERVER_PORT": "web"}, "'web' is no port"),
        pytest.param(["--port", "0"], {"GRADIO_TEMP_DIR": "/proc/nope"}, "name another folder in GRADIO_TEMP_DIR",
                     marks=pytest.mark.long),
        pytest.param(["--host", "192.0.2.1", "--port", "7999"], {}, "can't be listened on", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_an_address_or_folder_that_can_not_be_had_ends_with_a_sentence(arguments, environment, words):
    done = run("app.py", "--device", "cpu", *arguments, env=os.environ | environment)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.long)])
@pytest.mark.parametrize("way", [pytest.param("stream", marks=pytest.mark.long), "compare"])
def test_output_that_can_not_be_encoded_is_escaped(encoding, way):
    columns = ["--column", "sampler=greedy", "--column", "seed=2"]
    more = ["--seed", "1"] if way == "stream" else columns
    words = (["compare"] if way == "compare" else []) + ["Żółw said: 日本", "--device", "cpu", "--max-new-tokens", "3"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = run("-m", "playground", *words, *more, env=environment, encoding=encoding)
    assert done.returncode == 0 and (way == "stream" or "\\u65e5\\u672c" in done.stdout), done.stderr[-500:]


@pytest.mark.parametrize("more", [[], pytest.param(["--json"], marks=pytest.mark.long)], ids=["text", "json"])
def test_a_reader_that_has_enough_ends_the_program_quietly(more):
    command = [sys.executable, *WRITE, "--max-new-tokens", "200", "--ignore-eos", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 141 and "Error" not in said


def test_a_full_disk_ends_the_program_with_a_sentence():
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run(*WRITE, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and "error: the output can't be written: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_whose_name_holds_a_comma_is_one_model(tmp_path, monkeypatch):
    folder = tmp_path / "my, модель"
    folder.mkdir()
    monkeypatch.setenv("PLAYGROUND_MODEL", str(folder))
    assert _models_of_environment() == [str(folder)]
    monkeypatch.setenv("PLAYGROUND_MODEL", "a/b, c/d")
    assert _models_of_environment() == ["a/b", "c/d"]


def test_every_file_is_read_and_written_as_utf8_whatever_the_locale_says():
    for file in [ROOT / "app.py", *ROOT.glob("playground/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb") for a in node.args)
            binary |= ast.unparse(node.func) == "os.open"
            if name in ("read_text", "write_text", "open") and not binary:
                said = {keyword.arg for keyword in node.keywords}
                assert "encoding" in said, f"{file.relative_to(ROOT)}:{node.lineno} {name} without an encoding"


def container(root: Path, **files: str) -> int:
    """What is free in a control group `/a/b` in which these files stand."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_name(file.name.replace("_", ".", 1)).write_text(text, encoding="utf-8")
    return memory._free_in_container(root, root / "own")


def test_the_memory_limit_of_a_container_counts_in_both_versions_and_in_every_group_above(tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n", encoding="utf-8")
    assert memory._free_in_container(tmp_path, tmp_path / "own") == memory.UNLIMITED
    found = container(tmp_path, a__b__memory_max="max", a__b__memory_current="100")
    assert found == memory.UNLIMITED
    stat = "anon 5\ninactive_file 30\n"
    found = container(tmp_path, a__memory_max="1000", a__memory_current="400", a__memory_stat=stat)
    assert found == 1000 - 400 + 30
    (tmp_path / "own").write_text("4:cpu,memory:/docker/x\n", encoding="utf-8")
    found = container(tmp_path, memory__memory_limit_in_bytes="500", memory__memory_usage_in_bytes="200")
    assert found == 300


def test_a_model_that_does_not_fit_into_the_address_space_is_refused_in_a_sentence():
    limit = 6 << 30
    done = run(
        *WRITE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    code = "import torch; from playground.checkpoint.memory import free_bytes; print(free_bytes(torch.device('cpu')))"
    done = run("-c", code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert 0 < int(done.stdout) < limit


@pytest.fixture
def folder(tmp_path):
    """The embedded checkpoint by links, as a hub's cache has it."""
    for file in EMBEDDED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def test_a_link_that_leads_nowhere_beside_the_weights_changes_nothing(folder):
    (folder / "consolidated.safetensors").symlink_to(folder / "nowhere")
    assert fingerprint(folder) == fingerprint(EMBEDDED)
    with load(folder, "cpu", context=64) as playground:
        assert len(list(playground.stream("Once", SamplingParams("greedy"), 2))) == 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_pipes_devices_and_folders_in_place_of_files_are_refused_at_once(folder, name, kind):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(folder)
        tokenizer.Tokenizer(folder, 4096)


def test_a_tokenizer_that_is_huge_or_makes_the_library_panic_is_refused_in_a_sentence(tmp_path, monkeypatch):
    shutil.copy(EMBEDDED / "tokenizer.json", tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer, "_LARGEST", 1000)
    with pytest.raises(CheckpointError, match="that is no tokenizer"):
        tokenizer.Tokenizer(tmp_path, 4096)

    class Panic(BaseException):
        """As PyO3's PanicException."""

    def panic(raw):
        raise Panic("index out of bounds")

    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "_library", panic)
    with pytest.raises(CheckpointError, match="can't be read: index out of bounds"):
        tokenizer.Tokenizer(tmp_path, 4096)


@pytest.mark.parametrize("change", [{"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}}, {"decoder": 7},
                                    {"added_tokens": [{"content": 3}]}, {"added_tokens": "x"}])  # fmt: skip
def test_a_damaged_tokenizer_is_refused_in_a_sentence(tmp_path, change):
    raw = json.loads(tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | change), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer.json can't be read"):
        tokenizer.Tokenizer(tmp_path, 4096)
