"""Makes the README's pictures: `python tests/pictures.py` starts the page and looks at it in Chromium."""

from __future__ import annotations

from pathlib import Path

from driving import figures, finished, open_page, run, set_number, wait_until
from playwright.sync_api import sync_playwright
from serving import serve

ASSETS = Path(__file__).parents[1] / "playground" / "assets"


def take(page, name: str) -> None:
    page.wait_for_timeout(800)
    page.screenshot(path=ASSETS / f"{name}.png")
    print(f"wrote {name}.png")


def main() -> None:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with serve() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        with open_page(browser, f"{url}/?__theme=light&seed=7") as page:
            wait_until(lambda: page.locator("#seed input").input_value() == "7", 10, "the seed")
            run(page)
            wait_until(lambda: finished(page), 60, "the end")
            page.locator("#output .tk", has_text="sign").first.click()
            take(page, "page")
        with open_page(browser, f"{url}/?__theme=light&seed=7") as page:
            page.get_by_role("tab", name="Compare").click()
            page.locator("#preset input").click()
            page.get_by_role("option", name="Temperature ladder on one noise").click()
            page.locator("#output-3").wait_for()
            set_number(page, "#max-new-tokens", 60)
            run(page, "#run-compare")
            wait_until(
                lambda: figures(page, "stats-3") and all(finished(page, f"stats-{n}") for n in range(4)), 60, "ends"
            )
            take(page, "compare")
        browser.close()


if __name__ == "__main__":
    main()
