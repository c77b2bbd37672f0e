"""A conversation. Gradio's own widget puts messages into the page as HTML even when told not to render them; here they
are text, whatever they hold."""

from pathlib import Path

import gradio as gr

_HERE = Path(__file__).parent


class ChatView(gr.HTML):
    """Value: `{"turns": [{"role": "user" | "assistant", "content": text}, ...]}`. What a reasoning model writes between
    `<think>` and `</think>` is folded."""

    def __init__(self, **kwargs):
        super().__init__(
            value={"turns": []},
            html_template='<div class="cv" role="log" aria-label="Conversation" aria-live="polite" tabindex="0"></div>',
            js_on_load=(_HERE / "chat_view.js").read_text(),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict:
        return {"type": "object", "description": "`turns`: the conversation so far, the answer growing"}
