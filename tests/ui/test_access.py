"""The page for everybody: axe's rules on the whole of it, in both themes, and each control by keyboard alone."""

from __future__ import annotations

import pytest
from driving import figures, finished, open_page, run, set_number, tab, wait_until

pytestmark = pytest.mark.browser
GRADIOS_OWN = {
    "aria-prohibited-attr": "the place of an empty chart is a div with an aria-label",
}
"""Rules that gradio's widgets break, and where; nothing else may."""

REACH = """() => {
  const hidden = (e) => !e.checkVisibility({ visibilityProperty: true, opacityProperty: false });
  const radios = (e) => e.type === "radio" && !e.checked;  // arrow keys go between them
  const wanted = 'button, a[href], input, select, textarea, summary, [tabindex="0"]';
  return [...document.querySelectorAll(wanted)]
    .filter((e) => !e.disabled && e.tabIndex >= 0 && !hidden(e) && !radios(e) && !e.dataset.reached
      && !e.closest(".toast-wrap, footer"))
    .map((e) => e.outerHTML.slice(0, 110));
}"""


@pytest.fixture(params=["light", pytest.param("dark", marks=pytest.mark.long)])
def page(browser, talking, request):
    with open_page(browser, f"{talking}/?__theme={request.param}") as page:
        yield page


def settle(page, name: str) -> None:
    """Opens a tab; colours that change slowly have changed."""
    tab(page, name)
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)


def violations(page) -> list[str]:
    """Of all of axe's rules, on all of the page that is visible."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {n['html'][:120]}" for v in found if v["id"] not in GRADIOS_OWN for n in v["nodes"]]


def test_no_tab_breaks_a_rule_of_accessibility(page):
    page.locator(".in-close").wait_for()  # the example's token
    assert violations(page) == []
    set_number(page, "#max-new-tokens", 20)
    run(page)
    wait_until(lambda: finished(page), 30, "the end")
    page.locator("#output .tv-measure").select_option("p")
    page.locator("#output .tk").nth(9).click()
    page.locator("#inspector .in-close").wait_for()
    page.locator("#filters > button").click()
    settle(page, "Generate")
    assert violations(page) == []
    tab(page, "Compare")
    run(page, "#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(3)), 40, "three ends")
    settle(page, "Compare")
    assert violations(page) == []
    tab(page, "Lab")
    page.click("#lab-step")
    wait_until(lambda: page.locator("#lab-steps tr").count() > 1, 10, "a draw")
    settle(page, "Lab")
    assert violations(page) == []
    tab(page, "Chat")
    page.fill("#message textarea", "Once upon a time")
    page.click("#send")
    wait_until(lambda: figures(page, "stats-chat").get("State") in ("end of text", "token limit"), 30, "an answer")
    settle(page, "Chat")
    assert violations(page) == []


@pytest.mark.parametrize("name", ["Generate", "Compare", "Lab", "Chat"])
def test_the_tab_key_reaches_every_control(browser, talking, name):
    with open_page(browser, talking) as page:
        tab(page, name)
        page.wait_for_timeout(1500)
        page.locator("body").click(position={"x": 2, "y": 2})
        wanted = len(page.evaluate(REACH))
        assert wanted > 15
        for _ in range(wanted + 20):
            page.keyboard.press("Tab")
            page.evaluate("document.activeElement.dataset.reached = 'yes'")
        assert page.evaluate(REACH) == []


def test_a_menu_closes_when_focus_leaves_it(browser, talking):
    with open_page(browser, talking) as page:
        for menu in ("#layer input", "#projection input"):
            page.locator(menu).click()
            choices = page.locator(f"#{page.locator(menu).get_attribute('aria-controls')}")
            choices.wait_for()
            page.keyboard.press("Tab")
            choices.wait_for(state="hidden", timeout=3000)


def test_buttons_rest_with_a_reason_until_they_can_do_something(browser, talking):
    with open_page(browser, talking) as page:
        for place, name in (("Compare", "save-compare"), ("Chat", "retry"), ("Generate", "continue")):
            tab(page, place)
            button = page.locator(f"#{name}[disabled]")
            button.wait_for()
            assert button.get_attribute("title"), name
        set_number(page, "#max-new-tokens", 5)
        run(page)
        wait_until(lambda: finished(page), 30, "the end")
        assert page.locator("#continue").is_enabled() and page.locator("#receipt").is_enabled()
        assert page.locator("#retry").is_disabled()


def test_a_lost_connection_is_announced_and_so_is_its_return(browser, talking):
    with open_page(browser, talking) as page:
        banner = page.locator("#connection")
        page.context.set_offline(True)
        try:
            banner.get_by_text("connection to the server is lost").wait_for(timeout=15_000)
        finally:
            page.context.set_offline(False)
        banner.get_by_text("Connected again").wait_for(timeout=15_000)
        set_number(page, "#max-new-tokens", 5)
        run(page)
        wait_until(lambda: finished(page), 30, "a text after it")


def test_what_was_said_of_an_action_goes_with_the_next_one(browser, talking):
    with open_page(browser, talking) as page:
        page.fill("#prompt textarea", "")
        page.click("#run")
        page.locator(".toast-body").wait_for()
        page.fill("#prompt textarea", "Once")
        set_number(page, "#max-new-tokens", 5)
        page.click("#run")
        page.locator(".toast-body").wait_for(state="hidden", timeout=3000)
