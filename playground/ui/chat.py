"""The chat tab: a conversation in the checkpoint's own template. The conversation lives in the page's session; the
widget only shows it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import gradio as gr

from playground import Playground, SamplingParams
from playground.checkpoint.chat import Message
from playground.inspect.run import Run
from playground.ui.components import ChatView, StatsBar, TextView
from playground.ui.generate import WRITING
from playground.ui.handlers import Handlers
from playground.ui.session import Session, check_going, refuse_during_a_run, run_of, told
from playground.ui.settings import (
    LONGEST_LINK,
    NAMES,
    QUICK,
    Asked,
    Controls,
    LinkButton,
    link_to,
    own_settings,
    spelled,
)


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
    link: LinkButton
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
        with gr.Row(elem_classes="actions"):
            retry = gr.Button("Another answer", size="sm", elem_id="retry")
            edit = gr.Button("Edit last message", size="sm", elem_id="edit")
            clear = gr.Button("New chat", size="sm", elem_id="clear-chat")
            link = LinkButton.build("link-chat")
        stats = StatsBar(elem_id="stats-chat")
        with gr.Accordion("The newest answer, token by token", open=False):
            tokens = TextView("Answer", explain, elem_id="output-chat")
    return ChatTab(tab, system, talk, message, send, stop, retry, edit, clear, link, stats, tokens)


def linked_talk(query: dict[str, str]) -> tuple[list[Message], str, str] | None:
    """The turns before the last, the last one and the system prompt that an address carries; None where it carries no
    conversation, or a wrong one."""
    try:
        turns = json.loads(query["turns"][:LONGEST_LINK])
        roles, texts = zip(*((turn["role"], turn["content"]) for turn in turns), strict=True)
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    known = all(role in ("user", "assistant") for role in roles)  # JSON may bring what can't be hashed
    if not known or roles[-1] != "user" or not all(isinstance(text, str) for text in texts):
        return None
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return turns[:-1], texts[-1], query.get("system", "")[:LONGEST_LINK]


def connect_chat(chat: ChatTab, handlers: Handlers, controls: Controls, strip, session: gr.State) -> None:
    talker = ChatHandlers(handlers)
    shown, rest = [chat.talk, chat.message, chat.stats, strip, chat.tokens], [chat.system, *controls.inputs]
    private = WRITING | {"api_visibility": "private"}
    send = spelled(talker.send, NAMES, NAMES)  # also the endpoint, which remembers the conversation of its client
    chat.send.click(send, [chat.message, *rest, session], shown, api_name="chat", **WRITING)
    chat.tokens.focus(handlers.look_at, [session], [strip], **QUICK)
    chat.tokens.blur(handlers.look_away, [session], [strip], **QUICK)
    chat.message.submit(talker.send, [session, chat.message, *rest], shown, **private)
    chat.retry.click(talker.retry, [session, *rest], shown, **private)
    chat.edit.click(talker.edit, [session], [chat.talk, chat.message], **QUICK)
    chat.link.connect(talker.link, [session, chat.message, *rest])
    chat.clear.click(talker.clear, [session], [chat.talk, chat.stats], **QUICK)


class ChatHandlers:
    """Each yields the conversation, the message box, the figures, the panel's strip and the answer's tokens."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers

    async def send(self, request: gr.Request, session: Session, message, system, *values) -> AsyncIterator[tuple]:
        """The next user turn, and the answer to it."""
        turn = {"role": "user", "content": message if isinstance(message, str) else ""}
        async for shown in self._answer(request, session, [*session.chat, turn], system, values):
            yield shown

    async def retry(self, request: gr.Request, session: Session, system, *values) -> AsyncIterator[tuple]:
        """Another answer to the last user turn."""
        turns = session.chat[:-1] if session.chat and session.chat[-1]["role"] == "assistant" else session.chat
        async for shown in self._answer(request, session, turns, system, values):
            yield shown

    async def edit(self, session: Session) -> tuple:
        """Takes the last user turn, and what came after it, back into the message box."""
        await refuse_during_a_run(session)
        users = [index for index, turn in enumerate(session.chat) if turn["role"] == "user"]
        if not users:
            return gr.skip(), gr.skip()
        text = session.chat[users[-1]]["content"]
        session.chat = session.chat[: users[-1]]
        return {"turns": session.chat}, text

    async def link(self, session: Session, message, system, *values) -> str:
        """The query of an address that asks for the last answer again; before any, for one to the message."""
        if not session.said:
            turn = {"role": "user", "content": message if isinstance(message, str) else ""}
            with told():
                return link_to("chat", **talk_in_a_link([turn], system, values, Asked.read(values).params))
        return link_to("chat", **session.said)

    async def clear(self, session: Session) -> tuple:
        await refuse_during_a_run(session)
        session.chat, session.said = [], {}
        return {"turns": []}, None

    async def _answer(self, request, session: Session, turns, system, values) -> AsyncIterator[tuple]:
        handlers = self.handlers
        async with run_of(session):
            asked, playground = Asked.read(values), handlers.playground
            session.seed = asked.params.seed
            before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
            # the template is rendered in a process of its own, which may take its time
            ids = await asyncio.to_thread(playground.encode_chat, [*before, *turns], not asked.skip_thinking)
            check_going(session)
            options = handlers.options(request, session, playground, traced=True) | {"ignore_eos": asked.past_end}
            options |= {"inspect": True, "keep": True, "begun": 0}  # an answer is a text of its own
            (stream,) = playground.resume(ids, [asked.params], asked.limit, **options)
            run = handlers.book.keep(Run.of(stream, playground.tokenizer, ""))
            session.chat, session.newest, session.looked = list(turns), run, None
            session.said = talk_in_a_link(turns, system, values, asked.params)
            try:
                async for (pane,) in handlers.paint(session, [run], request):
                    shown = {"turns": [*turns, {"role": "assistant", "content": run.text}]}
                    yield shown, "", dict(pane.stats), handlers.activation_view(session), TextView.show(run)
            finally:  # stopped or not: what was written stands in the conversation
                session.chat = [*turns, {"role": "assistant", "content": run.text}]


def talk_in_a_link(turns: list[Message], system, values, params: SamplingParams) -> dict:
    """Everything that an answer follows from."""
    given = dict(zip(NAMES, values, strict=True)) | own_settings(params)
    return given | {"system": system if isinstance(system, str) else "", "turns": json.dumps(turns)}
