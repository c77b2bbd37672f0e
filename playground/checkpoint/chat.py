"""Chat: a checkpoint's own template turns a conversation into the text that its model was trained to continue."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from playground.checkpoint import render
from playground.checkpoint.config import CheckpointError
from playground.checkpoint.tokenizer import Tokenizer, read_json
from playground.engine.settings import RequestError

MARK = "\ue000"  # private use: stands inside a special token's text that a user typed, so that it stays text
WALL_SECONDS = 10
LONGEST_TEMPLATE = 1_000_000  # characters
# where the child finds jinja2, which ignores this user's own environment
_LIBRARIES = sorted({str(Path(find_spec(name).origin).parents[1]) for name in ("jinja2", "markupsafe")})
_ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # role and content


class ChatTemplate:
    """The template of a model folder. Rendered in a sandbox and in a process of its own (see `render.py`)."""

    def __init__(self, source: str, tokens: dict[str, str], tokenizer: Tokenizer):
        self.source, self.tokens, self.tokenizer = source, tokens, tokenizer
        texts = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self.added = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None

    @classmethod
    def read(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """From `additional_chat_templates/default.jinja`, `chat_template.jinja` or `tokenizer_config.json`; None where
        the checkpoint has none."""
        source = read_json(folder, "tokenizer_config.json").get("chat_template")
        files = [folder / "additional_chat_templates" / "default.jinja", folder / "chat_template.jinja"]
        if file := next((file for file in files if file.is_file()), None):
            try:
                with file.open(encoding="utf-8", errors="replace") as stream:
                    source = stream.read(LONGEST_TEMPLATE + 1)
            except OSError as error:
                raise CheckpointError(f"{file} can't be read: {error}") from None
        elif isinstance(source, list):  # several named ones: the default is for conversation
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str) or not source.strip():
            return None
        if len(source) > LONGEST_TEMPLATE:
            raise CheckpointError(f"The chat template of {folder} has more than {LONGEST_TEMPLATE} characters.")
        return cls(source, tokenizer.named, tokenizer)

    @property
    def knows_thinking(self) -> bool:
        """Whether it asks if the answer may begin with thinking."""
        return "enable_thinking" in self.source

    def encode(self, messages: Sequence[Message], thinking: bool = True) -> tuple[int, ...]:
        """Ids of the conversation up to where the assistant speaks next. The special tokens are the template's alone:
        what a user typed stays text. Raises `RequestError` for a conversation that the template refuses."""
        messages, typed = self._checked(messages)
        about = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        if not thinking:  # where it is not said, a template has a default of its own
            about["enable_thinking"] = False
        text = self._render(about | self.tokens)
        if not typed:
            return tuple(self.tokenizer.encode_template(text))
        # Only the stretches in which something was typed are encoded on their own, so that all others keep their ids.
        ids: list[int] = []
        written = ""
        for number, piece in enumerate(self.added.split(text)):
            if number % 2 or MARK not in piece:
                written += piece
                continue
            ids += self.tokenizer.encode_template(written)
            ids += self.tokenizer.encode_plain(piece.replace(MARK, ""), within=bool(ids))
            written = ""
        return tuple(ids + self.tokenizer.encode_template(written))

    def _checked(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """A copy in which special tokens that were typed are marked, and whether there were any."""
        out, typed = [], False
        for message in messages:
            role, content = (message.get(k) if isinstance(message, dict) else None for k in ("role", "content"))
            if role not in _ROLES or not isinstance(content, str):
                raise RequestError(f"A message needs a role ({', '.join(_ROLES)}) and a text, not {str(message)[:80]}.")
            content = content.replace(MARK, "")
            touch = self.added is not None and role != "assistant"  # what the model wrote may hold its own tokens
            marked = self.added.sub(lambda m: m[0][0] + MARK + m[0][1:], content) if touch else content
            typed |= marked != content
            out.append({"role": role, "content": marked})
        if not any(m["role"] == "user" and m["content"].strip() for m in out):
            raise RequestError("The conversation has no message yet; write one.")
        return out, typed

    def _render(self, variables: dict[str, Any]) -> str:
        try:
            request = json.dumps({"template": self.source, "variables": variables})
            command = [sys.executable, "-I", render.__file__, *_LIBRARIES]
            done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=WALL_SECONDS)
            answer = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            answer = {"error": f"it takes more than {render.SECONDS} seconds or too much memory"}
        if "error" in answer:
            raise RequestError(f"This checkpoint's chat template can't render the conversation: {answer['error']}.")
        return answer["text"]
