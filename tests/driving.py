"""How the browser tests read and work the page."""

from __future__ import annotations

import time


def text_of(page, name="output") -> str:
    return page.locator(f"#{name} .tv-text").inner_text()


def figures(page, name="stats") -> dict[str, str]:
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
    return figures(page, name).get("State") not in ("ready", "prefill", "writing", None)
