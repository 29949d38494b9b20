"""Tests of the chat page in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WAIT_S = 10
try:
    from labs_api import PAGE
except ImportError:
    if "LABS_PAGE" not in os.environ:
        pytest.skip("neither labs_api nor the file LABS_PAGE is here", allow_module_level=True)
    PAGE = Path(os.environ["LABS_PAGE"]).read_text(encoding="utf-8")


class Site:
    """A server of the page whose model says what a test tells it to, as soon as it is told.

    pieces: texts of the answer. A threading.Event among them holds the rest back until it is set.
    """

    url: str

    def __init__(self) -> None:
        self.pieces: list[str | threading.Event] = ["Hello", " there"]
        self.finish_reason = "stop"
        self.error: str | None = None  # what goes wrong after the pieces
        self.refusal: tuple[int, str] | None = None  # status and message instead of an answer
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.gone = threading.Event()  # set when a client hangs up

    def frames(self) -> Iterator[bytes]:
        """Yield the answer byte by byte: the page sees it cut inside lines and characters."""
        yield b": keep-alive\n\n"
        for piece in self.pieces:
            if isinstance(piece, threading.Event):
                while not piece.wait(0.02):
                    yield b": keep-alive\n\n"
            else:
                yield from _bytes(choices=[{"index": 0, "delta": {"content": piece}}])
        if self.error:
            yield from _bytes(error={"message": self.error, "type": "server_error"})
            return
        end = {"index": 0, "delta": {}, "finish_reason": self.finish_reason}
        yield from _bytes(choices=[end])
        yield from _bytes(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4})
        yield b"data: [DONE]\n\n"


def _bytes(**chunk: Any) -> Iterator[bytes]:
    text = f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n".encode()
    for at in range(len(text)):
        yield text[at : at + 1]
        if text[at] > 127 or text[at] in b"d[\r":  # else the browser reads many bytes at once
            time.sleep(0.01)


def _policy(page: str) -> str:
    """Return the content security policy that allows the page's own style and script alone."""

    def hashed(tag: str) -> str:
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content
        digest = hashlib.sha256(content[1].encode()).digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    return "; ".join(
        [
            "default-src 'none'",
            hashed("style"),
            hashed("script"),
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


class _StandIn(BaseHTTPRequestHandler):
    """Answers as the server of labs does, as far as the page can tell."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        if self.path == "/":
            policy = {"Content-Security-Policy": _policy(PAGE)}
            self._answer(200, PAGE.encode(), "text/html; charset=utf-8", **policy)
        elif self.path == "/v1/models" and self._allowed():
            body = {"object": "list", "data": [{"id": "tiny"}, {"id": "large"}]}
            self._answer(200, json.dumps(body).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.site.requests.append(body)
        if not self._allowed():
            return
        if self.site.refusal:
            self._refuse(*self.site.refusal)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for frame in self.site.frames():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(frame), frame))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.site.gone.set()
            self.close_connection = True

    def _allowed(self) -> bool:
        allowed = self.headers["Authorization"] in {None, f"Bearer {self.site.key}"}
        if self.site.key and not (allowed and self.headers["Authorization"]):
            self._refuse(401, "this server wants an API key")
            return False
        return True

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, json.dumps({"error": {"message": message}}).encode())

    def _answer(
        self, status: int, body: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


# ---------------------------------------------------------------- fixtures


@pytest.fixture
def site() -> Iterator[Site]:
    """Serve the page on a free port, with a model that the test controls."""
    site = Site()
    handler = type("Handler", (_StandIn,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    yield site
    for piece in site.pieces:
        if isinstance(piece, threading.Event):
            piece.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless=new", "--no-sandbox"]
        )
        yield browser
        browser.close()


class Tab:
    """The page as its reader sees it, and what it did behind the reader's back."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        page.set_default_timeout(WAIT_S * 1000)
        page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.goto(url)
        self.model = page.get_by_label("Model", exact=True)
        self.text = page.get_by_label("Message", exact=True)
        self.stop = page.get_by_role("button", name="Stop")
        self.send = page.get_by_role("button", name="Send")
        self.fresh = page.get_by_role("button", name="New chat")
        self.log = page.get_by_role("log")
        self.answer = page.locator("article.model").last
        self.note = page.locator("article.model small").last

    def ask(self, text: str) -> None:
        self.text.fill(text)
        self.text.press("Enter")

    def set(self, **values: str) -> None:
        self.page.get_by_text("Settings").click()
        for name, value in values.items():
            self.page.get_by_label(name.replace("_message", " message")).fill(value)


@pytest.fixture
def tab(browser: Any, site: Site) -> Iterator[Tab]:
    """Open the page; at the end, it has complained of nothing and asked no other server."""
    page = browser.new_page()
    tab = Tab(page, site.url)
    yield tab
    page.close()
    refused = "Failed to load resource"  # the browser's own line about a status that is an error
    assert [line for line in tab.complaints if not line.startswith(refused)] == []
    assert [url for url in tab.addresses if not url.startswith((site.url, "data:"))] == []


# ---------------------------------------------------------------- an answer


def test_an_answer_grows_while_it_streams_and_ends_with_its_figures(tab: Tab, site: Site) -> None:
    rest = threading.Event()
    site.pieces = ["Bonjour", " à tous 🦊", rest, ", and", " farewell"]
    tab.ask("Hello?")
    expect(tab.answer).to_have_text("Bonjour à tous 🦊")
    expect(tab.stop).to_be_visible()
    expect(tab.send).to_be_hidden()
    expect(tab.fresh).to_be_disabled()
    rest.set()
    expect(tab.answer).to_contain_text("Bonjour à tous 🦊, and farewell")
    expect(tab.note).to_have_text(re.compile(r"^4 tokens, [\d.]+ tokens/s$"))
    expect(tab.send).to_be_visible()
    expect(tab.text).to_be_focused()
    expect(tab.text).to_have_value("")


def test_a_second_question_is_sent_with_the_turns_before_it(tab: Tab, site: Site) -> None:
    tab.ask("One")
    expect(tab.note).to_be_visible()
    tab.ask("Two")
    expect(tab.page.locator("article.model small")).to_have_count(2)
    assert site.requests[1]["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Two"},
    ]
    tab.fresh.click()
    expect(tab.log).to_be_empty()
    tab.ask("Three")
    expect(tab.note).to_be_visible()
    assert site.requests[2]["messages"] == [{"role": "user", "content": "Three"}]


def test_only_the_settings_that_are_filled_in_are_sent(tab: Tab, site: Site) -> None:
    expect(tab.model.locator("option")).to_have_text(["tiny", "large"])
    tab.ask("One")
    expect(tab.note).to_be_visible()
    assert sorted(site.requests[0]) == ["messages", "model", "stream", "stream_options"]
    assert site.requests[0]["model"] == "tiny"
    tab.model.select_option("large")
    tab.set(System_message="Be brief.", max_tokens="5", temperature="0.5", top_p="0.9", seed="7")
    tab.ask("Two")
    expect(tab.page.locator("article.model small")).to_have_count(2)
    sent = site.requests[1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["model"] == "large"
    assert {name: sent[name] for name in ("max_tokens", "temperature", "top_p", "seed")} == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
    }


def test_a_setting_that_is_no_number_is_not_passed_over(tab: Tab, site: Site) -> None:
    tab.set(max_tokens="1.5")
    tab.page.get_by_text("Settings").click()
    tab.ask("Hello?")
    expect(tab.page.get_by_label("max_tokens")).to_be_visible()
    assert site.requests == []
    expect(tab.text).to_have_value("Hello?")


def test_an_answer_cut_at_max_tokens_says_so(tab: Tab, site: Site) -> None:
    site.finish_reason = "length"
    tab.ask("Hello?")
    expect(tab.note).to_contain_text("cut at max_tokens")


def test_shift_enter_makes_a_new_line_and_composing_sends_nothing(tab: Tab, site: Site) -> None:
    tab.text.fill("One")
    tab.text.press("Shift+Enter")
    tab.text.press_sequentially("Two")
    tab.text.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(tab.text).to_have_value("One\nTwo")
    tab.text.press("Enter")
    expect(tab.note).to_be_visible()
    assert [request["messages"][-1]["content"] for request in site.requests] == ["One\nTwo"]


def test_the_log_follows_the_answer_only_for_a_reader_at_its_end(tab: Tab, site: Site) -> None:
    more, rest = threading.Event(), threading.Event()
    site.pieces = ["line\n" * 200, more, "line\n" * 200, rest, "line\n" * 200, "end"]
    tab.ask("Hello?")
    gap = "() => view.scrollHeight - view.scrollTop - view.clientHeight"
    tab.page.wait_for_function("() => view.scrollHeight > 4000")
    tab.page.wait_for_function(f"() => ({gap})() < 40")
    more.set()
    tab.page.wait_for_function("() => view.scrollHeight > 8000")
    tab.page.wait_for_function(f"() => ({gap})() < 40")
    tab.page.evaluate("() => { view.scrollTop = 100; }")
    rest.set()
    expect(tab.note).to_be_attached()
    assert tab.page.evaluate("() => view.scrollTop") == 100


# ---------------------------------------------------------------- what goes wrong


def test_stop_hangs_up_and_keeps_what_has_come(tab: Tab, site: Site) -> None:
    site.pieces = ["Once upon", threading.Event(), " a time"]
    tab.ask("A story")
    expect(tab.answer).to_have_text("Once upon")
    tab.stop.click()
    assert site.gone.wait(WAIT_S)
    expect(tab.answer).to_contain_text("Once upon")
    expect(tab.note).to_have_text("stopped")
    expect(tab.text).to_be_focused()
    site.pieces = ["the end"]
    tab.ask("Go on")
    expect(tab.page.locator("article.model small")).to_have_count(2)
    assert site.requests[1]["messages"][1] == {"role": "assistant", "content": "Once upon"}


@pytest.mark.parametrize("early", [True, False])
def test_an_error_is_shown_and_the_question_comes_back(tab: Tab, site: Site, early: bool) -> None:
    if early:
        site.refusal = (400, "the prompt is too long")
    else:
        site.pieces, site.error = [], "the prompt is too long"
    tab.ask("Hello?")
    expect(tab.note).to_have_text("the prompt is too long")
    expect(tab.text).to_have_value("Hello?")
    site.refusal, site.error, site.pieces = None, None, ["Hi"]
    tab.text.press("Enter")
    expect(tab.answer).to_contain_text("Hi")
    assert site.requests[1]["messages"] == [{"role": "user", "content": "Hello?"}]


def test_an_error_in_the_middle_keeps_what_has_come(tab: Tab, site: Site) -> None:
    site.error = "out of memory"
    tab.ask("Hello?")
    expect(tab.note).to_have_text("out of memory")
    expect(tab.answer).to_contain_text("Hello there")


def test_a_server_that_cannot_be_reached_leaves_the_question(tab: Tab, site: Site) -> None:
    tab.page.context.set_offline(True)
    tab.ask("Hello?")
    expect(tab.note).not_to_be_empty()
    expect(tab.text).to_have_value("Hello?")


def test_a_key_is_asked_for_and_kept_for_the_session(browser: Any, site: Site) -> None:
    site.key = "secret"
    page = browser.new_page()
    tab = Tab(page, site.url)
    field = page.get_by_label("API key")
    expect(page.get_by_role("status")).to_contain_text("key is needed")
    expect(field).to_be_focused()
    field.fill("secret")
    field.press("Enter")
    expect(tab.model.locator("option")).to_have_count(2)
    expect(page.get_by_role("status")).to_be_empty()
    tab.ask("Hello?")
    expect(tab.answer).to_contain_text("Hello there")
    page.reload()
    expect(tab.model.locator("option")).to_have_count(2)
    assert page.evaluate("() => localStorage.length + document.cookie.length") == 0
    page.close()
    assert all("401" in line for line in tab.complaints), tab.complaints


def test_markup_from_the_model_or_the_user_stays_text(tab: Tab, site: Site) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    site.pieces = [markup]
    tab.ask(markup)
    expect(tab.note).to_be_visible()
    expect(tab.answer).to_contain_text(markup)
    expect(tab.page.locator("article.user")).to_have_text(markup)
    assert tab.page.locator("#log img, #log script").count() == 0


# ---------------------------------------------------------------- looks


def test_the_page_is_dark_where_the_reader_prefers_it(tab: Tab) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    shades = {}
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        red, green, blue = map(int, re.findall(r"\d+", tab.page.evaluate(ground))[:3])
        shades[scheme] = (red + green + blue) / 3
    assert shades["light"] > 200
    assert shades["dark"] < 60


def test_the_page_fits_a_phone_without_scrolling_sideways(tab: Tab, site: Site) -> None:
    site.pieces = ["word" * 200]
    tab.page.set_viewport_size({"width": 320, "height": 568})
    tab.page.get_by_text("Settings").click()
    tab.ask("Hello?" * 50)
    expect(tab.note).to_be_attached()
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= 320
    expect(tab.send).to_be_in_viewport()
