"""A model by name: a folder as it is, or a Hub id, whose files huggingface_hub fetches and keeps."""

from __future__ import annotations

import re
from pathlib import Path

from playground.checkpoint.config import CheckpointError

EMBEDDED = Path(__file__).parents[1] / "assets" / "storyteller"
FILES = ["*.json", "*.safetensors", "*.jinja"]  # never code, never pickles
# other exports of the same weights; the only folder that is wanted is additional_chat_templates
ELSEWHERE = ["[!a]*/*", "a[!d]*/*", "consolidated*"]
_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def find(model: str) -> Path:
    """The folder of `model`: a path, or `owner/name[@revision]` on the Hub, downloaded if need be (resumed if begun;
    `HF_HUB_OFFLINE` is respected). Raises `CheckpointError` with what to do."""
    if (folder := local_folder(model)) is not None:
        return folder
    if not _ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model} is neither a folder nor a Hub id such as Qwen/Qwen3-0.6B-FP8.")
    name, _, revision = model.partition("@")
    return _download(name, revision or None)


def local_folder(model: str) -> Path | None:
    try:
        folder = Path(model).expanduser()
        return folder if model and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name that is too long, or of a user who does not exist
        return None


def _download(name: str, revision: str | None) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=ELSEWHERE))
    except GatedRepoError:
        raise CheckpointError(f"{name} is gated: accept its terms at {where}, then `hf auth login`.") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision!r}; look at {where}/commits for one.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is not on the Hub, or is private: check the spelling, or log in with `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is not in the local cache and the Hub can't be reached (no network, or HF_HUB_OFFLINE is set): "
            "go online once to download it, or name a folder."
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{name} is no Hub id: {error}") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise CheckpointError(f"{name} could not be downloaded: {error}. Run again to resume.") from None
