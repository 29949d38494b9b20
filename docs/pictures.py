# SPDX-License-Identifier: Apache-2.0
"""Make the pictures of the chat page: labs-api with the default model, seen in chromium.

    uv run python docs/pictures.py        # writes docs/chat.png, docs/tokens.png, docs/phone.png

Needs playwright and chromium. Every text in the pictures is what the model answered just then.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def served() -> Iterator[str]:
    """Run labs-api on a free port and yield its address, once the model is ready."""
    code = "import labs_cli; labs_cli.main_api()"
    command = [sys.executable, "-c", code, "--port", "0"]
    with subprocess.Popen(command, cwd=HERE.parent, stderr=subprocess.PIPE, text=True) as server:
        told = ""
        try:
            for line in server.stderr or ():
                told += line
                if "ready after" in line:
                    break
            yield re.findall(r"http://\S+", told)[0]
        finally:
            server.terminate()


def open_page(page: Any, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.goto("/")
    page.wait_for_function("() => context.size")


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.wait_for_function("() => !request")


def settings(page: Any, **values: str) -> None:
    page.locator("#gear").click()
    for name, value in values.items():
        page.get_by_label(name, exact=True).fill(value)


def take(page: Any, name: str) -> None:
    page.wait_for_timeout(300)  # a drawing of the last piece may be due
    page.screenshot(path=HERE / name)


def chat(page: Any) -> None:
    """Show three conversations, one of them with lists and code."""
    open_page(page, 1120, 740)
    settings(page, temperature="0", max_new_tokens="200")
    page.keyboard.press("Escape")
    for text in ("What is the capital of France?", "Why is the sky blue?"):
        ask(page, text)
        page.get_by_role("button", name="New chat").click()
    ask(page, "Write a Python function that adds two numbers, in a code block, and explain it.")
    take(page, "chat.png")


def tokens(page: Any) -> None:
    """Show the probabilities of an answer's tokens, and the rivals of one of them."""
    open_page(page, 1120, 420)
    settings(page, temperature="0.7", seed="3", max_new_tokens="60")
    page.get_by_label("Probabilities").check()
    page.keyboard.press("Escape")
    ask(page, "Tell me one thing about the moon.")
    page.locator(".tokens .p3, .tokens .p2").nth(2).hover()
    take(page, "tokens.png")


def phone(page: Any) -> None:
    """Show the settings, in the dark, on a phone."""
    page.emulate_media(color_scheme="dark")
    open_page(page, 375, 700)
    settings(page, temperature="0.7", top_p="7")
    take(page, "phone.png")


def main() -> None:
    with served() as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for picture in (chat, tokens, phone):
            context = browser.new_context(base_url=url)
            context.set_default_timeout(120_000)
            picture(context.new_page())
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
