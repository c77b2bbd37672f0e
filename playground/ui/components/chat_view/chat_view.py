"""A conversation. Gradio's own widget puts messages into the page as HTML even when told not to render them; here they
are text, whatever they hold."""

from __future__ import annotations

from playground.ui.components.view import View


class ChatView(View):
    """Value: `{"turns": [{"role": "user" | "assistant", "content": text}, ...]}`. What a reasoning model writes between
    `<think>` and `</think>` is folded."""

    template = '<div class="cv" role="log" aria-label="Conversation" aria-live="polite" tabindex="0"></div>'
    about = "`turns`: the conversation so far, the answer growing"

    def __init__(self, value: dict | None = None, **kwargs):
        super().__init__(value or {"turns": []}, **kwargs)
