"""The page in a process of its own, and a Chromium to look at it."""

from __future__ import annotations

import json

import pytest
from serving import serve

from playground.checkpoint.hub import EMBEDDED


@pytest.fixture(scope="session")
def server():
    with serve() as url:
        yield url


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """The storyteller as a chat model: a template that hands it the conversation, and settings of its own."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        if file.name not in ("generation_config.json", "tokenizer_config.json"):
            (folder / file.name).symlink_to(file)
    generation = {"eos_token_id": [0], "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"
    config = {"chat_template": template, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def talking(chatty):
    """A page whose model can chat."""
    with serve("--model", str(chatty)) as url:
        yield url


@pytest.fixture(scope="session")
def choice(chatty):
    """A page that offers three models: the storyteller, the same with a chat template, and one that is broken."""
    broken = chatty.parent / "broken"
    broken.mkdir()
    for file in chatty.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "config.json").unlink()
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    models = [str(EMBEDDED), str(chatty), str(broken)]
    with serve(*(part for model in models for part in ("--model", model))) as url:
        yield url, models


@pytest.fixture(scope="session")
def browser():
    """Chromium with one context: see `driving.open_page`."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        yield chromium.new_context()
        chromium.close()
