# SPDX-License-Identifier: Apache-2.0
"""Tests of the chat page in a real browser: chromium, driven by playwright, asks the real app."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import threading
import time

import kit
import msgspec
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import labs
import labs_engine
import labs_serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
absent = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
pytestmark = [pytest.mark.browser, absent]
WAIT_S = 10


class Engine(kit.FakeEngine):
    """An engine that answers as a test says, and sees the messages as they were sent.

    pieces: texts; an Event among them holds the rest back until it is set, an error ends them.
    cuts: the answer arrives byte by byte, with carriage returns.
    """

    url, cuts = "", False
    room = 1000  # characters of all messages that fit the context

    def submit(self, inputs, generation, *, events, **_):
        messages = json.loads(inputs.prompt)
        self.asked.append((messages, generation))
        if self.refusal:
            raise self.refusal
        if sum(len(message["content"]) for message in messages) > self.room:
            raise labs.PromptTooLong("the prompt is too long")
        threading.Thread(target=self._say, args=(events,), daemon=True).start()
        return labs_engine.Answer(0, events, lambda _: self.gone.set())

    def _say(self, events):
        for piece in self.pieces:
            if isinstance(piece, threading.Event):
                piece.wait(WAIT_S)
            else:
                failed = isinstance(piece, labs.LabsError)
                events.put((0, labs.Failed(piece) if failed else labs.Delta(piece)))
        events.put((0, labs.Done(self.reason, labs.Usage(3, 4), labs.Timings(0.0, 0.0, 0.0, 0.0))))


def in_bytes(frames):
    """Cut a stream as no server would: inside lines, line ends and characters."""
    with contextlib.closing(frames):
        for byte in itertools.chain.from_iterable(frames):
            yield b"\r" * (byte == ord("\n"))
            if byte > 127 or byte in b"d[\n":  # else the browser reads many bytes at once
                time.sleep(0.01)
            yield bytes([byte])


@pytest.fixture
def site(request, tiny, monkeypatch):
    """Serve the app on a free port, at / and at /a/prefix; yield its engine."""
    engine, make_server = Engine(tiny), labs_serve.make_server
    engine.gone = threading.Event()  # set when an answer is cancelled

    def mounted(app, config):
        def cut(environ, start_response):
            frames = app(environ, start_response)
            cuts = engine.cuts and environ["REQUEST_METHOD"] == "POST"
            return in_bytes(frames) if cuts else frames

        return make_server(DispatcherMiddleware(cut, {"/a/prefix": cut}), config)

    def build_inputs(model, *, messages, **_):
        return labs.Inputs((1, 2, 3), msgspec.json.encode(messages).decode())

    monkeypatch.setattr(labs_serve, "make_server", mounted)
    monkeypatch.setattr(labs, "build_inputs", build_inputs)
    live = kit.Live(engine, kit.configured(*getattr(request, "param", ()), port=0))
    engine.url = live.url
    yield engine
    live.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page as its reader sees it, with its console errors and requests."""

    def __init__(self, page, url):
        self.page, self.complaints, self.addresses = page, [], []
        page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.goto(url)
        self.text = page.get_by_label("Message", exact=True)
        self.stop = page.get_by_role("button", name="Stop")
        self.send = page.get_by_role("button", name="Send")
        self.models = page.get_by_label("Model").locator("option")
        self.log = page.get_by_role("log")
        self.answer = page.locator("article.model").last
        self.notes = page.locator("article.model small")

    def ask(self, text):
        self.text.fill(text)
        self.text.press("Enter")

    def set(self, **values: str):
        self.page.get_by_text("Settings").click()
        for name, value in values.items():
            self.page.get_by_label(name).fill(value)


@pytest.fixture
def tab(browser, site):
    """Open the page; at the end, check that it logged no error and called no other server."""
    tab = Tab(browser.new_page(), site.url)
    yield tab
    tab.page.close()
    refused = "Failed to load resource"  # the browser's own line about a status that is an error
    assert [line for line in tab.complaints if not line.startswith(refused)] == []
    assert [url for url in tab.addresses if not url.startswith((site.url, "data:"))] == []


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


@pytest.mark.parametrize("cuts", [False, True])
def test_an_answer_grows_and_ends_with_its_figures(tab, site, cuts):
    rest = threading.Event()
    site.reason = "length"
    site.cuts, site.pieces = cuts, ["Bonjour", " à tous 🦊", rest, ", and", " farewell"]
    tab.ask("Hello?")
    expect(tab.answer).to_have_text("Bonjour à tous 🦊")
    expect(tab.stop).to_be_visible()
    rest.set()
    expect(tab.answer).to_contain_text("Bonjour à tous 🦊, and farewell")
    expect(tab.notes.last).to_have_text(
        re.compile(r"^The answer reached its token limit · 4 tokens, [\d.]+ tokens/s$")
    )
    expect(tab.send).to_be_visible()
    expect(tab.text).to_be_focused()
    expect(tab.text).to_have_value("")


def test_only_the_settings_that_are_filled_in_are_sent(tab, site):
    expect(tab.models).to_have_text(["tiny"])
    tab.ask("One")
    expect(tab.notes.last).to_be_visible()
    assert site.asked[0] == ([{"role": "user", "content": "One"}], labs.Generation())
    tab.set(System="Be brief.", max_tokens="5", temperature="0.5", top_p="0.9", seed="7")
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
    expect(tab.answer).to_have_text("Once upon")
    tab.stop.click()
    assert site.gone.wait(WAIT_S)
    expect(tab.notes).to_have_text("Stopped")
    tab.ask("Go on")
    expect(tab.answer).to_have_text("Once upon")
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
    expect(tab.notes.last).to_have_text("the prompt is too long")
    expect(tab.text).to_have_value("Hello?")
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


def test_a_refused_setting_is_named_and_a_lost_server_is_reported(tab, site):
    tab.set(max_tokens="-2")
    tab.ask("Hello?")
    expect(tab.notes.last).to_contain_text("max_tokens")
    tab.page.context.set_offline(True)
    tab.ask("Hello?")
    expect(tab.notes).to_have_count(2)
    expect(tab.text).to_have_value("Hello?")
    assert site.asked == []


@pytest.mark.parametrize("site", [("secret",)], indirect=True)
def test_the_page_asks_for_a_key_and_keeps_it_for_the_session(tab):
    status = tab.page.get_by_role("status")
    expect(status).to_contain_text("send a valid API key")
    tab.page.get_by_label("API key").fill("secret")
    tab.text.focus()
    expect(tab.models).to_have_count(1)
    expect(status).to_be_empty()
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Hello there")
    tab.page.reload()
    expect(tab.models).to_have_count(1)
    assert tab.page.evaluate("() => localStorage.length + document.cookie.length") == 0


def test_markup_from_the_model_or_the_user_stays_text(tab, site):
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    site.pieces = [markup]
    tab.ask(markup)
    expect(tab.notes.last).to_be_visible()
    expect(tab.answer).to_contain_text(markup)
    expect(tab.page.locator("article.user")).to_have_text(markup)
    assert tab.page.locator("#log img, #log script").count() == 0


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
