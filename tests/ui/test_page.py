"""The page in a real Chromium, driven by Playwright."""

from __future__ import annotations

import gzip
import re
import time
import urllib.request

import pytest
from driving import figures, finished, open_page, run, set_number, text_of, wait_until

pytestmark = pytest.mark.browser


def past_the_end(page) -> None:
    page.locator("#more-settings > button").click()
    page.get_by_label("Write past the end").check()


@pytest.fixture
def page(browser, server):
    with open_page(browser, server) as page:
        yield page


@pytest.mark.parametrize("sampler", ["Greedy", "Multinomial", "Gumbel-max"])
def test_each_sampler_writes_text_that_grows_and_leaves_its_figures(page, sampler):
    page.fill("#prompt textarea", "One day, a little girl")
    page.locator("#sampler").get_by_text(sampler, exact=True).click()
    set_number(page, "#max-new-tokens", 60)
    began = time.monotonic()
    run(page)
    lengths = []
    wait_until(
        lambda: lengths.append(len(text_of(page))) or figures(page).get("State") in ("writing", "token limit"),
        10,
        "a first token",
    )
    assert time.monotonic() - began < 5
    wait_until(lambda: lengths.append(len(text_of(page))) or finished(page), 30, "the end")
    growing = sorted(set(lengths))
    assert len(growing) >= 4, f"the text came in {len(growing)} pieces"
    shown = figures(page)
    assert text_of(page).startswith("One day, a little girl ")
    for name in ("First token", "Prefill", "Decode", "KV cache"):
        assert re.search(r"\d", shown[name]), shown
    assert (shown["Seed"] == "not used") == (sampler == "Greedy")


def test_stop_ends_a_run_and_the_next_one_works(page):
    set_number(page, "#max-new-tokens", 1500)
    past_the_end(page)
    run(page)
    wait_until(lambda: len(text_of(page)) > 60 and figures(page)["State"] == "writing", what="text")
    page.click("#stop")
    wait_until(lambda: figures(page).get("State") == "stopped", 5, "the footer to say so")
    time.sleep(0.5)
    before = text_of(page)
    time.sleep(0.7)
    assert text_of(page) == before
    set_number(page, "#max-new-tokens", 5)
    run(page)
    wait_until(lambda: finished(page) and figures(page)["State"] != "stopped", 15, "the next run's end")


def test_run_turns_into_stop_and_a_second_run_during_a_run_is_told_so_and_harms_nothing(page):
    set_number(page, "#max-new-tokens", 150)
    past_the_end(page)
    run(page)
    wait_until(lambda: figures(page)["State"] == "writing", what="text")
    assert page.locator("#stop").is_visible() and not page.locator("#run").is_visible()
    page.get_by_role("tab", name="Compare").click()
    run(page, "#run-compare")
    page.get_by_text("already writing").first.wait_for(timeout=5000)
    page.get_by_role("tab", name="Generate").click()
    wait_until(lambda: finished(page), 30, "the first run's end")
    assert figures(page)["State"] == "token limit"
    assert page.locator("#run").is_visible() and not page.locator("#stop").is_visible()


def test_the_panel_follows_layer_and_projection_and_shows_the_newest_token(page):
    def choose(box: str, option: str):
        page.locator(f"{box} input").click()
        page.get_by_role("option", name=option, exact=True).click()

    def note(name: str) -> str:
        return page.locator(f"#{name} .hm-note").inner_text()

    wait_until(lambda: "256 x 512 weight" in note("weight-scales"), 10, "the weight's scales")
    first = page.locator("#weight-scales canvas").get_attribute("aria-label")
    assert "2 by 4 scales" in first
    choose("#layer", "Layer 2")
    wait_until(lambda: page.locator("#weight-scales canvas").get_attribute("aria-label") != first, 5, "new scales")
    choose("#projection", "mlp.shared_experts.down_proj")
    wait_until(lambda: "512 x 256 weight" in note("weight-scales"), 5, "another projection")
    set_number(page, "#max-new-tokens", 12)
    run(page)
    wait_until(lambda: finished(page), 20, "the end")
    assert "256 values enter" in note("activation-scales")
    choose("#projection", "self_attn.kv_b_proj")
    wait_until(lambda: "Absorbed at decode" in note("activation-scales"), 5, "the explanation")
    page.locator("#weight-scales canvas").focus()
    page.keyboard.press("ArrowDown")
    assert "row 1, column 0: scale" in page.locator("#weight-scales .hm-readout").inner_text()


def test_the_panel_follows_the_token_that_is_chosen_and_returns_to_the_newest(page):
    set_number(page, "#max-new-tokens", 12)
    run(page)
    wait_until(lambda: finished(page), 30, "the end")
    title, legend = page.locator("#activation-scales .hm-title"), page.locator("#activation-scales .hm-legend")
    newest = legend.inner_text()
    seen = set()
    for number in (3, 7):
        page.locator("#output .tk").nth(number - 1).click()
        wait_until(lambda n=number: title.inner_text() == f"Activation scales of token {n}", 5, "its scales")
        seen.add(legend.inner_text())
    assert len(seen | {newest}) == 3, "other tokens have other scales"
    page.locator("#projection input").click()
    page.get_by_role("option", name="self_attn.o_proj").click()
    wait_until(lambda: legend.inner_text() not in seen, 5, "its scales in another projection")
    assert title.inner_text() == "Activation scales of token 7"
    page.locator(".in-close").click()
    wait_until(lambda: title.inner_text() == "Activation scales of the newest token", 5, "the newest one's")


def test_compare_streams_three_columns_together(page):
    set_number(page, "#max-new-tokens", 40)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#run-compare").wait_for()
    run(page, "#run-compare")
    columns = range(3)
    wait_until(lambda: all(len(text_of(page, f"output-{n}")) > 20 for n in columns), 20, "three texts")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in columns), 30, "three ends")
    common = text_of(page, "output-common")
    assert common.startswith("Once upon a time") and len({text_of(page, f"output-{n}") for n in columns}) == 3
    # the first token after what they share is marked in each, and explained
    marked = [page.locator(f"#output-{n} .tk-fork").inner_text() for n in columns]
    assert len(set(marked)) > 1
    table = page.locator("#fork").inner_text()
    assert "The texts part at token" in table and "fell between" in table and "noise" in table


def test_the_prompts_tokens_are_shown_as_chips_and_special_ones_marked(page):
    page.fill("#prompt textarea", "Once <|endoftext|> upon")
    page.locator("#prompt-tokens > button").click()
    chips = page.locator("#chips .tc-chip")
    wait_until(lambda: chips.count() > 4, 5, "chips")
    assert page.locator("#chips .tc-special").count() == 1  # what the tokenizer itself puts before a text
    page.keyboard.press("Escape")
    page.locator("#more-settings > button").click()
    page.get_by_label("Parse special tokens").check()
    page.keyboard.press("Escape")
    page.locator("#prompt-tokens > button").click()
    wait_until(lambda: page.locator("#chips .tc-special").count() == 2, 5, "the token that was typed")
    assert "<|endoftext|>" in page.locator("#chips .tc-special").last.inner_text()


def test_html_in_the_prompt_is_shown_as_text(page):
    attack = "<script>window.hit=1</script><img src=x onerror='window.hit=1'> Once"
    page.fill("#prompt textarea", attack)
    set_number(page, "#max-new-tokens", 5)
    run(page)
    wait_until(lambda: finished(page), 20, "the end")
    assert attack in text_of(page)
    assert page.evaluate("window.hit") is None and page.locator("#output img").count() == 0


def test_greedy_disables_what_it_does_not_use_and_says_why(page):
    page.locator("#sampler").get_by_text("Greedy", exact=True).click()
    page.get_by_text("have nothing to decide").wait_for(timeout=5000)
    wait_until(lambda: page.locator("#seed input").is_disabled(), 5, "the seed to be disabled")
    page.locator("#sampler").get_by_text("Multinomial", exact=True).click()
    wait_until(lambda: page.locator("#seed input").is_enabled(), 5, "the seed to be enabled")


def test_what_is_set_before_the_page_has_heard_of_the_model_is_kept(browser, server):
    held, pattern = [], "**/queue/join*"
    browser.route(pattern, lambda route: held.append(route))
    try:
        with open_page(browser, server) as page:
            wait_until(lambda: page.locator("#title").is_visible() and held, 10, "the page to ask")
            set_number(page, "#max-new-tokens", 7)
            while held:
                held.pop().continue_()
            browser.unroute(pattern)
            wait_until(lambda: page.locator("#weight-scales canvas").count(), 15, "the answer")
            run(page)
            wait_until(lambda: finished(page), 20, "the end")
            assert figures(page)["State"] == "token limit" and page.locator("#output .tk").count() == 7
    finally:
        browser.unroute(pattern)


def test_an_empty_prompt_is_one_sentence_on_the_page(page):
    page.fill("#prompt textarea", "   ")
    run(page)
    page.get_by_text("The prompt is empty; write a few words").first.wait_for(timeout=5000)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_page(browser, server, theme, width):
    with open_page(browser, f"{server}/?__theme={theme}", width, 844) as page:
        time.sleep(0.5)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_page_that_is_opened_for_the_first_time_loads_at_most_700_kilobytes(browser, server):
    context = browser.browser.new_context()  # with a cache of its own
    page, sizes = context.new_page(), []
    network = context.new_cdp_session(page)
    network.send("Network.enable")
    network.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    page.goto(server)
    page.wait_for_selector("#output .tk")
    page.wait_for_timeout(2000)
    context.close()
    assert 100_000 < sum(sizes) <= 700_000


@pytest.mark.parametrize("accepted", ["gzip", "identity"])
def test_the_page_is_compressed_for_browsers_that_take_it(server, accepted):
    asked = urllib.request.Request(server, headers={"Accept-Encoding": accepted})
    with urllib.request.urlopen(asked) as answer:
        body = answer.read()
        assert (answer.headers["Content-Encoding"] == "gzip") == (accepted == "gzip")
    assert b"FP8 Playground" in (gzip.decompress(body) if accepted == "gzip" else body)
