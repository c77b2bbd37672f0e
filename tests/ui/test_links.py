"""Links: what an address carries, and that the page it opens writes the same, in every tab."""

from __future__ import annotations

import pytest
from driving import choose_preset, figures, finished, open_page, run, set_number, tab, text_of, wait_until, write

pytestmark = pytest.mark.browser


@pytest.fixture
def page(browser, server):
    with open_page(browser, server) as page:
        yield page


def test_a_link_carries_prompt_and_settings_and_ignores_what_is_wrong(page, server):
    page.goto(f"{server}/?prompt=The+old+fox&sampler=multinomial&temperature=1.25&seed=42&top_k=lots&max_new_tokens=33")
    wait_until(lambda: page.locator("#prompt textarea").input_value() == "The old fox", 10, "the prompt")
    wait_until(lambda: page.locator("#temperature input[type=number]").input_value() == "1.25", 5, "the temperature")
    assert page.locator("#seed input").input_value() == "42"
    assert page.locator("#max-new-tokens input[type=number]").input_value() == "33"
    assert page.locator("#sampler input:checked").input_value() == "multinomial"


def test_what_is_wrong_in_a_link_is_named(page, server):
    page.goto(f"{server}/?prompt=The+old+fox&top_k=lots&temperature=-3")
    page.get_by_text("they are left out: temperature, top_k").wait_for(timeout=8000)


def copied(page, button: str) -> str:
    """The address that a button puts into the clipboard."""
    page.evaluate("() => { window.copyText = (text) => { window.copied = text; }; window.copied = ''; }")
    page.click(button)
    wait_until(lambda: page.evaluate("window.copied"), 5, "the link")
    return page.evaluate("window.copied")


def test_a_copied_link_opens_the_same_settings_and_writes_the_same_text(page):
    page.fill("#prompt textarea", "The old fox & his <b>friend</b>")
    set_number(page, "#temperature", 1.1)
    write(page, 25)
    before, seed = text_of(page), figures(page)["Seed"]
    page.fill("#prompt textarea", "something else")  # a link is of what was written
    page.goto(copied(page, "#link"))
    wait_until(lambda: page.locator("#seed input").input_value() == seed, 10, "the seed that was drawn")
    write(page, 25)
    assert text_of(page) == before


def test_a_copied_link_of_a_comparison_writes_the_same_texts(page):
    tab(page, "Compare")
    choose_preset(page, "Temperature ladder on one noise")
    wait_until(lambda: page.locator("#output-3").is_visible(), 5, "four columns")
    set_number(page, "#max-new-tokens", 20)

    def texts() -> list[str]:
        run(page, "#run-compare")
        wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(4)), 40, "four ends")
        page.wait_for_timeout(500)
        return [text_of(page, f"output-{name}") for name in ("common", *range(4))]

    before = texts()
    page.goto(copied(page, "#link-compare"))
    wait_until(lambda: page.locator("#output-3").is_visible(), 10, "the tab, and its columns")
    assert texts() == before


def test_a_copied_link_of_the_lab_shows_the_same_distribution_and_the_same_draw(page):
    page.fill("#prompt textarea", "The old fox")
    tab(page, "Lab")
    set_number(page, "#temperature", 1.3)
    set_number(page, "#lab-count", 300)

    def made() -> list[str]:
        page.click("#lab-draw")
        wait_until(lambda: "300 of 300" in page.locator("#lab-draws").inner_text(), 20, "the draws")
        page.locator("#lab-draw").wait_for()
        page.click("#lab-step")
        wait_until(lambda: "Noise of seed" in page.locator("#lab-steps").inner_text(), 10, "a draw")
        return [page.locator(f"#lab-{name}").inner_text() for name in ("table", "draws", "steps")]

    set_number(page, "#seed", 11)
    before = made()
    page.goto(copied(page, "#link-lab"))
    wait_until(lambda: "Entropy" in page.locator("#lab-table").inner_text(), 20, "the tab")
    assert page.locator("#lab-count input").input_value() == "300"
    assert made() == before


def test_a_copied_link_of_a_conversation_asks_for_the_same_answer(browser, talking):
    with open_page(browser, talking) as page:
        tab(page, "Chat")
        set_number(page, "#max-new-tokens", 15)

        def answer(turns: int) -> list[str]:
            page.click("#send")
            wait_until(lambda: page.locator("#talk .cv-turn").count() == turns, 10, "an answer")
            wait_until(lambda: finished(page, "stats-chat"), 30, "its end")
            return page.locator("#talk .cv-text").all_inner_texts()

        page.fill("#message textarea", "Once upon a time")
        answer(2)
        page.fill("#message textarea", "The <b>fox</b> & said")
        both = answer(4)
        page.goto(copied(page, "#link-chat"))
        wait_until(lambda: page.locator("#talk .cv-turn").count() == 2, 10, "the turns before it")
        assert page.locator("#message textarea").input_value() == "The <b>fox</b> & said"
        assert answer(4) == both


@pytest.mark.parametrize(
    "turns",
    [
        "[",
        "[" * 19_000,
        '[{"role":[],"content":"x"}]',
        '[{"role":{},"content":"x"}]',
        "[7]",
        "[]",
        "{}",
        "7",
        '[{"role":"user"}]',
        '[{"role":"root","content":"x"}]',
        '[{"role":"user","content":1}]',
    ],
)
def test_a_conversation_that_is_none_is_left_out(turns):
    from playground.ui.chat import linked_talk

    assert linked_talk({"turns": turns}) is None
