"""Gradio's inputs without its own range checks: our boundary checks everything, with sentences that say what to do,
and takes the same values from the page and from the API."""

from __future__ import annotations

import gradio as gr


class Slider(gr.Slider):
    def get_block_name(self) -> str:
        return "slider"

    def preprocess(self, payload):
        return payload


class Number(gr.Number):
    def get_block_name(self) -> str:
        return "number"

    def preprocess(self, payload):
        return payload


class Radio(gr.Radio):
    def get_block_name(self) -> str:
        return "radio"

    def preprocess(self, payload):
        return payload
