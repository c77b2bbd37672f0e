"""What people come for, each within four clicks of the first screen."""

from __future__ import annotations

import pytest
from driving import finished, open_page, run, set_number, text_of, wait_until

pytestmark = pytest.mark.browser
MOST = 4


class Visitor:
    """Clicks, and counts."""

    def __init__(self, page):
        self.page, self.clicks = page, 0

    def click(self, target) -> None:
        self.clicks += 1
        (self.page.locator(target) if isinstance(target, str) else target).click()


@pytest.fixture
def visitor(browser, server):
    with open_page(browser, server) as page:
        visitor = Visitor(page)
        yield visitor
        assert 1 <= visitor.clicks <= MOST


def test_find_why_a_token_was_chosen(visitor):
    visitor.click(visitor.page.locator("#output .tk", has_text="girl").first)
    wait_until(lambda: "Why this one?" in visitor.page.locator("#inspector").inner_text(), 5, "the reason")


def test_branch_from_a_token(visitor):
    page = visitor.page
    set_number(page, "#max-new-tokens", 20)
    visitor.click("#run")
    wait_until(lambda: finished(page), 30, "the end")
    visitor.click(page.locator("#output .tk").nth(5))
    visitor.click(page.locator("#inspector button.in-row:not(.in-chosen)").first)
    wait_until(lambda: page.locator("#output .tk-forced").count() == 1 and finished(page), 30, "the branch")


def test_compare_temperatures(visitor):
    page = visitor.page
    visitor.click(page.get_by_role("tab", name="Compare"))
    visitor.click("#preset input")
    visitor.click(page.get_by_role("option", name="Temperature ladder on one noise"))
    page.locator("#output-3").wait_for()
    set_number(page, "#max-new-tokens", 15)
    visitor.click("#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(4)), 40, "four ends")
    titles = [page.locator(f"#output-{n} .tv-title").inner_text() for n in range(4)]
    assert titles == ["T = 0.3", "T = 0.7", "T = 1", "T = 1.4"]


def test_read_a_scale(visitor):
    wait_until(lambda: visitor.page.locator("#weight-scales canvas").is_visible(), 10, "the scales")
    visitor.click("#weight-scales canvas")
    assert "scale 0.0" in visitor.page.locator("#weight-scales .hm-readout").inner_text()


def test_replay_a_receipt(visitor, tmp_path):
    page = visitor.page
    set_number(page, "#max-new-tokens", 8)
    run(page)
    wait_until(lambda: finished(page), 30, "the end")
    written = text_of(page)
    with page.expect_download() as download:
        page.click("#receipt")
    download.value.save_as(tmp_path / "receipt.json")
    page.reload()
    page.wait_for_selector("#run")
    with page.expect_file_chooser() as chooser:
        visitor.click("#replay")
    chooser.value.set_files(tmp_path / "receipt.json")
    wait_until(lambda: "Identical" in page.locator("#verdict textarea").input_value(), 30, "the verdict")
    wait_until(lambda: text_of(page) == written, 5, "its text")
