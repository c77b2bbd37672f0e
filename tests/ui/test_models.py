"""Several models on one page, and chat: in a real Chromium, and through the API's real client."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from driving import figures, finished, open_page, run, set_number, text_of, wait_until
from gradio_client import Client
from serving import serve

pytestmark = pytest.mark.browser
PAUSE = 800  # milliseconds between the end of a run and a person's next click: gradio repeats a run's last values once


@pytest.fixture
def page(browser, choice):
    url, _ = choice
    with open_page(browser, url) as page:
        yield page


def choose(page, model: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=model).click()


def shown_model(page) -> str:
    return page.locator("#title .mh-model").inner_text()


def load_chatty(page, choice) -> None:
    choose(page, "chatty")
    wait_until(lambda: "chatty" in shown_model(page), 30, "the other model")
    page.get_by_role("tab", name="Chat").click()


def talk(page) -> list[str]:
    return page.locator("#talk .cv-text").all_inner_texts()


def send(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def settle(page) -> None:
    """Figures and text are painted one after the other: the end counts once it has stood for a while."""
    page.wait_for_timeout(PAUSE)
    wait_until(lambda: finished(page, "stats-chat"), 30, "the end")
    page.wait_for_timeout(PAUSE)


def unfold(page, line: str, inside: str) -> None:
    """On a busy machine gradio's folded part now and then misses a click, or takes it late, as a second one: then a
    person clicks again."""
    for _ in range(4):
        page.get_by_text(line).click()
        with suppress(AssertionError):
            wait_until(page.locator(inside).first.is_visible, 5, "what is inside")
            page.wait_for_timeout(PAUSE)
            if page.locator(inside).first.is_visible():
                return
    pytest.fail(f"{line!r} does not open")


def test_another_model_brings_its_chat_tab_its_settings_and_keeps_writing(page, choice):
    if "chatty" in shown_model(page):
        choose(page, "storyteller")
    wait_until(lambda: "storyteller" in shown_model(page), 30, "the first model")
    assert page.get_by_role("tab", name="Chat").count() == 0
    load_chatty(page, choice)
    page.locator("#filters > button").click()
    assert "generation_config.json" in page.locator("#defaults").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#temperature input[type=number]").input_value() == "0.6"
    page.get_by_role("tab", name="Generate").click()
    set_number(page, "#max-new-tokens", 20)
    run(page)
    wait_until(lambda: finished(page), 30, "the end")
    assert len(text_of(page)) > 20


def test_a_link_is_followed_on_a_page_with_several_models(browser, choice):
    url, _ = choice
    asked = f"{url}/?prompt=The%20old%20fox&temperature=1.35&top_k=7&max_new_tokens=11&sampler=multinomial"
    with open_page(browser, asked) as page:
        wait_until(lambda: page.locator("#prompt textarea").input_value() == "The old fox", 10, "the prompt")
        page.wait_for_timeout(PAUSE)
        assert page.locator("#temperature input[type=number]").input_value() == "1.35"
        assert page.locator("#max-new-tokens input[type=number]").input_value() == "11"
        assert page.locator("#sampler input:checked").get_attribute("value") == "multinomial"


def test_a_model_that_cannot_be_loaded_is_told_and_the_old_one_goes_on(page, choice):
    load_chatty(page, choice)  # also waits for what the server says at page load
    page.wait_for_timeout(PAUSE)
    before = shown_model(page)
    choose(page, "broken")
    page.locator("#failure textarea").wait_for(timeout=20_000)
    assert "'gpt2' is not supported" in page.locator("#failure textarea").input_value()
    assert shown_model(page) == before
    wait_until(lambda: "broken" not in page.locator("#model input").input_value(), 5, "the old choice")
    set_number(page, "#max-new-tokens", 12)
    page.get_by_role("tab", name="Generate").click()
    run(page)
    wait_until(lambda: finished(page), 30, "the end")


def test_a_conversation_goes_on_is_retried_edited_and_begun_anew(page, choice):
    load_chatty(page, choice)
    set_number(page, "#max-new-tokens", 25)
    send(page, "One day, a fox")
    wait_until(lambda: finished(page, "stats-chat") and len(talk(page)) == 2, 30, "an answer")
    first = talk(page)
    send(page, "The hen said, <script>alert(1)</script>")
    wait_until(lambda: finished(page, "stats-chat") and len(talk(page)) == 4, 30, "a second answer")
    assert talk(page)[:2] == first and "<script>alert(1)</script>" in talk(page)[2]
    assert int(figures(page, "stats-chat")["KV cache"].split()[0]) > 50
    settle(page)
    unfold(page, "The newest answer, token by token", "#output-chat .tk")
    words = page.locator("#output-chat .tk", has_text=re.compile(r"\w"))  # a line break is a token that has no room
    words.first.click()
    wait_until(lambda: "= score" in page.locator("#inspector").inner_text(), 5, "the draw of a token")
    page.keyboard.press("Escape")
    second = talk(page)[3]
    settle(page)
    page.click("#retry")
    wait_until(lambda: finished(page, "stats-chat") and talk(page)[3:] not in ([], [second]), 30, "another answer")
    assert len(talk(page)) == 4
    settle(page)
    page.click("#edit")
    wait_until(lambda: page.locator("#message textarea").input_value().startswith("The hen said"), 5, "the old words")
    assert talk(page) == first
    send(page, "The hen ran away.")
    wait_until(lambda: finished(page, "stats-chat") and talk(page)[2:3] == ["The hen ran away."], 30, "the edited turn")
    settle(page)
    page.click("#clear-chat")
    wait_until(lambda: talk(page) == [], 5, "an empty conversation")
    send(page, "   ")
    page.get_by_text("The conversation has no message yet").wait_for(timeout=10_000)


def test_stop_keeps_what_was_said(page, choice):
    load_chatty(page, choice)
    page.locator("#more-settings > button").click()
    page.get_by_label("Write past the end").check()
    set_number(page, "#max-new-tokens", 1500)
    send(page, "A long story:")
    wait_until(lambda: len(talk(page)) == 2 and len(talk(page)[1]) > 40, 30, "text")
    page.click("#stop-chat")
    wait_until(lambda: finished(page, "stats-chat"), 10, "the end")
    said = talk(page)[1]
    set_number(page, "#max-new-tokens", 5)
    send(page, "And then?")
    wait_until(lambda: len(talk(page)) == 4 and finished(page, "stats-chat"), 30, "an answer")
    assert talk(page)[1] == said


def test_the_chat_endpoint_remembers_the_conversation_of_its_client(chatty):
    settings = {"system": "", "sampler": "greedy", "max_new_tokens": 8, "temperature": 0, "seed": 1}
    with serve("--model", str(chatty)) as url:
        client, other = Client(url, verbose=False), Client(url, verbose=False)
        assert len(client.predict(message="One day", api_name="/chat", **settings)[0]["turns"]) == 2
        assert len(client.predict(message="And?", api_name="/chat", **settings)[0]["turns"]) == 4
        assert len(other.predict(message="One day", api_name="/chat", **settings)[0]["turns"]) == 2


def test_thoughts_are_folded_and_everything_is_text(browser):
    import gradio as gr

    from playground.ui.components import ChatView
    from playground.ui.page import HEAD

    hostile = "<img src=x onerror=window.hit=1><script>window.hit=1</script>&lt;b&gt;"
    turns = [
        ("user", hostile),
        ("assistant", f"<think>\nhm {hostile}\n</think>\n\nYes."),
        ("assistant", "<think>so far"),
    ]
    with gr.Blocks() as blocks:
        view = ChatView(elem_id="talk")
        view.value = {"turns": [{"role": role, "content": content} for role, content in turns]}
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, head=HEAD)
    with open_page(browser, url, ready=".cv-turn") as page:
        assert talk(page) == [hostile, "Yes.", ""]
        folded = page.locator("#talk details:not([hidden])")
        assert folded.locator("summary").all_inner_texts() == ["Thought", "Thinking"]
        assert folded.locator("div").all_text_contents() == [f"hm {hostile}", "so far"]
        assert page.evaluate("window.hit === undefined && !document.querySelector('#talk img, #talk script')")
    blocks.close()
