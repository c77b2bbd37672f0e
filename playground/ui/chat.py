"""The chat tab: a conversation in the checkpoint's own template. The conversation lives in the page's session; the
widget only shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import gradio as gr

from playground import Playground
from playground.ui.components import ChatView, StatsBar, TextView
from playground.ui.handlers import Handlers
from playground.ui.session import Session, refuse_during_a_run, run_of


class ChatTab(NamedTuple):
    tab: gr.Tab
    system: gr.Textbox
    talk: ChatView
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    edit: gr.Button
    clear: gr.Button
    stats: StatsBar
    tokens: TextView


def chat_tab(playground: Playground, explain: Callable[[dict], dict]) -> ChatTab:
    """Only shown where the checkpoint has a chat template."""
    with gr.Tab("Chat", id="chat", visible=playground.template is not None) as tab:
        with gr.Accordion("System prompt", open=False):
            system = gr.Textbox(label="System prompt", show_label=False, lines=2, max_lines=8, elem_id="system")
        talk = ChatView(elem_id="talk")
        message = gr.Textbox(
            label="Message",
            show_label=False,
            placeholder="Message; Enter sends, Shift+Enter is a new line",
            lines=1,
            max_lines=8,
            elem_id="message",
        )
        with gr.Row(elem_classes="run-row"):
            send = gr.Button("Send", variant="primary", elem_id="send")
            stop = gr.Button("Stop", variant="secondary", elem_id="stop-chat")
        with gr.Row(elem_classes="run-row"):
            retry = gr.Button("Another answer", size="sm", elem_id="retry")
            edit = gr.Button("Edit last message", size="sm", elem_id="edit")
            clear = gr.Button("New chat", size="sm", elem_id="clear-chat")
        stats = StatsBar(elem_id="stats-chat")
        with gr.Accordion("The newest answer, token by token", open=False):
            tokens = TextView("Answer", explain, elem_id="output-chat")
    return ChatTab(tab, system, talk, message, send, stop, retry, edit, clear, stats, tokens)


def connect_chat(chat: ChatTab, handlers: Handlers, settings: list, strip, session: gr.State) -> None:
    talker = ChatHandlers(handlers)
    shown, rest = [chat.talk, chat.message, chat.stats, strip, chat.tokens], [chat.system, *settings, session]
    options = {"show_progress": "hidden", "concurrency_limit": 8, "trigger_mode": "multiple"}
    chat.send.click(talker.send, [chat.message, *rest], shown, api_name="chat", **options)
    chat.message.submit(talker.send, [chat.message, *rest], shown, api_visibility="private", **options)
    chat.retry.click(talker.retry, rest, shown, api_visibility="private", **options)
    quick = {"api_visibility": "private", "show_progress": "hidden"}
    chat.edit.click(talker.edit, [session], [chat.talk, chat.message], **quick)
    chat.clear.click(talker.clear, [session], [chat.talk, chat.stats], **quick)


class ChatHandlers:
    """Each yields the conversation, the message box, the figures, the panel's strip and the answer's tokens."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    def send(
        self, message, system, sampler, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end,
        session: Session,
    ) -> Iterator[tuple]:  # fmt: skip
        """The next user turn, and the answer to it."""
        turn = {"role": "user", "content": message if isinstance(message, str) else ""}
        settings = (sampler, temperature, seed, top_k, top_p, min_p)
        yield from self._answer([*session.chat, turn], system, settings, max_new_tokens, past_end, session)

    def retry(
        self, system, sampler, temperature, max_new_tokens, seed, top_k, top_p, min_p, past_end, session: Session
    ) -> Iterator[tuple]:
        """Another answer to the last user turn."""
        settings = (sampler, temperature, seed, top_k, top_p, min_p)
        turns = session.chat[:-1] if session.chat and session.chat[-1]["role"] == "assistant" else session.chat
        yield from self._answer(turns, system, settings, max_new_tokens, past_end, session)

    def edit(self, session: Session) -> tuple:
        """Takes the last user turn, and what came after it, back into the message box."""
        refuse_during_a_run(session)
        users = [index for index, turn in enumerate(session.chat) if turn["role"] == "user"]
        if not users:
            return gr.skip(), gr.skip()
        text = session.chat[users[-1]]["content"]
        session.chat = session.chat[: users[-1]]
        return {"turns": session.chat}, text

    def clear(self, session: Session) -> tuple:
        refuse_during_a_run(session)
        session.chat = []
        return {"turns": []}, None

    def _answer(self, turns, system, settings, max_new_tokens, past_end, session: Session) -> Iterator[tuple]:
        handlers = self.handlers
        with run_of(session):
            params = handlers.params(*settings)
            session.seed = params.seed
            before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
            run = handlers.answer([*before, *turns], params, max_new_tokens, past_end)
            session.chat = list(turns)
            try:
                for (pane,) in handlers.paint(session, [run]):
                    session.scales = pane.scales
                    shown = {"turns": [*turns, {"role": "assistant", "content": run.text}]}
                    yield shown, "", pane.stats, handlers.activation_view(session), TextView.show(run)
            finally:  # stopped or not: what was written stands in the conversation
                session.chat = [*turns, {"role": "assistant", "content": run.text}]
