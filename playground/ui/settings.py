"""The controls of a run's settings, made from the one table of settings, and their values, read in one place."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlencode

import gradio as gr

from playground import Playground
from playground.engine.settings import (
    FOLDED,
    NAMES,
    ORDER,
    PENALTIES,
    SETTINGS,
    SUGGESTED,
    SWITCHES,
    SamplingParams,
    Setting,
    in_a_word,
    whole_number,
)
from playground.ui.controls import Number, Radio, Slider

KINDS = {name: setting.kind for name, setting in SETTINGS.items()} | {"max_new_tokens": int}
KINDS |= dict.fromkeys(SWITCHES, bool)
DEFAULTS = SUGGESTED | dict.fromkeys(SWITCHES, False)
OWN = "single"  # settings that the columns of a comparison have of their own
GREEDY = "Greedy takes the likeliest token: temperature, filters and seed have nothing to decide."
DECIDED = tuple(name for name in SETTINGS if name != "sampler" and name not in PENALTIES)
"""Settings that mean nothing to the greedy sampler."""
LONGEST_LINK = 20_000  # characters of a prompt
QUICK = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
"""Of events that the page answers in an instant, whatever else goes on."""


class Asked(NamedTuple):
    """What a run was asked for, read but for its lengths, which only the model can judge."""

    params: SamplingParams
    limit: int  # new tokens
    past_end: bool
    parse_special: bool = False
    skip_thinking: bool = False

    @classmethod
    def read(cls, values: Sequence[Any]) -> Asked:
        """From the values of `NAMES`. Raises `RequestError`."""
        given = dict(zip(NAMES, values, strict=True))
        limit, switches = given.pop("max_new_tokens"), [bool(given.pop(name)) for name in SWITCHES]
        params = SamplingParams.read(given).with_drawn_seed()
        return cls(params, whole_number("Max new tokens", limit), *switches)

    def with_seed(self, seed: int) -> Asked:
        return self._replace(params=replace(self.params, seed=seed))

    def with_new_seed(self) -> Asked:
        return self._replace(params=replace(self.params, seed=-1).with_drawn_seed())


class Controls(NamedTuple):
    by_name: dict[str, Any]  # a control for each of `NAMES`
    note: gr.Markdown  # where their first values come from
    filters: gr.Accordion  # the badge of those that are folded

    @property
    def inputs(self) -> list:
        return [self.by_name[name] for name in NAMES]


def control(setting: Setting, value: Any, with_info: bool = True, **more) -> Any:
    """The widget for a setting."""
    about = {"value": value, "label": setting.label, "info": setting.info if with_info else None} | more
    if setting.choices:
        options = [(label, str(choice)) for choice, label in setting.choices.items()]
        return Radio(options, **about) if with_info else gr.Dropdown(options, **about)
    if setting.shown:
        low, high, step = setting.shown
        return Slider(low, high, step=step, **about)
    return gr.Textbox(lines=1, max_lines=3, **about) if setting.kind is str else Number(precision=0, **about)


def settings_bar(playground: Playground, last_seed: Callable[[Any], Any], session: gr.State) -> Controls:
    """One line: sampler, temperature, lengths, seed; filters and switches open from badges that name what is active."""
    made: dict[str, Any] = {}

    def make(name: str, **more) -> None:
        value = str(playground.info.defaults[name]) if SETTINGS[name].choices else playground.info.defaults[name]
        place = {"elem_id": name.replace("_", "-"), "elem_classes": OWN}
        made[name] = control(SETTINGS[name], value, **place, **more)

    for name in NAMES[: NAMES.index("max_new_tokens")]:
        make(name, min_width=100)
    made["max_new_tokens"] = Slider(
        1, playground.context, value=playground.default_tokens, step=1, label="Max tokens", elem_id="max-new-tokens",
        min_width=100,
    )  # fmt: skip
    make("seed", min_width=80)
    badge = {name: playground.info.defaults[name] for name in FOLDED}
    with gr.Accordion(filters_in_a_word(badge), open=False, elem_id="filters", elem_classes=[OWN, "badge"]) as filters:
        for name in FOLDED:
            make(name)
        gr.Markdown(ORDER, elem_classes="order")
        note = gr.Markdown(elem_id="defaults")
    with gr.Accordion("More", open=False, elem_id="more-settings", elem_classes="badge"):
        reuse = gr.Button("Reuse the last seed", size="sm", elem_id="reuse", elem_classes=OWN)
        made |= switches(playground)
    greedy = gr.Markdown(GREEDY, visible=False, elem_id="greedy-note", elem_classes=OWN)
    controls = Controls(made, note, filters)
    reuse.click(last_seed, [session], [made["seed"]], **QUICK)
    made["sampler"].change(lambda chosen: gr.update(visible=chosen == "greedy"), [made["sampler"]], [greedy], **QUICK)
    rest_with_greedy(made)
    for name in FOLDED:
        made[name].change(named_filters, [made[n] for n in FOLDED], [filters], **QUICK)
    return controls


def rest_with_greedy(made: dict[str, Any]) -> None:
    """Controls that decide nothing under greedy rest while it is chosen."""
    decided = [made[name] for name in DECIDED]

    def explain(chosen: str) -> list:
        return [gr.update(interactive=chosen != "greedy")] * len(decided)

    made["sampler"].change(explain, [made["sampler"]], decided, **QUICK)


def switches(playground: Playground) -> dict[str, gr.Checkbox]:
    return {
        "past_end": gr.Checkbox(False, label="Write past the end", elem_id="past-end"),
        "parse_special": gr.Checkbox(
            False,
            label="Parse special tokens",
            info="In the prompt of Generate, <|im_start|> and its kin are tokens; otherwise they are text",
            elem_id="parse-special",
            elem_classes=OWN,
        ),
        "skip_thinking": gr.Checkbox(
            False,
            label="Answer without thinking",
            info="In Chat: this model's template knows both ways",
            elem_id="skip-thinking",
            visible=playground.knows_thinking,
        ),
    }


def filters_in_a_word(values: dict[str, Any]) -> str:
    """What the badge says: the filters and penalties that are active."""
    active = [in_a_word(name, value) for name, value in values.items() if value != SETTINGS[name].off]
    return f"Filters: {', '.join(active)}" if active else "Filters: none"


def named_filters(*values) -> dict:
    return gr.update(label=filters_in_a_word(dict(zip(FOLDED, values, strict=True))))


def spelled(
    function: Callable, names: Sequence[str], required: Sequence[str] = (), **defaults: Any
) -> Callable[..., AsyncIterator]:
    """A writer that takes settings as `*values`, with each of `names` spelled out in its signature, which gradio reads;
    `required` ones have no default. A `session` goes last: gradio names what programs send by its place."""
    own, empty = inspect.signature(function, eval_str=True), inspect.Parameter.empty
    fixed = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    parameters = [p for p in fixed if p.name != "session"]
    for name in names:
        default = empty if name in required else (DEFAULTS | defaults)[name]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=KINDS[name]))
    parameters += [p.replace(default=None) for p in fixed if p.name == "session"]
    signature = own.replace(parameters=parameters)

    async def writer(*args, **named):
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        given = bound.arguments
        async for shown in function(*(given[p.name] for p in fixed), *(given[name] for name in names)):
            yield shown

    writer.__name__, writer.__signature__ = function.__name__, signature
    writer.__annotations__ = {p.name: p.annotation for p in parameters if p.annotation is not empty}
    if own.return_annotation is not empty:
        writer.__annotations__["return"] = own.return_annotation
    return writer


def linked(query: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Prompt and settings that an address carries, and the names of those that are wrong there and left out."""
    found = {"prompt": query["prompt"][:LONGEST_LINK]} if "prompt" in query else {}
    readers = {name: setting.parse for name, setting in SETTINGS.items()}
    readers |= {"max_new_tokens": int} | dict.fromkeys(SWITCHES, lambda text: text == "true")
    wrong = []
    for name in readers.keys() & query.keys():
        try:
            found[name] = readers[name](query[name])
        except ValueError:
            wrong.append(name)
    return found, sorted(wrong)


def link_to(tab: str, **values: Any) -> str:
    """The query of an address that opens the page with these; switches that are off need no mention."""
    said = {name: value for name, value in values.items() if value is not False}
    return urlencode({"tab": tab} | {name: "true" if value is True else str(value) for name, value in said.items()})


class LinkButton(NamedTuple):
    """Copies the address that opens the page as a tab is. Its query waits in a hidden box, where a script takes it."""

    button: gr.Button
    query: gr.Textbox
    place: str

    @classmethod
    def build(cls, place: str) -> LinkButton:
        button = gr.Button("Copy link", size="sm", elem_id=place)
        return cls(button, gr.Textbox(visible="hidden", elem_id=f"{place}-text"), place)

    def connect(self, link: Callable, inputs: list) -> None:
        """`link` makes the query of these inputs."""
        copied = self.button.click(link, inputs, [self.query], **QUICK)
        copied.success(None, [self.query], None, js=f"(query) => window.copyLink(query, '{self.place}')")


def own_settings(params: SamplingParams) -> dict[str, Any]:
    """As a link says them."""
    return {name: getattr(params, name) for name in SETTINGS} | {"sampler": params.sampler.value}
