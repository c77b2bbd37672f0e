"""What a new visitor costs. gradio describes every block of the page anew for each of them, programs included: some
90 ms of the event loop that all visitors share, for a page of this size. Here the page is described once. And gradio
compresses files, but not the page itself, which is more than half of what a visitor's browser loads at first."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.blocks import BlocksConfig
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


class DescribedOnce(BlocksConfig):
    """As gradio's own, of which each visitor has a copy; what has not changed for a visitor is not described again."""

    known: dict[int, tuple[Any, dict]]

    def __copy__(self) -> DescribedOnce:
        return adopted(super().__copy__(), self.known)

    def config_for_block(self, _id: int, rendered_ids: list[int], block: Any, renderable: Any = None) -> dict:
        described, config = self.known.get(_id, (None, {}))
        if renderable is not None or described is not block:
            return super().config_for_block(_id, rendered_ids, block, renderable)
        return {**config, "props": dict(config["props"])}  # a visitor's own values are put there


def adopted(config: BlocksConfig, known: dict[int, tuple[Any, dict]]) -> DescribedOnce:
    config.__class__ = DescribedOnce
    config.known = known
    return config


def describe_once(page: gr.Blocks) -> None:
    """For a page that is built."""
    config = page.default_config
    known = {number: (block, config.config_for_block(number, [], block)) for number, block in config.blocks.items()}
    adopted(config, known)


class CompressedPage:
    """The page itself in gzip, for browsers that take it; everything else as it comes."""

    def __init__(self, app: ASGIApp):
        self.app, self.compressed = app, GZipMiddleware(app, compresslevel=5)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and scope["path"] == "/"
        await (self.compressed if is_page else self.app)(scope, receive, send)


MIDDLEWARE = [Middleware(CompressedPage)]
