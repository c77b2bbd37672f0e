"""The tokens that a prompt becomes, with their ids."""

from __future__ import annotations

from collections.abc import Sequence

from playground.checkpoint.tokenizer import Tokenizer
from playground.ui.components.view import View

MOST = 400  # chips; a prompt may have thousands of tokens


class TokenChips(View):
    """Value: `tokens`, each an `id`, its `text` and whether it is `special`, and a `note`."""

    template = '<div class="tc" tabindex="0" role="region" aria-label="The prompt\'s tokens"></div>'
    about = "the tokens of the prompt"

    @staticmethod
    def show(ids: Sequence[int], tokenizer: Tokenizer) -> dict:
        special = set(tokenizer.control_tokens)
        spelled = [tokenizer.inner.id_to_token(token) or "" for token in ids[:MOST]]
        chips = [
            {"id": token, "text": name if name in special else tokenizer.spelled(token), "special": name in special}
            for token, name in zip(ids, spelled, strict=False)
        ]
        more = f", of which these are the first {MOST}" if len(ids) > MOST else ""
        return {"tokens": chips, "note": f"{len(ids):,} {'token' if len(ids) == 1 else 'tokens'}{more}."}
