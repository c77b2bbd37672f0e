"""How the browser tests open, read and work the page."""

from __future__ import annotations

import time
from contextlib import contextmanager


@contextmanager
def open_page(browser, url: str, width: int = 1440, height: int = 900, ready: str = "#run"):
    """A page of the one context that all tests share: what it loads comes from the browser's cache. Ends with an
    assertion that nothing went wrong in it and that it asked nobody but its server."""
    page, problems = browser.new_page(), []
    page.set_viewport_size({"width": width, "height": height})
    page.on("pageerror", lambda error: problems.append(str(error)))
    own = (url.split("/?")[0], "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(own) or problems.append(request.url))
    try:
        page.goto(url)
        page.wait_for_selector(ready)
        yield page
    finally:
        page.close()
    assert problems == [], "script errors, or requests that leave the machine"


def text_of(page, name="output") -> str:
    return page.locator(f"#{name} .tv-text").inner_text()


def figures(page, name="stats") -> dict[str, str]:
    """Of the footer, or of a line `stats-N` of the table under compared columns."""
    if name.removeprefix("stats-").isdigit():
        read = "row => [...row.cells].map(cell => cell.textContent)"
        rows = [
            page.locator(where).evaluate_all(f"rows => rows.map({read})") for where in ("#figures thead tr", f"#{name}")
        ]
        return dict(zip(*(row[0] for row in rows), strict=True)) if all(rows) else {}
    pairs = "pairs => pairs.map(p => [p.children[0].textContent, p.children[1].textContent])"
    return dict(page.locator(f"#{name} .stats > div").evaluate_all(pairs))


def wait_until(condition, seconds=30.0, what="condition"):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def set_number(page, selector: str, value: float) -> None:
    box = page.locator(f"{selector} input[type=number]").first
    box.fill(str(value))
    box.blur()


def run(page, button="#run"):
    page.click(button)


def finished(page, name="stats") -> bool:
    state = figures(page, name).get("State")
    return state not in ("ready", "prefill", "writing", None) and not state.startswith("waiting")


def write(page, tokens: int = 30) -> None:
    set_number(page, "#max-new-tokens", tokens)
    run(page)
    wait_until(lambda: figures(page).get("State") == "token limit", 40, "the end")


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def choose_preset(page, name: str) -> None:
    page.locator("#preset input").click()
    page.get_by_role("option", name=name).click()
