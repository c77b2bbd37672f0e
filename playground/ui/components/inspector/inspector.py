"""What stood behind one token: its alternatives, and why the draw chose it. Beside the text, on a phone a sheet."""

from __future__ import annotations

from playground.ui.components.view import View


class Inspector(View):
    """Shows what text views tell it, by the document's events `token-shown` (a token's explanation, as
    `inspect.tokens.explain` makes it, and what to do when an alternative is chosen) and `token-left`; tells them
    `token-closed`. It has no value of its own."""

    about = "the token that somebody looks at"
