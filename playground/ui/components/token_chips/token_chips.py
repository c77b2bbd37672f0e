"""The tokens that a prompt becomes, with their ids."""

from __future__ import annotations

from playground.ui.components.view import View


class TokenChips(View):
    """Value: `tokens`, each an `id`, its `text` and whether it is `special`, and a `note`: `inspect.tokens.chips`."""

    template = '<div class="tc" tabindex="0" role="region" aria-label="The prompt\'s tokens"></div>'
    about = "the tokens of the prompt"
