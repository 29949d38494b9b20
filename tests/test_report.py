"""The report on a run over a file: what it counts, what it costs, and that no text escapes it."""

import html.parser
import json
import re
import shutil
from types import SimpleNamespace as Named

import kit
import pytest

import labs
import labs_cli
import labs_jsonl
import labs_report
import labs_request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ATTACKS = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "</title><iframe src=//example.org>",
    "\x1b]0;title\x07\u202e\u2028",
    "&lt;b&gt; &#x3c;script>",
]


@pytest.fixture
def clock():
    return kit.Clock()


@pytest.fixture
def findings(clock):
    return labs_report.Findings(clock)


def task(tokens=(4,), line=1, error=None, reason="stop", decode_s=0.0, prompt=10, made=None):
    timings = labs.Timings(0.0, 0.0, decode_s, 0.0)
    found = {
        place: Named(usage=labs.Usage(prompt, each), timings=timings, finish_reason=reason)
        for place, each in enumerate(() if error else tokens)
    }
    failure = None if error is None else labs.InputError(error)
    return Named(error=failure, line=line, found=found, made=made)


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------- what is counted


def test_answers_lengths_and_ends_are_counted(findings, clock):
    findings.add(task((4, 5), reason="stop"))
    findings.add(task((300,), prompt=0, reason="length"))
    findings.add(task(made={"object": "list"}, tokens=()))
    clock.now = 10
    text = Tags(labs_report.page(findings, "in.jsonl")).text
    assert findings.sums["lines"] == 3
    assert findings.reasons == {"stop": 2, "length": 1}
    for said in ("Vectors and scores1", "Generated tokens309", "Tokens/s30.9", "256 to 511"):
        assert said in text
    assert "stop266.7%" in text
    assert "early" not in text


def test_errors_are_grouped_with_the_numbers_of_their_lines(findings):
    for line in range(1, 40):
        findings.add(task(error=f"line {line}: no such field", line=line))
    findings.add(task(error="another\n  fault", line=41))
    text = Tags(labs_report.page(findings, "in.jsonl")).text
    assert "no such field391, 2, 3, 4, 5" in text
    assert ", …another fault141" in text
    assert "Failed40" in text


def test_tokens_are_spread_over_the_time_in_which_they_were_made(findings, clock):
    clock.now = 10.5
    findings.add(task((110,), decode_s=10.2))
    assert findings.tokens[:12] == [10.0] * 11 + [0.0]
    clock.now = 10_000.0
    findings.add(task((1,)))
    assert sum(findings.tokens) == pytest.approx(111)
    assert findings.bin_s == 128
    assert labs_report.duration(10_000) == "2:46:40 h"


def test_a_hundred_thousand_lines_take_no_more_memory_than_a_few(findings, clock):
    for line in range(100_000):
        clock.now += 1
        error = f"fault {line} " + "x" * 1000 if line % 2 else None
        findings.add(task((line % 5000,), error=error, line=line, decode_s=3.0))
    assert len(findings.errors) == labs_report.GROUPS + 1
    assert len(findings.errors["other errors"][1]) == labs_report.LINES
    assert len(findings.tokens) == labs_report.BINS
    text = labs_report.page(findings, "in.jsonl")
    assert "100,000" in text
    assert len(text) < 100_000


def test_a_run_without_lines_has_a_report_that_says_so(findings):
    text = Tags(labs_report.page(findings, "-")).text
    assert "No line was answered" in text
    assert "standard input" in text
    assert "nan" not in text.lower()


# ---------------------------------------------------------------- what is in the file


def test_no_text_from_outside_becomes_markup(findings):
    for line, attack in enumerate(ATTACKS):
        findings.add(task(error=attack, line=line))
    name = "".join(ATTACKS).replace("/", "")
    page = labs_report.page(findings, name)
    tags = Tags(page)
    assert not tags.found & {"script", "img", "iframe", "link", "object", "a"}
    assert not any(each.startswith("on") or each in ("src", "href") for each in tags.attributes)
    assert ATTACKS[0] in tags.text
    assert "&lt;b&gt; &#x3c;script>" in tags.text  # as it was, not decoded once more
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2028]", page)
    assert "default-src 'none'" in page
    labs_report.page(findings, "a\udcff.jsonl").encode()  # a name that is not UTF-8


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_it_and_asks_nobody(findings, tmp_path, scheme, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is absent")
    for line, attack in enumerate(ATTACKS):
        findings.add(task((2**line,), reason="length", decode_s=line))
        findings.add(task(error=attack, line=line))
    (tmp_path / "report.html").write_text(labs_report.page(findings, "in.jsonl"), "utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = {"width": width, "height": 800}
        page, seen = browser.new_context(color_scheme=scheme, viewport=view).new_page(), []
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda line: seen.append(line.text))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        page.goto(f"file://{tmp_path}/report.html")
        assert page.get_by_role("img").count() == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert seen == [f"file://{tmp_path}/report.html"]
        browser.close()


# ---------------------------------------------------------------- when and where it is written


def test_it_is_written_whole_at_the_end_and_over_an_older_report(tmp_path):
    target = tmp_path / "report.html"
    for count in (1, 2):
        with labs_report.written(str(target), ("in", "out")) as findings:
            for _ in range(count):
                findings.add(task())
            assert target.exists() == (count == 2)  # the older one, still whole
    assert "Answers</dt><dd>2" in target.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_an_interrupted_run_has_what_is_there(tmp_path):
    target = tmp_path / "report.html"

    def run():
        with labs_report.written(str(target), ("in", "out")) as findings:
            findings.add(task())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "ended early" in target.read_text("utf-8")


def test_a_run_that_never_began_leaves_an_older_report(tmp_path):
    target = tmp_path / "report.html"
    with pytest.raises(labs.ModelError), labs_report.written(str(target), ("i", "o")):
        raise labs.ModelError("no model")
    assert not target.exists()


def test_nothing_but_an_older_report_is_ever_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("data")
    (tmp_path / "folder").mkdir()
    cases = {
        "precious": "exists and is no report",
        "folder": "name of a file",
        "-": "name of a file",
        "absent/report.html": "no folder absent",
        "./in.jsonl": "the prompts or the answers",
        f"{tmp_path}/out.jsonl": "the prompts or the answers",
    }
    for target, why in cases.items():
        with pytest.raises(labs.LabsError, match=why):
            labs_report.check(target, ("in.jsonl", "out.jsonl"))
    assert (tmp_path / "precious").read_text() == "data"


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(labs_report.os, "replace", full)
    with pytest.raises(labs.LabsError, match="No space left"):
        labs_report.write(str(tmp_path / "report.html"), "text")
    assert not [*tmp_path.iterdir()]


def test_a_run_tells_each_line_once_with_its_number(tiny):
    findings = labs_report.Findings()
    tally = labs_jsonl.Tally(watch=findings.add)
    lines = [{"prompt": "Hi"}, {"prompt": "Hi", "x": 1}, {"id": "old", "prompt": "Hi"}]
    data = [json.dumps(line).encode() for line in lines]
    tally.answered.add(labs_jsonl._key("old"))
    context = labs_request.open_context(kit.SHORT_LINES)
    answers = [*labs_jsonl.answer_lines(tiny, context, enumerate(data, 1), tally)]
    assert len(answers) == findings.sums["lines"] == 2
    ((_, (count, numbers)),) = findings.errors.items()
    assert (count, numbers) == (1, [2])
    assert findings.sums["completion_tokens"] == tally.tokens > 0


def test_the_flag_writes_a_report_beside_the_answers(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(labs_cli, "load_model", lambda _: tiny)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi", "max_new_tokens": 2}\n{}\n')
    words = ["batch", "in.jsonl", "--report", "r.html"]
    ended = kit.invoke(words[0], words[1], "o.jsonl", *words[2:])
    assert ended.exit_code == 1  # a line failed
    assert "Failed</dt><dd>1" in (tmp_path / "r.html").read_text("utf-8")
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2
    refused = kit.invoke(*words, "--ray")
    assert refused.exit_code == 2
    assert "--ray and --report exclude each other" in refused.output
