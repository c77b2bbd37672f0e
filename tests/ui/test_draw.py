"""What the page shows of the draw, in a real Chromium: inspector, branches, comparison, lab, receipts."""

from __future__ import annotations

import json
import re

import pytest
from driving import choose_preset, finished, open_page, run, set_number, tab, text_of, wait_until, write

pytestmark = pytest.mark.browser


@pytest.fixture(
    params=[
        pytest.param(("light", 1440), id="light, wide"),
        pytest.param(("dark", 390), id="dark, phone", marks=pytest.mark.long),
    ]
)
def page(browser, server, request):
    theme, width = request.param
    with open_page(browser, f"{server}/?__theme={theme}", width) as page:
        yield page


def inspector(page):
    return page.locator("#inspector .in-body")


def closed(page) -> bool:
    return not page.locator("#inspector .in-close").is_visible()


def test_each_token_shows_its_alternatives_and_why_it_was_drawn(page):
    write(page)
    tokens = page.locator("#output .tk")
    assert tokens.count() == 30
    tokens.nth(7).click()
    page.locator("#inspector .in-close").wait_for()
    rows = inspector(page).locator(".in-why tr").all_inner_texts()
    winner = [float(part) for part in re.findall(r"-?\d+\.\d+", rows[1])]
    assert abs(winner[0] + winner[1] - winner[2]) < 0.0021
    assert all(winner[2] >= float(re.findall(r"-?\d+\.\d+", row)[-1]) for row in rows[2:])
    shares = inspector(page).locator(".in-list .in-chosen .in-share").all_inner_texts()
    assert len(shares) == 2 and all(share.endswith("%") for share in shares)
    assert "others" in inspector(page).inner_text()
    box = inspector(page).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]


def test_the_inspector_can_be_worked_by_keyboard_alone(page):
    write(page, 12)
    page.locator("#output .tv-text").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    wait_until(lambda: "position 3" in inspector(page).inner_text(), 5, "the third token")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className").startswith("in-row")
    page.keyboard.press("Escape")
    wait_until(lambda: closed(page), 5, "the inspector to close")


def test_tokens_are_coloured_by_the_measure_chosen_and_the_legend_says_how(page):
    write(page, 12)
    page.locator("#output .tv-measure").select_option("s")
    colours = page.locator("#output .tk").evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
    assert len(set(colours)) > 2
    assert page.locator("#output .tv-legend").inner_text().split("\n")[0] == "0 bits"


def test_a_branch_keeps_the_text_before_it_and_the_tree_leads_back(page):
    write(page)
    first = text_of(page)
    tokens = page.locator("#output .tk").all_inner_texts()
    page.locator("#output .tk").nth(10).click()
    page.locator("#inspector .in-close").wait_for()
    page.locator("#inspector button.in-row:not(.in-chosen)").nth(0).click()
    wait_until(lambda: page.locator("#tree .bt-run").count() == 2 and finished(page), 30, "the branch's end")
    other = page.locator("#output .tk").all_inner_texts()
    assert other[:10] == tokens[:10] and other[10] != tokens[10] and len(other) == 41
    assert page.locator("#output .tk-forced").count() == 1
    page.locator("#tree .bt-run").nth(0).click()
    wait_until(lambda: text_of(page) == first, 5, "the first run again")


def test_continue_writes_on_where_the_text_ended(page):
    write(page, 12)
    before = text_of(page)
    page.click("#continue")
    wait_until(lambda: page.locator("#output .tk").count() == 24 and finished(page), 30, "twelve more")
    assert text_of(page).startswith(before)


def test_columns_with_equal_settings_on_shared_noise_write_the_same(page):
    tab(page, "Compare")
    choose_preset(page, "Same setting, four seeds")
    wait_until(lambda: page.locator("#output-3").is_visible(), 5, "four columns")
    page.get_by_label("Shared noise").check()
    set_number(page, "#max-new-tokens", 15)
    run(page, "#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(4)), 40, "four ends")
    wait_until(lambda: "All columns wrote the same 15 tokens" in page.locator("#fork").inner_text(), 5, "the note")


def test_the_lab_counts_draws_shows_settings_and_takes_a_draw_apart(page):
    tab(page, "Lab")
    wait_until(lambda: "Entropy" in page.locator("#lab-table").inner_text(), 20, "the distribution")
    before = page.locator("#lab-table").inner_text()
    set_number(page, "#temperature", 2)
    wait_until(lambda: page.locator("#lab-table").inner_text() != before, 10, "a warmer distribution")
    set_number(page, "#lab-count", 1_000_000)
    page.click("#lab-draw")
    wait_until(lambda: "of 1,000,000 draws" in page.locator("#lab-draws").inner_text(), 10, "the first draws")
    page.click("#lab-stop")
    page.locator("#lab-draw").wait_for()
    set_number(page, "#lab-count", 5000)
    page.click("#lab-draw")
    wait_until(lambda: "5,000 of 5,000" in page.locator("#lab-draws").inner_text(), 30, "the draws")
    assert len(re.findall(r"p = \d\.\d+", page.locator("#lab-draws").inner_text())) == 2
    seen = [[]]

    def new_rows() -> bool:
        rows = page.locator("#lab-steps tr").evaluate_all(read)
        fresh = rows not in seen
        seen.append(rows)
        return fresh

    read = "rows => rows.map(r => [r.className, ...[...r.querySelectorAll('.bb-figure')].map(c => +c.textContent)])"
    for _ in range(2):
        page.click("#lab-step")
        wait_until(new_rows, 10, "a draw")
        rows = seen[-1][1:]
        assert [ratio == max(row[3] for row in rows) for _, _, _, ratio, _ in rows] == [bool(row[0]) for row in rows]
    assert page.locator("#lab-draws .bb-warning").count() == 0
    set_number(page, "#temperature", 1)
    page.locator("#lab-draws .bb-warning").wait_for()  # of the settings before
    set_number(page, "#temperature", 2)
    page.locator("#lab-draws .bb-warning").wait_for(state="hidden")
    page.click("#lab-measure")
    page.click("#lab-stop-measuring")
    page.locator("#lab-measure").wait_for()
    page.click("#lab-draw")  # which a measurement under way would refuse
    wait_until(lambda: "5,000 of 5,000" in page.locator("#lab-draws").inner_text(), 30, "the draws")


def upload(page, file) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#replay")
    chooser.value.set_files(file)


def test_a_receipt_saved_from_the_page_replays_there_and_a_changed_one_says_where_it_differs(page, tmp_path):
    write(page, 15)
    with page.expect_download() as download:
        page.click("#receipt")
    saved, written = tmp_path / "receipt.json", text_of(page)
    download.value.save_as(saved)
    receipt = json.loads(saved.read_text())
    assert len(receipt["tokens"]) == 15
    upload(page, saved)
    verdict = page.locator("#verdict textarea")
    wait_until(lambda: verdict.is_visible() and "Identical: all 15" in verdict.input_value(), 30, "the verdict")
    wait_until(lambda: page.locator("#output .tv-title").inner_text() == "Replayed from a receipt.", 5, "its run")
    assert text_of(page) == written and page.locator("#output .tk").count() == 15
    page.locator("#output .tk").nth(4).click()
    wait_until(lambda: "position 5" in inspector(page).inner_text(), 5, "a token of the receipt's run")
    page.keyboard.press("Escape")
    receipt["tokens"][6]["id"] += 1
    saved.write_text(json.dumps(receipt))
    upload(page, saved)
    wait_until(lambda: "First differs at token 7" in verdict.input_value(), 30, "the difference")


def test_pointing_at_a_token_shows_it_and_leaving_shows_the_chosen_one_again(page):
    write(page, 12)
    page.locator("#output .tk").nth(7).click()
    wait_until(lambda: "position 8" in inspector(page).inner_text(), 5, "the token")
    page.locator("#output .tk").nth(3).hover()
    wait_until(lambda: "position 4" in inspector(page).inner_text(), 5, "the other token")
    page.locator("#output .tv-measure").hover()
    wait_until(lambda: "position 8" in inspector(page).inner_text(), 5, "the chosen token")
    page.locator(".in-close").click()
    wait_until(lambda: closed(page), 5, "the inspector to close")


def test_a_column_can_fill_the_row_and_all_receipts_can_be_saved(page, tmp_path):
    tab(page, "Compare")
    set_number(page, "#max-new-tokens", 10)
    run(page, "#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(3)), 40, "three ends")
    page.locator("#output-1 .tv-expand").click()
    wait_until(lambda: not page.locator("#output-0").is_visible(), 5, "the others to leave")
    page.locator("#output-1 .tv-expand").click()
    wait_until(lambda: page.locator("#output-0").is_visible(), 5, "the others to return")
    with page.expect_download() as download:
        page.click("#save-compare")
    download.value.save_as(tmp_path / "receipts.json")
    receipts = json.loads((tmp_path / "receipts.json").read_text())
    assert [len(receipt["tokens"]) for receipt in receipts] == [10, 10, 10]
    tab(page, "Generate")
    upload(page, tmp_path / "receipts.json")
    verdict = page.locator("#verdict textarea")
    wait_until(
        lambda: verdict.is_visible() and verdict.input_value().count("Identical: all 10") == 3, 30, "the verdict"
    )


def test_the_same_setting_on_fp8_and_on_bf16_weights_stands_side_by_side(page):
    tab(page, "Compare")
    choose_preset(page, "FP8 against BF16 weights")
    wait_until(lambda: not page.locator("#output-2").is_visible(), 5, "two columns")
    set_number(page, "#max-new-tokens", 40)
    run(page, "#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(2)), 60, "two ends")

    def explained() -> bool:  # figures are painted before texts
        texts = [text_of(page, f"output-{n}") for n in range(2)]
        note = page.locator("#fork").inner_text()
        assert all(texts), "a column is empty"
        return (
            "All columns wrote the same" in note if texts[0] == texts[1] else "BF16 weights" in note and "raw" in note
        )

    wait_until(explained, 5, "the fork, or that there is none")


def test_a_branch_of_a_column_grows_in_the_other_tab_under_the_columns_own_settings(page):
    tab(page, "Compare")
    set_number(page, "#max-new-tokens", 50)
    run(page, "#run-compare")
    wait_until(lambda: all(finished(page, f"stats-{n}") for n in range(3)), 40, "three ends")
    page.locator("#output-0 .tk").first.click()  # greedy
    page.locator("#inspector .in-close").wait_for()
    page.locator("#inspector button.in-row:not(.in-chosen)").nth(0).click()
    wait_until(lambda: page.locator("#tree .bt-run").count() == 2 and finished(page), 30, "the branch's end")
    assert page.locator("#output .tk-forced").count() == 1
    page.locator("#output .tk").last.click()
    wait_until(lambda: "Greedy takes the likeliest token" in inspector(page).inner_text(), 5, "the column's sampler")


def test_styles_are_not_written_anew_while_a_run_writes(page):
    """A style sheet that changes costs the style of every token on the page: 18 ms for 2,000, at each paint."""
    write(page, 5)
    page.evaluate("""() => {
      window.rewritten = 0;
      const count = (records) => { window.rewritten += records.filter((r) => r.target.closest?.("style")).length; };
      new MutationObserver(count).observe(document, { subtree: true, childList: true, characterData: true });
    }""")
    write(page, 40)
    assert page.evaluate("window.rewritten") == 0


def test_two_thousand_tokens_stay_fluid(page):
    set_number(page, "#max-new-tokens", 5)
    write(page, 5)
    frames = page.evaluate("""async () => {
      const view = document.querySelector("#output .tv-text");
      const copy = view.querySelector(".tk");
      for (let i = 0; i < 2000; i++) view.append(copy.cloneNode(true));
      let last = performance.now(), worst = [], top = 0;
      for (let i = 0; i < 60; i++) {
        view.scrollTop = top += 40;
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        worst.push(now - last);
        last = now;
      }
      return worst.slice(5).sort((a, b) => a - b);
    }""")
    median = frames[len(frames) // 2]
    print(
        f"\nscrolling 2,000 tokens: median frame {median:.1f} ms, 90th percentile {frames[int(len(frames) * 0.9)]:.1f}"
    )
    assert median <= 20  # 50 frames a second
