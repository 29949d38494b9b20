# SPDX-License-Identifier: Apache-2.0
"""Tests of the chat page in a real browser: chromium, driven by playwright, asks the real app."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import labs
import labs_api
import labs_engine
import labs_models
import labs_serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WAIT_S = 10


class Site:
    """An engine that says what a test tells it to, and where the app serves it.

    pieces: texts; an Event among them holds the rest back until it is set, an error ends them.
    cuts: the answer comes byte by byte, with carriage returns.
    """

    names = ("context_length", "decoder", "fingerprint")
    model = msgspec.defstruct("Model", names)(4096, None, None)
    url: str
    room = 1000  # characters of all messages that fit the context

    def __init__(self) -> None:
        self.pieces: list[str | threading.Event | labs.LabsError] = ["Hello", " there"]
        self.finish_reason: Any = "stop"
        self.refusal: labs.LabsError | None = None
        self.cuts = False
        self.asked: list[tuple[list[dict[str, str]], labs.Generation]] = []
        self.gone = threading.Event()  # set when an answer is let go

    def submit(self, inputs: Any, generation: Any, *, events: Any, **_: Any) -> Any:
        self.asked.append((json.loads(inputs.prompt), generation))
        if self.refusal:
            raise self.refusal
        if sum(len(message["content"]) for message in self.asked[-1][0]) > self.room:
            raise labs.PromptTooLong("the prompt is too long")
        threading.Thread(target=self._say, args=(events,), daemon=True).start()
        return labs_engine.Answer(0, events, lambda _: self.gone.set())

    def status(self) -> Any:
        return SimpleNamespace(max_rows=4, max_waiting=4)

    def _say(self, events: Any) -> None:
        for piece in self.pieces:
            if isinstance(piece, threading.Event):
                piece.wait(WAIT_S)
            else:
                failed = isinstance(piece, labs.LabsError)
                events.put((0, labs.Failed(piece) if failed else labs.Delta(piece)))
        timings = labs.Timings(0.0, 0.0, 0.0, 0.0)
        events.put((0, labs.Done(self.finish_reason, labs.Usage(3, 4), timings)))


def in_bytes(frames: Any) -> Iterator[bytes]:
    """Cut a stream as no server would: inside lines, line ends and characters."""
    with contextlib.closing(frames):
        for byte in itertools.chain.from_iterable(frames):
            yield b"\r" * (byte == ord("\n"))
            if byte > 127 or byte in b"d[\n":  # else the browser reads many bytes at once
                time.sleep(0.01)
            yield bytes([byte])


@pytest.fixture
def site(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Serve the app on a free port; the engine gets the messages as they came."""
    settings = getattr(request, "param", {})
    site, config = Site(), labs.Config(server=labs.Server(port=0), **settings)
    app = labs_api.create_app(config, labs_models.One(site, config.model_id))  # type: ignore[arg-type]

    def cut(environ: Any, start_response: Any) -> Any:
        frames = app(environ, start_response)
        return in_bytes(frames) if site.cuts and environ["REQUEST_METHOD"] == "POST" else frames

    def stop() -> None:
        for channel in list(server.active_channels.values()):
            channel.handle_close()
        server.close()

    def build_inputs(model: Any, *, messages: Any, **_: Any) -> labs.Inputs:
        return labs.Inputs((1, 2, 3), msgspec.json.encode(messages).decode())

    monkeypatch.setattr(labs, "build_inputs", build_inputs)
    mounted = DispatcherMiddleware(cut, {"/a/prefix": cut})
    server = labs_serve.make_server(mounted, config)
    site.url = f"http://127.0.0.1:{server.effective_port}"
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield site
    server.trigger.pull_trigger(stop)
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page as its reader sees it, and what it did behind the reader's back."""

    def __init__(self, page: Any, url: str) -> None:
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

    def ask(self, text: str) -> None:
        self.text.fill(text)
        self.text.press("Enter")

    def set(self, **values: str) -> None:
        self.page.get_by_text("Settings").click()
        for name, value in values.items():
            self.page.get_by_label(name).fill(value)


@pytest.fixture
def tab(browser: Any, site: Site) -> Iterator[Tab]:
    """Open the page; at the end, it has complained of nothing and asked no other server."""
    tab = Tab(browser.new_page(), site.url)
    yield tab
    tab.page.close()
    refused = "Failed to load resource"  # the browser's own line about a status that is an error
    assert [line for line in tab.complaints if not line.startswith(refused)] == []
    assert [url for url in tab.addresses if not url.startswith((site.url, "data:"))] == []


def test_who_is_faster_than_the_list_of_models_asks_the_default_one(tab: Tab) -> None:
    tab.page.route("**/v1/models", lambda route: route.abort())
    tab.page.reload()
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Hello there")


def test_the_page_works_under_a_prefix_with_or_without_its_slash(tab: Tab, site: Site) -> None:
    for end in ("", "/"):
        tab.page.goto(f"{site.url}/a/prefix{end}")
        expect(tab.models).to_have_text([labs.DEFAULT_MODEL])
        tab.ask("Hello?")
        expect(tab.answer).to_contain_text("Hello there")
    assert tab.addresses.count(f"{site.url}/a/prefix/v1/chat/completions") == 2


@pytest.mark.parametrize("cuts", [False, True])
def test_an_answer_grows_and_ends_with_its_figures(tab: Tab, site: Site, cuts: bool) -> None:
    rest = threading.Event()
    site.finish_reason = "length"
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


def test_only_the_settings_that_are_filled_in_are_sent(tab: Tab, site: Site) -> None:
    expect(tab.models).to_have_text([labs.DEFAULT_MODEL])
    tab.ask("One")
    expect(tab.notes.last).to_be_visible()
    assert site.asked[0] == ([{"role": "user", "content": "One"}], labs.Generation())
    tab.set(System="Be brief.", max_tokens="5", temperature="0.5", top_p="0.9", seed="7")
    tab.ask("Two")
    expect(tab.notes).to_have_count(2)
    messages, generation = site.asked[1]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert generation == labs.Generation(max_new_tokens=5, temperature=0.5, top_p=0.9, seed=7)


def test_shift_enter_makes_a_new_line_and_composing_sends_nothing(tab: Tab, site: Site) -> None:
    tab.text.fill("One")
    tab.text.press("Shift+Enter")
    tab.text.press_sequentially("Two")
    tab.text.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(tab.text).to_have_value("One\nTwo")
    tab.text.press("Enter")
    expect(tab.notes.last).to_be_visible()
    assert [messages[-1]["content"] for messages, _ in site.asked] == ["One\nTwo"]


def test_the_log_follows_the_answer_only_for_a_reader_at_its_end(tab: Tab, site: Site) -> None:
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


def test_stop_keeps_what_has_come_and_a_new_chat_forgets_it(tab: Tab, site: Site) -> None:
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
def test_an_error_is_shown_and_the_question_comes_back(tab: Tab, site: Site, early: bool) -> None:
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


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(
    tab: Tab, site: Site
) -> None:
    site.room, site.pieces = 20, ["answer"]
    for text in ("one", "two", "three"):
        tab.ask(text)
        expect(tab.answer).to_contain_text("answer")
        expect(tab.send).to_have_text("Send")
    expect(tab.notes.last).to_contain_text("The oldest 2 messages did not fit and were left out")
    contents = [message["content"] for message in site.asked[-1][0]]
    assert contents == ["two", "answer", "three"]


def test_a_setting_is_refused_by_name_and_a_lost_server_is_told(tab: Tab, site: Site) -> None:
    tab.set(max_tokens="-2")
    tab.ask("Hello?")
    expect(tab.notes.last).to_contain_text("max_tokens")
    tab.page.context.set_offline(True)
    tab.ask("Hello?")
    expect(tab.notes).to_have_count(2)
    expect(tab.text).to_have_value("Hello?")
    assert site.asked == []


@pytest.mark.parametrize(
    "site", [{"api_keys": (hashlib.sha256(b"secret").hexdigest(),)}], indirect=True
)
def test_a_key_is_asked_for_and_kept_for_the_session(tab: Tab) -> None:
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


def test_markup_from_the_model_or_the_user_stays_text(tab: Tab, site: Site) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    site.pieces = [markup]
    tab.ask(markup)
    expect(tab.notes.last).to_be_visible()
    expect(tab.answer).to_contain_text(markup)
    expect(tab.page.locator("article.user")).to_have_text(markup)
    assert tab.page.locator("#log img, #log script").count() == 0


def test_the_page_fits_a_phone_and_is_dark_where_wanted(tab: Tab, site: Site) -> None:
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
