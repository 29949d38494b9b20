# SPDX-License-Identifier: Apache-2.0
"""The chat page in a real browser, for its tests: chromium, driven by playwright, asks the app."""

from __future__ import annotations

import contextlib
import itertools
import json
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

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_S = 10


class Engine(kit.FakeEngine):
    """An engine that answers as a test says, and sees the messages as they were sent.

    pieces: texts or Deltas; an Event among them holds the rest back until it is set, and an error
    ends them.
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
                made = labs.Delta(piece) if isinstance(piece, str) else piece
                events.put((0, labs.Failed(piece) if failed else made))
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
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=20_000)  # 5 s are too few beside a busy test
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
        self.models = page.locator("#model option")
        self.log = page.get_by_role("log")
        self.answer = page.locator("article.model").last
        self.notes = page.locator("article.model > small:not(:empty)")
        self.notice = page.locator("#notice")
        self.panel = page.get_by_role("region", name="Settings")
        self.list = page.locator("#list li > button")

    def ask(self, text):
        self.text.fill(text)
        self.text.press("Enter")

    def press(self, name, **more):
        self.page.get_by_role("button", name=name, **more).click()

    def set(self, **values: str):
        """Fill in settings, System for the system message, in the panel, and close it."""
        if not self.panel.is_visible():
            self.page.locator("#gear").click()
        for name, value in values.items():
            label = "System message" if name == "System" else name
            self.page.get_by_label(label, exact=True).fill(value)
        self.page.keyboard.press("Escape")

    def answers(self, *chunks, **more):
        """Answer the next requests with these deltas of OpenAI's format. more: of the first."""
        frames = [
            {"choices": [{"delta": chunk} if "delta" not in chunk else chunk], **more}
            for chunk in chunks
        ]
        usage = {"completion_tokens": 4, "total_tokens": 50, "prompt_tokens_details": {}}
        frames.append({"choices": [], "usage": usage})
        lines = [*map(json.dumps, frames), "[DONE]"]
        body = "".join(f"data: {line}\n\n" for line in lines)
        sent = []

        def answer(route):
            sent.append(json.loads(route.request.post_data))
            route.fulfill(body=body, content_type="text/event-stream")

        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", answer)
        return sent

    def done(self):
        self.page.wait_for_function("() => !request")

    def stored(self):
        """Return the stored conversations, the newest first."""
        return self.page.evaluate("() => stored()")


@pytest.fixture
def tab(browser, site):
    """Open the page; at the end, check that it logged no error and called no other server."""
    tab = Tab(browser.new_context().new_page(), site.url)
    yield tab
    tab.page.context.close()
    refused = "Failed to load resource"  # the browser's own line about a status that is an error
    assert [line for line in tab.complaints if not line.startswith(refused)] == []
    assert [url for url in tab.addresses if not url.startswith((site.url, "data:"))] == []
