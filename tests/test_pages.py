# SPDX-License-Identifier: Apache-2.0
"""Tests of the chat page in a real browser: questions, answers, two models, keys, access."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import kit_pages
import pytest

import labs
import labs_pages

browser, site, tab = kit_pages.browser, kit_pages.site, kit_pages.tab  # fixtures
pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api").expect
axe_playwright_python = pytest.importorskip("axe_playwright_python")
WAIT_S = 10


def test_a_question_before_the_list_of_models_arrives_goes_to_the_default_model(tab):
    tab.page.route("**/v1/models", lambda route: route.abort())
    tab.page.reload()
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Hello there")


def test_the_page_works_under_a_prefix_with_or_without_its_slash(tab, site):
    for end in ("", "/"):
        tab.page.goto(f"{site.url}/a/prefix{end}")
        expect(tab.models).to_have_text(["tiny"])
        tab.ask("Hello?")
        expect(tab.answer).to_contain_text("Hello there")
    assert tab.addresses.count(f"{site.url}/a/prefix/v1/chat/completions") == 2


def test_a_question_asked_before_the_list_of_models_arrives_gets_all_its_figures(tab, site):
    tab.page.goto("about:blank")
    late = []
    tab.page.route("**/v1/models", lambda route: late.append(route))
    tab.page.goto(site.url)
    tab.page.wait_for_function("() => known.size")
    rest = threading.Event()
    site.pieces = ["Bonjour", rest, " à tous"]
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Bonjour")
    late[0].continue_()
    expect(tab.models).to_have_text(["tiny"])
    rest.set()
    expect(tab.notes.last).to_have_text(re.compile("tokens · context 7 of 4096$"))
    expect(tab.answer.get_by_role("heading")).to_have_text("tiny")


@pytest.mark.parametrize("cuts", [False, True])
def test_an_answer_grows_and_ends_with_its_figures(tab, site, cuts):
    rest = threading.Event()
    site.reason = "length"
    site.cuts, site.pieces = cuts, ["Bonjour", " à tous 🦊", rest, ", and", " farewell"]
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Bonjour à tous 🦊")
    expect(tab.stop).to_be_visible()
    rest.set()
    expect(tab.answer).to_contain_text("Bonjour à tous 🦊, and farewell")
    expect(tab.notes.last).to_have_text(
        re.compile(
            r"^The answer reached its token limit · first token [\d.]+ s( · [\d.]+ tokens/s)? · "
            r"4 tokens · context 7 of 4096$"
        )
    )
    expect(tab.send).to_be_visible()
    expect(tab.text).to_be_focused()
    expect(tab.text).to_have_value("")


def test_only_the_settings_that_are_filled_in_are_sent(tab, site):
    expect(tab.models).to_have_text(["tiny"])
    tab.ask("One")
    expect(tab.notes.last).to_be_visible()
    assert site.asked[0] == ([{"role": "user", "content": "One"}], labs.Generation())
    tab.set(System="Be brief.", max_new_tokens="5", temperature="0.5", top_p="0.9", seed="7")
    tab.ask("Two")
    expect(tab.notes).to_have_count(2)
    messages, generation = site.asked[1]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert generation == labs.Generation(max_new_tokens=5, temperature=0.5, top_p=0.9, seed=7)


def test_shift_enter_makes_a_new_line_and_composing_sends_nothing(tab, site):
    tab.text.fill("One")
    tab.text.press("Shift+Enter")
    tab.text.press_sequentially("Two")
    tab.text.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(tab.text).to_have_value("One\nTwo")
    tab.text.press("Enter")
    expect(tab.notes.last).to_be_visible()
    assert [messages[-1]["content"] for messages, _ in site.asked] == ["One\nTwo"]


def test_the_log_follows_the_answer_only_for_a_reader_at_its_end(tab, site):
    more, rest = threading.Event(), threading.Event()
    site.pieces = ["line\n" * 200, more, "line\n" * 200, rest, "line\n" * 200, "end"]
    tab.ask("Hello?")
    box = "document.querySelector('{}').getBoundingClientRect()"
    top, end = box.format(".user") + ".top", box.format(".model") + ".bottom"
    tab.page.wait_for_function(f"() => {top} < -3000 && {end} < innerHeight")
    more.set()
    tab.page.wait_for_function(f"() => {top} < -8000 && {end} < innerHeight")
    tab.log.hover()
    tab.page.mouse.wheel(0, -100_000)
    tab.page.wait_for_function(f"() => {top} > 0")
    rest.set()
    expect(tab.notes).to_be_attached()
    assert tab.page.evaluate(f"() => {top} > 0")


def test_stop_keeps_the_text_so_far_and_a_new_chat_forgets_it(tab, site):
    site.pieces = ["Once upon", threading.Event(), " a time"]
    tab.ask("A story")
    expect(tab.answer).to_contain_text("Once upon")
    tab.stop.click()
    assert site.gone.wait(WAIT_S)
    expect(tab.notes).to_contain_text("Stopped")
    tab.ask("Go on")
    expect(tab.notes).to_have_count(2)
    expect(tab.answer).to_contain_text("Once upon")
    turns = [("user", "A story"), ("assistant", "Once upon"), ("user", "Go on")]
    assert site.asked[1][0] == [{"role": role, "content": text} for role, text in turns]
    tab.page.get_by_role("button", name="New chat").click()
    expect(tab.log).to_be_empty()
    expect(tab.send).to_be_visible()
    site.pieces = ["Hi"]
    tab.ask("Again")
    expect(tab.answer).to_contain_text("Hi")
    assert site.asked[2][0] == [{"role": "user", "content": "Again"}]


@pytest.mark.parametrize("early", [True, False])
def test_an_error_is_shown_and_the_question_comes_back(tab, site, early):
    error = labs.PromptTooLong("the prompt is too long")
    site.refusal, site.pieces = (error, []) if early else (None, [error])
    tab.ask("Hello?")
    expect(tab.notice).to_contain_text("the prompt is too long")
    expect(tab.text).to_have_value("Hello?")
    expect(tab.log).to_be_empty()
    site.refusal, site.pieces = None, ["Hi", labs.GenerationError("out of memory")]
    tab.text.press("Enter")
    expect(tab.notes.last).to_contain_text("Internal server error")
    expect(tab.answer).to_contain_text("Hi")
    expect(tab.text).to_have_value("")
    assert site.asked[1][0] == [{"role": "user", "content": "Hello?"}]


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(tab, site):
    site.room, site.pieces = 20, ["answer"]
    for text in ("one", "two", "three"):
        tab.ask(text)
        expect(tab.answer).to_contain_text("answer")
        expect(tab.send).to_have_text("Send")
    expect(tab.notes.last).to_contain_text("The oldest 2 messages did not fit and were left out")
    contents = [message["content"] for message in site.asked[-1][0]]
    assert contents == ["two", "answer", "three"]


def test_a_lost_server_is_reported_and_asked_again_when_it_is_back(tab, site):
    tab.page.context.set_offline(True)
    tab.ask("Hello?")
    expect(tab.notice).to_contain_text("The server does not answer")
    expect(tab.text).to_have_value("Hello?")
    tab.page.context.set_offline(False)
    tab.text.press("Enter")
    expect(tab.answer).to_contain_text("Hello there")
    assert len(site.asked) == 1


def test_the_list_of_models_can_be_asked_for_again(tab):
    tab.page.route("**/v1/models", lambda route: route.abort())
    tab.page.reload()
    expect(tab.notice).to_contain_text("The server does not answer")
    tab.page.unroute("**/v1/models")
    tab.press("Try again")
    expect(tab.models).to_have_text(["tiny"])
    expect(tab.notice).to_have_text("")


@pytest.mark.parametrize("site", [("secret",)], indirect=True)
def test_the_page_asks_for_a_key_and_keeps_it_for_the_session_only(tab):
    expect(tab.notice).to_contain_text("send a valid API key")
    expect(tab.page.get_by_label("API key")).to_be_focused()
    tab.page.get_by_label("API key").fill("secret")
    tab.page.keyboard.press("Enter")
    expect(tab.models).to_have_count(1)
    expect(tab.notice).to_have_text("")
    tab.page.keyboard.press("Escape")
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Hello there")
    tab.page.reload()
    expect(tab.models).to_have_count(1)
    kept = "() => JSON.stringify([localStorage, document.cookie])"
    assert "Hello" in tab.page.evaluate(kept)
    assert "secret" not in tab.page.evaluate(kept)


def test_the_page_fits_a_phone_and_is_dark_where_wanted(tab, site):
    site.pieces = ["word" * 200]
    tab.page.set_viewport_size({"width": 320, "height": 568})
    tab.set()
    tab.ask("Hello?" * 50)
    expect(tab.notes).to_be_attached()
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= 320
    expect(tab.send).to_be_in_viewport()
    ground = "() => getComputedStyle(document.documentElement).backgroundColor"
    for scheme, shades in (("light", range(200, 256)), ("dark", range(60))):
        tab.page.emulate_media(color_scheme=scheme)
        assert {int(part) for part in re.findall(r"\d+", tab.page.evaluate(ground))} <= {*shades}


def test_the_page_is_one_text_of_bounded_size():
    assert len(labs_pages.PAGE.encode()) <= 40_000
    assert max(map(len, labs_pages.PAGE.splitlines())) <= 100
    assert re.findall(r"(?:src|href|url\()\W*(?:https?:|//)", labs_pages.PAGE) == []


def test_a_turn_is_edited_and_what_followed_comes_back_with_undo(tab, site):
    for text in ("one", "two"):
        tab.ask(text)
        tab.done()
    tab.page.get_by_role("button", name="Edit").first.click()
    expect(tab.text).to_have_value("one")
    tab.press("Cancel")
    expect(tab.text).to_have_value("")
    tab.page.get_by_role("button", name="Edit").first.click()
    tab.ask("three")
    tab.done()
    contents = [message["content"] for message in site.asked[-1][0]]
    assert contents == ["three"]
    expect(tab.page.locator("article.user")).to_have_count(1)
    tab.press("Undo")
    expect(tab.page.locator("article.user .raw")).to_have_text(["one", "two"])
    tab.page.get_by_role("button", name="Edit").first.click()
    expect(tab.notice).to_contain_text("Sending replaces this message")
    tab.press("New chat")
    expect(tab.notice).to_have_text("")
    tab.page.locator("#list li > button").click()
    assert [turn["content"] for turn in tab.stored()[0]["turns"]][::2] == ["one", "two"]


def test_an_answer_is_generated_again_with_the_settings_of_now(tab, site):
    tab.ask("one")
    tab.done()
    tab.set(seed="7")
    site.pieces = ["another"]
    tab.press("Retry")
    expect(tab.answer).to_contain_text("another")
    tab.done()
    assert site.asked[1] == (site.asked[0][0], labs.Generation(seed=7))
    expect(tab.page.locator("article")).to_have_count(2)
    site.refusal = labs.InputError("no")
    tab.press("Retry")
    expect(tab.notice).to_contain_text("no")
    expect(tab.answer).to_contain_text("another")  # the answer that it had


def test_a_cut_answer_is_continued(tab, site):
    sent = tab.answers({"delta": {"content": "Once"}, "finish_reason": "length"})
    tab.ask("A story")
    expect(tab.notes).to_contain_text("token limit")
    tab.answers({"content": " upon"})
    sent = tab.answers({"content": " upon"})
    tab.press("Continue")
    expect(tab.answer.locator(".text")).to_have_text("Once upon")
    assert sent[0]["continue_final_message"] is True
    assert sent[0]["messages"][-1] == {"role": "assistant", "content": "Once"}
    expect(tab.page.get_by_role("button", name="Continue")).to_have_count(0)
    expect(tab.text).to_be_focused()  # the button is gone


def test_a_server_without_a_model_for_texts_says_so(tab):
    models = [{"id": "c", "kind": "embedding"}]
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    tab.page.reload()
    expect(tab.notice).to_contain_text("This server has no model that writes text.")
    expect(tab.models).to_have_count(0)


def test_answers_and_code_are_copied_and_without_https_selected(tab, site):
    site.pieces = ["**a**\n\n```py\nb\n```"]
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.ask("?")
    tab.done()
    clipboard = "() => navigator.clipboard.readText()"
    tab.press("Copy", exact=True)
    expect(tab.page.get_by_role("button", name="Copied")).to_be_visible()
    assert tab.page.evaluate(clipboard) == "**a**\n\n```py\nb\n```"
    tab.press("Copy code")
    tab.page.wait_for_function("async () => await navigator.clipboard.readText() === 'b'")
    tab.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    tab.press("Copied", exact=True)
    expect(tab.page.get_by_role("button", name="Press Ctrl+C")).to_be_visible()
    assert tab.page.evaluate("() => getSelection().toString().includes('b')")


def test_the_raw_text_is_one_click_away(tab, site):
    site.pieces = ["**a** <b>"]
    tab.ask("?")
    tab.done()
    expect(tab.answer.locator(".text")).to_have_text("a <b>")
    tab.press("Raw text")
    expect(tab.answer.locator(".raw:visible")).to_have_text("**a** <b>")
    expect(tab.page.get_by_role("button", name="Raw text")).to_be_focused()
    tab.press("Raw text")
    expect(tab.answer.locator(".text")).to_have_text("a <b>")


def test_escape_stops_an_answer(tab, site):
    site.pieces = ["Once upon", threading.Event()]
    tab.ask("A story")
    expect(tab.answer).to_contain_text("Once upon")
    tab.page.keyboard.press("Escape")
    expect(tab.notes).to_contain_text("Stopped")


def test_reasoning_is_folded_away_and_counted_in_seconds(tab):
    tab.answers({"reasoning_content": "Well, "}, {"reasoning": "hm."}, {"content": "Yes."})
    tab.ask("?")
    fold = tab.answer.locator("details").first
    expect(fold.locator("summary")).to_have_text(re.compile(r"Thought for [\d.]+ s"))
    expect(fold.locator("div")).to_have_text("Well, hm.")
    expect(fold.locator("div")).not_to_be_visible()
    expect(tab.answer.locator(".text")).to_have_text("Yes.")


def test_a_call_of_a_tool_is_a_card_and_its_result_goes_on(tab):
    call = {"index": 0, "id": "a", "function": {"name": "weather", "arguments": ""}}
    pieces = [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
              for text in ('{"city"', ':"Paris"}')]  # fmt: skip
    sent = tab.answers({"tool_calls": [call]}, *pieces)
    tool = '[{"type": "function", "function": {"name": "weather"}}]'
    tab.set(tools=tool)
    tab.ask("Weather?")
    card = tab.page.get_by_role("region", name="Call of weather")
    expect(card.locator("pre")).to_have_text('{\n  "city": "Paris"\n}')
    assert sent[0]["tools"][0]["function"]["name"] == "weather"
    card.get_by_role("textbox").fill("sunny")
    sent = tab.answers({"content": "It is sunny."})
    tab.press("Go on with the results")
    expect(tab.answer).to_contain_text("It is sunny.")
    assert sent[0]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city":"Paris"}'},
                }
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "a"},
    ]


def test_two_models_answer_side_by_side_and_one_goes_on(tab):
    models = [{"id": name, "kind": "text", "context_length": 60} for name in ("a", "b")]
    models.append({"id": "c", "kind": "embedding", "context_length": 60})
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    tab.page.reload()
    expect(tab.models).to_have_text(["a", "b"])
    sent = tab.answers({"content": "yes"})
    tab.page.locator("#gear").click()
    tab.page.get_by_label("Second model").select_option("b")
    tab.page.keyboard.press("Escape")
    tab.ask("?")
    tab.done()
    expect(tab.page.locator(".pair h2")).to_have_text(["a", "b"])
    assert sorted(body["model"] for body in sent) == ["a", "b"]
    places = tab.page.locator(".pair > article")
    boxes = [each.bounding_box() for each in places.all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    expect(tab.notice).to_contain_text("nearly full")  # 50 of 60 tokens
    tab.page.get_by_role("button", name="Go on with this").nth(1).click()
    expect(tab.page.locator(".pair h2")).to_have_text(["b", "a"])
    assert tab.stored()[0]["turns"][1]["page"]["model"] == "b"
    tab.page.set_viewport_size({"width": 375, "height": 800})
    boxes = [each.bounding_box() for each in places.all()]
    assert boxes[0]["x"] == boxes[1]["x"]


def test_a_model_that_was_not_loaded_yet_has_no_full_context(tab):
    models = [{"id": "a", "kind": "text", "context_length": None}]
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    tab.page.reload()
    expect(tab.models).to_have_text(["a"])
    tab.answers({"content": "yes"})
    tab.ask("?")
    tab.done()
    expect(tab.page.locator("#said")).to_have_text("yes")
    expect(tab.notice).to_have_text("")


def test_probabilities_and_rivals_are_told_by_pointer_and_keys(tab, site):
    top = ((97, -0.1), (98, -2.5))
    chosen = [labs.TokenLogprob(97, -0.1, top), labs.TokenLogprob(195, -3.0, ((195, -3.0),))]
    last = labs.TokenLogprob(164, -0.5, ((164, -0.5),))
    site.pieces = [labs.Delta("a", (chosen[0],)), labs.Delta("ä", (chosen[1], last))]
    tab.page.locator("#gear").click()
    tab.page.get_by_label("Probabilities").check()
    tab.page.keyboard.press("Escape")
    tab.ask("?")
    tab.done()
    assert site.asked[0][1].logprobs == 5
    spans = tab.page.locator(".tokens span")
    expect(spans).to_have_text(["a", "<c3>", "<a4>"])
    assert [each.get_attribute("class") for each in spans.all()] == ["p0", "p3", "p1"]
    spans.first.hover()
    tip = tab.page.locator("#tip")
    expect(tip).to_contain_text("a90.5 %b8.2 %")
    assert abs(float(tip.locator("meter").first.get_attribute("value") or 0) - 0.905) < 0.01
    tab.page.get_by_role("group", name="Tokens").focus()
    tab.page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("<c3>5.0 %")
    tab.page.keyboard.press("Escape")
    expect(tip).not_to_be_visible()
    tab.press("Probabilities")
    expect(tab.answer.locator(".text")).to_have_text("aä")
    joined = "() => chat.turns[1].tokens.flatMap(({ bytes }) => bytes)"
    assert bytes(tab.page.evaluate(joined)).decode() == "aä"


def test_a_citation_opens_its_passage(tab):
    prompt = "x\n[1]\n> a.md > H\n> no\n\n[2]\n> b.md > I\n> The text\n> of b.\n\nquestion"
    tab.page.route("**/explain", lambda route: route.fulfill(json={"prompt": prompt}))
    sources = [{"n": 1, "path": "a.md", "heading": "H"}, {"n": 2, "path": "b.md", "heading": "I"}]
    tab.answers({"content": "So it is [2], not [3]."}, documents=sources)
    tab.ask("?")
    tab.done()
    expect(tab.answer.locator("summary:visible")).to_have_text(["[1] a.md > H", "[2] b.md > I"])
    tab.press("[2]", exact=True)
    expect(tab.answer.locator(".source").nth(1).locator("div")).to_have_text("The text\nof b.")
    expect(tab.page.get_by_role("button", name="[3]")).to_have_count(0)


def test_what_the_reader_opened_stays_open_when_the_answer_ends(tab, site):
    tab.page.route("**/explain", lambda route: route.fulfill(json={"prompt": "[1]\n> a\n> b"}))
    tab.answers({"reasoning_content": "hm"}, {"content": "So [1]."},
                documents=[{"n": 1, "path": "a.md", "heading": "H"}])  # fmt: skip
    tab.page.evaluate("""() => { const first = new Promise((done) => { window.end = done; });
        const told = stream; stream = async (...all) => {
            const wrong = await told(...all); live.add(all[1]); await first;
            live.delete(all[1]); views.get(all[1])(); return wrong; }; }""")
    tab.ask("?")
    expect(tab.answer.locator("summary:visible")).to_have_count(2)
    for each in tab.answer.locator("summary:visible").all():
        each.click()
    expect(tab.answer.locator("details[open]")).to_have_count(2)
    tab.page.evaluate("() => window.end()")
    tab.done()
    expect(tab.page.get_by_role("button", name="Retry")).to_be_visible()
    expect(tab.answer.locator("details[open]")).to_have_count(2)


def test_an_earlier_card_cannot_go_on_while_an_answer_comes(tab, site):
    tab.answers({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f"}}]})
    tab.ask("one")
    tab.done()
    expect(tab.page.get_by_placeholder("Result of f")).to_be_visible()
    tab.page.unroute("**/v1/chat/completions")
    site.pieces = ["Once", threading.Event(), " upon"]
    tab.ask("two")
    expect(tab.answer).to_contain_text("Once")
    expect(tab.page.get_by_role("button", name="Go on with the results")).to_have_count(0)
    tab.stop.click()


def test_a_question_is_seen_by_who_read_above_and_waits_visibly(tab, site):
    site.pieces = ["line\n" * 200]
    tab.ask("one")
    tab.done()
    tab.page.evaluate("() => { log.parentNode.scrollTop = -1e6; }")
    site.pieces = [threading.Event()]
    tab.ask("two")
    expect(tab.page.locator("article.user").last).to_be_in_viewport()
    expect(tab.answer).to_have_attribute("aria-busy", "true")
    tab.stop.click()
    expect(tab.answer).not_to_have_attribute("aria-busy", "true")


def test_an_answer_is_read_out_once_and_not_token_by_token(tab, site):
    rest = threading.Event()
    site.pieces = ["Hello", rest, " there" * 300]
    tab.ask("?")
    expect(tab.answer).to_contain_text("Hello")
    expect(tab.log).to_have_attribute("aria-live", "off")
    expect(tab.page.locator("#said")).to_have_text("")
    rest.set()
    expect(tab.page.locator("#said")).to_contain_text("Hello there there")
    tab.press("New chat")  # which what is read out does not cover


def test_the_keyboard_alone_reaches_everything(tab):
    expect(tab.models).to_have_count(1)
    tab.ask("Hello?")
    tab.done()
    tab.page.evaluate("() => document.activeElement.blur()")
    seen = []
    for _ in range(30):
        tab.page.keyboard.press("Tab")
        script = "() => [document.activeElement.textContent.trim(), document.activeElement.id, "
        script += "getComputedStyle(document.activeElement).outlineStyle]"
        seen.append(tuple(tab.page.evaluate(script)))
    names = [name or identity for name, identity, _ in seen]
    for name in ("Skip to the message", "New chat", "Hello?", "Rename", "Delete", "Export",
                 "Export all", "Import", "Settings", "Edit", "Copy", "Raw text", "Retry",
                 "text", "Send"):  # fmt: skip
        assert name in names, (name, names)
    assert {outline for *_, outline in seen if outline} <= {"solid", "auto", "none"}
    first = names.index("Skip to the message")
    assert seen[first][2] == "solid"


EVERYTHING = (
    """# Title

Text with **bold**, `code` and [a link](https://a.example). See [1].

1. one
   - two

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
print("a long line" + "!" * 100)  # """
    + "x" * 200
    + """
```
"""
)


@pytest.fixture(scope="module")
def axe():
    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_axe_finds_no_violation(tab, site, axe, width, scheme):
    def check(state):
        found = tab.page.evaluate("async () => (await axe.run()).violations")
        told = [(each["id"], [node["html"][:90] for node in each["nodes"]]) for each in found]
        assert told == [], state

    tab.page.emulate_media(color_scheme=scheme)
    tab.page.set_viewport_size({"width": width, "height": 800})
    expect(tab.models).to_have_count(1)
    tab.page.evaluate(axe)
    check("empty")
    top = [{"token": "b", "logprob": -2.0, "bytes": [98]}]
    tokens = [
        {"token": "a", "logprob": -n / 2, "bytes": [97], "top_logprobs": top} for n in range(6)
    ]
    call = {"index": 0, "id": "a", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    source = {"n": 1, "path": "a.md", "heading": "H"}
    tab.answers(
        {"reasoning_content": "Well."}, {"content": EVERYTHING},
        {"delta": {"tool_calls": [call]}, "finish_reason": "length"}, documents=[source],
    )  # fmt: skip
    tab.ask("Everything?")
    tab.done()
    for each in tab.answer.locator("details").all():
        each.locator("summary").click()
    tab.press("Edit")
    check("answer")
    tab.answers({"delta": {"content": "aaaaaa"}, "logprobs": {"content": tokens}})
    tab.press("Cancel")
    tab.press("Go on with the results")
    tab.done()
    tab.page.get_by_role("group", name="Tokens").focus()
    check("tokens")
    tab.page.keyboard.press("Escape")
    tab.set(top_p="7")
    tab.page.locator("#gear").click()
    tab.page.get_by_text("More settings").click()
    check("settings")
    tab.page.keyboard.press("Escape")
    if width == 375:
        tab.press("Conversations")
        expect(tab.page.get_by_role("button", name="New chat")).to_be_visible()
    tab.press("Rename")
    check("conversations")
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= width
