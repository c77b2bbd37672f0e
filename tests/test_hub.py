"""Hub ids: what is fetched, and a sentence for each way in which that fails. The Hub itself is never asked."""

from __future__ import annotations

import fnmatch

import huggingface_hub
import pytest
from huggingface_hub import errors

from playground import CheckpointError
from playground.checkpoint.hub import ELSEWHERE, FILES, find


def fail_with(monkeypatch, error: Exception) -> None:
    def download(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def http_error(kind):
    import httpx

    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://example.org")))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, "is gated: accept its terms at https://huggingface.co/a/b"),
        (errors.RepositoryNotFoundError, "is not on the Hub, or is private"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.HfHubHTTPError, "could not be downloaded"),
    ],
)
def test_gated_missing_and_failing_each_get_their_own_sentence(monkeypatch, kind, words):
    fail_with(monkeypatch, http_error(kind))
    with pytest.raises(CheckpointError, match=words):
        find("a/b@v9")


def test_offline_without_a_local_copy_says_so(monkeypatch):
    fail_with(monkeypatch, errors.LocalEntryNotFoundError("no"))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        find("a/b")


def test_an_id_with_a_revision_fetches_only_json_and_safetensors(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: asked.update(o, name=name) or tmp_path)
    assert find("Qwen/Qwen3-0.6B-FP8@main") == tmp_path
    assert asked["name"] == "Qwen/Qwen3-0.6B-FP8" and asked["revision"] == "main"

    def fetched(file: str) -> bool:
        return any(fnmatch.fnmatch(file, p) for p in FILES) and not any(fnmatch.fnmatch(file, p) for p in ELSEWHERE)

    assert all(
        map(fetched, ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"])
    )
    left = ["modeling_x.py", "pytorch_model.bin", "original/a.safetensors", "consolidated.safetensors", "x.pkl"]
    assert not any(map(fetched, left))


def test_a_folder_is_taken_as_it_is_and_anything_else_is_refused(tmp_path):
    assert find(str(tmp_path)) == tmp_path
    for wrong in (
        "/nowhere",
        "nowhere",
        "../a/b",
        "a/b/c",
        "https://huggingface.co/a/b",
        "a b/c",
        "",
        "~nosuchuser/x",
        "a" * 5000,
    ):
        with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
            find(wrong)


def test_a_name_that_the_hub_does_not_allow_is_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for wrong in ("a/b--c", "a/b..c", "a/-b", "a/" + "b" * 200):
        with pytest.raises(CheckpointError, match="is no Hub id"):
            find(wrong)
