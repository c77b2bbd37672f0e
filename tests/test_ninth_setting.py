"""A new setting is written in one place, and found wherever settings appear."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from serving import ROOT, serve_page

FIELD = """    bias: float = setting(
        0.0,
        "Bias",
        float,
        "use a number from 0 to 2",
        "a setting that does nothing; default 0",
        high=2,
        off=0,
        shown=(0, 2, 0.1),
        filters=True,
    )
    seed: int = setting("""
GOOD = {"prompt": "Once upon a time", "sampler": "gumbel", "temperature": 0.8, "max_new_tokens": 8, "seed": 7}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project with one setting more."""
    root = tmp_path_factory.mktemp("ninth")
    for name in ("playground", "kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "app.py", root)
    table = root / "playground" / "engine" / "settings.py"
    source = table.read_text(encoding="utf-8")
    assert source.count("    seed: int = setting(") == 1
    table.write_text(source.replace("    seed: int = setting(", FIELD), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def url(tree):
    with serve_page(root=tree) as page:
        yield page.url


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def said_by(tree, code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True).stdout


def test_the_page_has_a_control_for_it_beside_the_text_and_in_every_column(url):
    config = json.load(urllib.request.urlopen(f"{url}/config"))
    places = {block["props"].get("elem_id") for block in config["components"]}
    assert {"bias", *(f"bias-{number}" for number in range(4))} <= places


def test_a_link_carries_it(tree):
    code = "from playground.ui.settings import linked; print(linked({'bias': '0.5'}), linked({'bias': '9'}))"
    assert said_by(tree, code).strip() == "({'bias': 0.5}, []) ({}, ['bias'])"
    code = "from playground.ui.settings import link_to; print(link_to('generate', prompt='Hi', bias=0.5))"
    assert said_by(tree, code).strip().endswith("bias=0.5")


def test_the_api_takes_it_and_checks_it(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    for name in ("/generate", "/draws", "/chat"):
        assert "bias" in [p["parameter_name"] for p in endpoints[name]["parameters"]]
    with pytest.raises(AppError, match="Bias is 5; use a number from 0 to 2"):
        client.predict(api_name="/generate", **GOOD, bias=5)


def test_a_receipt_names_it_and_one_from_before_it_still_replays(client):
    _, stats, _ = client.predict(api_name="/generate", **GOOD, bias=0.5)
    receipt = json.loads(client.predict(run=stats["run"], api_name="/receipt"))
    assert receipt["segments"][0]["bias"] == 0.5
    for one in (receipt, {**receipt, "segments": [{k: v for k, v in receipt["segments"][0].items() if k != "bias"}]}):
        assert client.predict(receipt=json.dumps(one), api_name="/replay")["identical"]


def test_a_column_takes_it_and_is_titled_by_it(client):
    settings = [{"bias": 0.5, "seed": 1}, {"seed": 2}]
    _, _, fork = client.predict(GOOD["prompt"], settings, 20, False, api_name="/compare")
    assert "bias 0.5" in fork["labels"][0] and "bias" not in fork["labels"][1]


def test_the_inspector_shows_it(client):
    _, stats, _ = client.predict(api_name="/generate", **GOOD, bias=0.5)
    (token,) = client.predict(run=stats["run"], token=0, api_name="/inspect")
    assert token["settings"]["bias"] == 0.5


def test_the_shell_offers_it(tree):
    command = [sys.executable, "-m", "playground", "--help"]
    told = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
    assert "--bias" in told and "a setting that does nothing" in told
