# SPDX-License-Identifier: Apache-2.0
"""Tests of how the chat page shows texts: Markdown as it streams, and tokens."""

from __future__ import annotations

import re

import kit_pages
import pytest

import labs_pages

browser, site, tab = kit_pages.browser, kit_pages.site, kit_pages.tab  # fixtures
pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api").expect
ATTRIBUTES = re.compile(r' (?!href|start)[a-z-]+="[^"]*"')


@pytest.fixture(scope="module")
def bare(browser):
    """Return the page without a server, and without storage, which about:blank does not have."""
    page = browser.new_page()
    page.set_content(labs_pages.PAGE)
    return page


@pytest.fixture(scope="module")
def shown(bare):
    """Return a function: Markdown, whole or in pieces, becomes HTML without most attributes."""

    def show(*pieces):
        script = """(pieces) => {
            const box = document.createElement("div"), write = writer(box);
            let words = "";
            for (const piece of pieces) write(words += piece);
            return box.innerHTML;
        }"""
        found = bare.evaluate(script, list(pieces))
        return ATTRIBUTES.sub("", found)

    return show


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# A `b`\ntext", "<h3>A <code>b</code></h3><p>text</p>"),
        ("*a* **b** ***c*** __d__ _e_ ~~f~~",
         "<p><em>a</em> <strong>b</strong> <strong><em>c</em></strong> <strong>d</strong> "
         "<em>e</em> <del>f</del></p>"),
        ("snake_case_name 2 * 3 * 4 **open", "<p>snake_case_name 2 * 3 * 4 **open</p>"),
        ("**a *b** c", "<p><strong>a *b</strong> c</p>"),
        (r"\*a\* \`b\`", "<p>*a* `b`</p>"),
        ("``a`b`` `c", "<p><code>a`b</code> `c</p>"),
        ("- a\n- b\n  - c\n\n    d\n- e",
         "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li>"
         "<li><p>e</p></li></ul>"),
        ("3. a\n\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("- a\n1. b", '<ul><li><p>a</p></li></ul><ol start="1"><li><p>b</p></li></ol>'),
        ("> a\n> > b\n\nc",
         "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a\n\n---\n\n* * *", "<p>a</p><hr><hr>"),
        ("x:\n| a | b |\n|:--|---|\n| `1` | 2\\|3 | 4 |",
         "<p>x:</p><div><table><tr><th>a</th><th>b</th></tr>"
         "<tr><td><code>1</code></td><td>2|3</td></tr></table></div>"),
        ("a | b", "<p>a | b</p>"),
        ("|" * 200 + "\n" + "|-" * 200, f"<p>{'|' * 200}</p><p>{'|-' * 200}</p>"),
        ("``` py x\n  <b>\n\n# no\n",
         "<figure><figcaption>py <button>Copy</button></figcaption>"
         "<pre><code>  &lt;b&gt;\n\n# no\n</code></pre></figure>"),
        ("````\n```\n````\n**a**",
         "<figure><figcaption>text <button>Copy</button></figcaption><pre><code>```</code></pre>"
         "</figure><p><strong>a</strong></p>"),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(shown, text, html):
    assert shown(text) == html


def test_a_text_in_pieces_becomes_what_the_whole_text_becomes(shown):
    text = (
        "# T\n\nA *b*\n\n```js\nx\n\ny\n```\n\n1. a\n\n2. b\n   - c\n\nEnd `x`.\n\n"
        "| a |\n|---|\n| b |\n\n> q\n\n~~~\nopen\n\n# x"
    )
    assert shown(*text) == shown(text)


def test_what_is_shown_stays_while_a_text_grows_and_only_the_last_block_is_drawn_again(bare):
    script = """() => {
        const box = document.createElement("div"), write = writer(box);
        write("a\\n\\nb\\n\\nc\\n");
        const [first, second, third] = box.children;
        write("a\\n\\nb\\n\\nc\\nd");
        return [first, second, third].map((each) => box.contains(each));
    }"""
    assert bare.evaluate(script) == [True, True, False]


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", "&#106;avascript:x",
        "javascript&colon;alert(1)", "\x01javascript:alert(1)", "data:text/html,<script>x</script>",
        "vbscript:x", "file:///etc/passwd", "blob:x", "//evil.example/x", "/relative", "x.html",
        "java\u200bscript:x", "about:blank",
    ],
)  # fmt: skip
def test_other_links_than_http_and_mail_stay_text(shown, address):
    for text in (f"[a]({address})", f"![a]({address})", f"[a](<{address}>)"):
        assert "<a" not in shown(text)
        assert "<img" not in shown(text)


def test_a_very_long_list_is_not_drawn_as_a_whole_each_time(bare):
    script = """() => {
        const box = document.createElement("div"), write = writer(box);
        const words = "- a\\n".repeat(4000);
        write(words);
        const first = box.firstChild;
        write(words + "- b");
        return [box.contains(first), box.textContent.length];
    }"""
    assert bare.evaluate(script) == [True, 4001]


def test_a_link_shows_where_it_goes_and_tells_the_other_server_nothing(tab, site):
    site.pieces = [
        "[bank](https://bank.example@evil.example/x) [p](https://пример.example) "
        "[mail](mailto:a@b.example) https://a.example/x_(y). ![pic](http://c.example/p.png)"
    ]
    tab.ask("?")
    tab.done()
    links = tab.answer.locator("a")
    expect(links).to_have_text([
        "bank (evil.example)", "p (xn--e1afmkfd.example)", "mail (a@b.example)",
        "https://a.example/x_", "Image: pic (c.example)",
    ])  # fmt: skip
    for link in links.all():
        assert link.get_attribute("rel") == "noopener noreferrer"
    assert tab.answer.locator("img").count() == 0
    assert tab.page.request.get(site.url).headers["referrer-policy"] == "no-referrer"


ATTACKS = [
    "<script>alert(1)</script>", "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "<style>*{display:none}</style>",
    "<iframe src=//evil.example></iframe>", "<!-- --><base href=//evil.example>", "`<b>`",
    "[<img src=x onerror=alert(1)>](https://a.example)", "${alert(1)} {{alert(1)}} <%= 1 %>",
    '[a](https://a.example/"onmouseover="alert(1))', "__proto__ constructor", "\x00\x08\x1b[31m",
    "```<script>\n</code><script>alert(1)</script>\n", "&lt;script&gt; &#60;b&#62;",
    "| <script>alert(1)</script> |\n|---|\n| <b onclick=alert(1)> |",
    "\u202e\u2066 [evil\u202e](https://a.example) \u200b\ufeff", "[1] [__proto__] [constructor]",
]  # fmt: skip


@pytest.mark.parametrize("place", ["answer", "question", "reasoning", "call", "name"])
def test_hostile_texts_stay_text(tab, place):
    text = "\n\n".join(ATTACKS)
    call = {"index": 0, "id": text, "function": {"name": text, "arguments": text}}
    deltas = {
        "answer": {"content": text}, "reasoning": {"reasoning_content": text, "content": "a"},
        "call": {"tool_calls": [call]},
    }  # fmt: skip
    tab.answers(
        deltas.get(place, {"content": "a"}), documents=[{"n": 1, "path": text, "heading": text}]
    )
    tab.ask(text if place == "question" else "?")
    tab.done()
    if place == "name":
        tab.press("Rename")
        tab.page.get_by_label("Name", exact=True).fill(text)
        tab.page.keyboard.press("Enter")
    for each in tab.page.locator("details").all():
        each.evaluate("(box) => { box.open = true }")
    bad = (
        "img, script:not(html > script, body > script), svg, iframe, style:not(head > style), base"
    )
    assert tab.page.locator(f"#page :is({bad}), #chats :is({bad})").count() == 0
    handlers = "() => [...document.querySelectorAll('*')].flatMap((e) => [...e.attributes]).filter("
    assert tab.page.evaluate(handlers + "({name}) => name.startsWith('on')).length") == 0
    hrefs = "(all) => all.map((a) => new URL(a.href).protocol)"
    assert set(tab.page.locator("#log a").evaluate_all(hrefs)) <= {"https:"}
    assert tab.page.evaluate("() => ({}).path === undefined && location.pathname === '/'")


def test_the_script_never_makes_elements_from_text():
    words = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\("
    words += r"|createContextualFragment|srcdoc|setHTML|parseHTML"
    assert re.findall(words, labs_pages.PAGE) == []


BOMBS = {
    "brackets": "[" * 50_000, "links": "[](" * 20_000, "labels": "[a](" * 15_000,
    "stars": "*" * 50_000, "opened": "*a **b " * 8_000, "lone ticks": "` a" * 20_000,
    "ticks": "".join("`" * n + " " for n in range(300)), "quotes": ">" * 50_000,
    "lists": "- " * 25_000, "deep": "\n".join(" " * n + "- a" for n in range(600)),
    "table": "|" * 50_000 + "\n" + "|-" * 25_000, "slashes": "\\" * 50_000,
    "rows": "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 5_000, "addresses": "https://" * 8_000,
    "dots": "https://a" + "." * 50_000, "bangs": "![" * 25_000, "hashes": "#" * 50_000,
    "spaces": "-" + " " * 50_000 + "x", "dashes": "- " * 25_000 + "x",
    "fences": "```\n\n" * 10_000, "underscores": "_a" * 25_000,
    "parentheses": "[a](https://b" + "(" * 50_000, "lines": "a\n" * 50_000,
    "bars": "a|b\n" * 20_000, "tildes": "~" * 200_000 + "`", "return": "# " + " " * 200_000 + "\r",
    "no rule": "a|b\n|" + "-" * 200_000 + "x", "no hosts": "https://%" * 5_000,
}  # fmt: skip


def test_no_text_takes_long_to_show(bare):
    script = """(bombs) => Object.entries(bombs).map(([name, words]) => {
        const began = performance.now();
        writer(document.createElement("div"))(words);
        return [performance.now() - began, name];
    })"""
    slowest = max(bare.evaluate(script, BOMBS))
    assert slowest[0] < 5000, slowest  # a quadratic pattern takes minutes; these take tenths


def test_a_long_answer_in_thousands_of_pieces_stays_fluid(bare):
    script = """async () => {
        const turn = { role: "assistant", content: "", page: {} };
        live.add(turn); chat.turns.push(turn); showTurn(turn);
        let drawn = 0, ticks = 0;
        new MutationObserver(() => { drawn++; }).observe(log, { childList: true, subtree: true });
        for (let i = 0; i < 3000; i++) {
            turn.content += i % 60 ? "word **bold** and more text, " : "\\n\\n";
            views.get(turn)();
            if (i % 10 === 0) { await new Promise((done) => setTimeout(done)); ticks++; }
        }
        live.delete(turn); views.get(turn)();
        const bold = () => document.querySelectorAll("#log strong").length;
        for (let i = 0; bold() < 2950 && i < 200; i++)  // the last piece is drawn a frame later
            await new Promise((done) => setTimeout(done, 50));
        return [drawn, ticks, bold()];
    }"""
    drawn, ticks, bold = bare.evaluate(script)
    assert bold == 2950
    assert drawn <= ticks + 5  # it is not drawn for every piece
