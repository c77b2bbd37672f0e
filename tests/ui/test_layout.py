"""Where things stand on the page: at six widths, in two themes."""

from __future__ import annotations

import pytest
from driving import figures, finished, open_page, run, set_number, wait_until

pytestmark = pytest.mark.browser
SIZES = [(390, 844), (853, 1280), (1280, 720), (1440, 900), (1920, 1080), (2560, 1440)]
FIRST = [("light", (390, 844)), ("dark", (1280, 720)), ("light", (1440, 900))]
"""What everybody's tests look at; the others take longer, and are marked so."""


def looks() -> list:
    every = [(theme, size) for theme in ("light", "dark") for size in SIZES]
    marks = [() if look in FIRST else (pytest.mark.long,) for look in every]
    return [
        pytest.param(look, id=f"{look[0]}, {look[1][0]}x{look[1][1]}", marks=mark)
        for look, mark in zip(every, marks, strict=True)
    ]


@pytest.fixture(params=looks())
def page(browser, server, request):
    theme, (width, height) = request.param
    with open_page(browser, f"{server}/?__theme={theme}", width, height) as page:
        yield page


def on_screen(page, *selectors: str) -> bool:
    """Whether all of each stands inside the window."""
    boxes = [page.locator(selector).first.bounding_box() for selector in selectors]
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    return all(
        box and box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= width + 1
        and box["y"] + box["height"] <= height + 1
        for box in boxes
    )  # fmt: skip


def clipped(page) -> list[str]:
    """Texts of buttons, chips and labels that don't fit their box."""
    return page.evaluate("""() => [...document.querySelectorAll(
        "button, .mh-chip, .tv-title, [data-testid=block-info], .stats dd, .in-share")]
      .filter((e) => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
      .map((e) => e.textContent.trim().slice(0, 40))""")


def test_the_first_screen_holds_run_figures_and_inspector_during_and_after_a_run(page):
    width = page.viewport_size["width"]
    page.wait_for_selector("#output .tk")  # the example
    assert on_screen(page, "#run", "#foot")
    set_number(page, "#max-new-tokens", 150)
    run(page)
    wait_until(lambda: figures(page)["State"] == "writing", 10, "text")
    assert on_screen(page, "#stop", "#foot")
    wait_until(lambda: finished(page), 40, "the end")
    assert on_screen(page, "#run", "#foot")
    if width > 640:
        assert on_screen(page, "#inspector")
    page.locator("#output .tv-text").evaluate("view => { view.scrollTop = 0; }")
    page.locator("#output .tk").nth(6).click()
    page.locator(".in-close").wait_for()
    page.wait_for_timeout(600)
    if width > 640:
        assert on_screen(page, "#run", "#foot")
    if width >= 1440 or width == 390:
        rows = page.locator("#inspector button.in-row")
        assert rows.count() >= 10 and on_screen(page, *[f"#inspector button.in-row >> nth={n}" for n in range(10)])
    token, sheet = page.locator("#output .tk-at").bounding_box(), page.locator("#inspector").bounding_box()
    if width == 390:  # a sheet, and the token above it
        assert token["y"] >= 0 and token["y"] + token["height"] <= sheet["y"]
    assert clipped(page) == []
    page.keyboard.press("Escape")
    page.locator(".in-close").wait_for(state="hidden")


def test_margins_are_equal_and_nothing_is_wider_than_the_page(page):
    for name in ("Generate", "Compare", "Lab"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(400)
        width = page.viewport_size["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#columns").bounding_box()
        assert abs(box["x"] - (width - box["x"] - box["width"])) <= 16, "the page stands off its middle"


def test_the_texts_of_a_comparison_begin_on_the_first_screen(page):
    page.get_by_role("tab", name="Compare").click()
    set_number(page, "#max-new-tokens", 20)
    run(page, "#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(3)), 40, "three ends")
    height = page.viewport_size["height"]
    # on a phone columns stand below each other: what all share comes first
    for name in ("0", "1", "2") if page.viewport_size["width"] > 640 else ("common",):
        box = page.locator(f"#output-{name} .tv-text").bounding_box()
        assert box["y"] + 50 <= height, f"column {name} begins at {box['y']:.0f} of {height}"


def test_badges_close_by_escape_by_a_click_outside_and_when_focus_leaves(browser, server):
    with open_page(browser, server) as page:
        inside = page.locator("#top-k")
        for close in (
            lambda: page.keyboard.press("Escape"),
            lambda: page.locator("#output .tv-text").click(position={"x": 5, "y": 5}),
            lambda: page.locator("#prompt textarea").focus(),
        ):
            page.locator("#filters > button").click()
            inside.wait_for()
            close()
            inside.wait_for(state="hidden", timeout=3000)


def test_the_badge_names_the_filters_that_are_active(browser, server):
    with open_page(browser, server) as page:
        assert page.locator("#filters > button").inner_text().startswith("Filters: none")
        page.locator("#filters > button").click()
        set_number(page, "#top-p", 0.9)
        wait_until(lambda: "0.9" in page.locator("#filters > button").inner_text(), 5, "its name")


def test_the_example_is_labelled_and_one_of_its_tokens_is_open(browser, server):
    with open_page(browser, server) as page:
        page.locator(".in-close").wait_for()
        assert "recorded" in page.locator("#output .tv-title").inner_text()
        assert page.locator("#inspector .in-row").count() > 10 and page.locator("#inspector button.in-row").count() == 0
        colours = page.locator("#output .tk").evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
        assert len(set(colours)) > 5


def test_the_tour_visits_the_page_and_can_be_left_at_any_time(browser, server):
    with open_page(browser, server) as page:
        page.get_by_role("button", name="Tour").click()
        card = page.get_by_role("dialog", name="Tour")
        for number in range(1, 6):
            assert f"({number} of 6)" in card.inner_text() and page.locator(".mh-lit").count() == 1
            card.get_by_role("button", name="Next").click()
        card.get_by_role("button", name="Done").click()
        page.get_by_role("button", name="Tour").click()
        page.keyboard.press("Escape")
        assert card.count() == 0 and page.locator(".mh-lit").count() == 0
