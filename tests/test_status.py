"""What a server does: the history of each model, /status.json, and the page in a real browser."""

import contextlib
import random
import shutil
import threading

import msgspec
import pytest
from kit import Clock, FakeEngine, Live, Site, configured

import labs
import labs_history
import labs_models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BIN_S, BINS = labs_history.BIN_S, labs_history.BINS


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def history(clock):
    return labs_history.History(clock)


# ---------------------------------------------------------------- the history


def test_a_young_history_has_no_interval_and_a_finite_rate(history, clock):
    window = history.window("any")
    assert window == labs_history.Window((), 0.0, 0, 0, None)
    history.add("any", tokens=5)
    assert history.window("any").now == 5.0  # over one second, though none has passed
    clock.now += 4
    assert history.window("any").now == 1.25


def test_tokens_are_in_the_interval_in_which_they_came(history, clock):
    for tokens in (10, 0, 30):
        history.add("m", tokens=tokens, answers=1)
        clock.now += BIN_S
    window = history.window("m")
    assert window.rates == (1.0, 0.0, 3.0)
    assert (window.tokens, window.answers, window.now) == (40, 3, 3.0)
    assert history.window("other").tokens == 0


def test_after_ten_minutes_of_silence_nothing_is_left(history, clock):
    history.add("m", tokens=10)
    history.first("m", 0.5)
    clock.now += BIN_S * BINS
    assert history.window("m").rates == (1.0,) + (0.0,) * (BINS - 1)
    assert history.window("m").first_token.count == 1
    clock.now += BIN_S
    window = history.window("m")
    assert (window.rates, window.tokens, window.first_token) == ((0.0,) * BINS, 0, None)


def test_the_history_equals_a_plain_count_at_random_times(history, clock):
    draw, added = random.Random(4), []
    for _ in range(2000):
        clock.now += draw.choice((0.0, 0.1, 3.0, 40.0, 700.0)) * draw.random()
        added.append((int(history.up_s // BIN_S), draw.randrange(5)))
        history.add("m", tokens=added[-1][1])
        if draw.random() < 0.1:
            last = int(history.up_s // BIN_S)
            bins = range(max(0, last - BINS), last)
            expected = [sum(n for at, n in added if at == each) / BIN_S for each in bins]
            assert list(history.window("m").rates) == expected


def test_first_tokens_are_summed_up_and_bounded(history):
    for each in range(3 * labs_history.KEPT):
        history.first("m", each / 1000)
    found = history.window("m").first_token
    assert (found.count, found.p95_s) == (1000, 2.95)
    assert found.median_s == pytest.approx(2.4995)


def test_a_correction_never_shows_less_than_nothing(history, clock):
    history.add("m", tokens=-4)
    assert (history.window("m").tokens, history.window("m").now) == (0, 0.0)


def test_threads_lose_no_token(history):
    def add():
        for _ in range(2000):
            history.add("m", tokens=1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert history.window("m").tokens == 8000


# ---------------------------------------------------------------- the figures


def test_an_answer_counts_its_tokens_once_streamed_or_not(tiny):
    engine = FakeEngine(tiny)
    engine.pieces = ["a", "b", "c"]  # the fake engine counts a token for each
    site = Site(engine, configured())
    for path in ("/generate", "/generate/stream"):
        assert site.post(path, {"prompt": "Hi"}).status_code == 200
    (model,) = site.get("/status.json").json["models"]
    assert (model["window"]["tokens"], model["window"]["answers"]) == (6, 2)
    assert model["window"]["first_token"]["count"] == 2


def test_a_report_tells_each_model_and_loads_none(tiny):
    table = labs.Config(model=labs.ModelSpec(model_name="org/vectors", kind="embedding"))
    tables = {"vectors": msgspec.structs.replace(table, model_id="vectors")}
    config = msgspec.structs.replace(configured(), models=tables)
    engine = FakeEngine(tiny)
    engine.doing = {"running": 3, "waiting": 2}
    first, second = Site(engine, config).get("/status.json").json["models"]
    assert (first["name"], first["kind"], first["loaded"]) == ("tiny", "text", True)
    assert (first["running"], first["waiting"]) == (3, 2)
    assert (first["device"], first["dtype"], first["forward"]) == ("cpu", "fp32", "labs")
    assert first["weight_bytes"] == tiny.decoder.weight_bytes
    assert (second["name"], second["loaded"], second["device"]) == ("vectors", False, None)
    none = labs_models.Models(config, start=False)
    models = Site(engine, config, none).get("/status.json").json["models"]
    assert [model["loaded"] for model in models] == [False, False]
    assert not models[0]["window"]["rates"]


def test_the_figures_are_seen_by_those_who_see_the_metrics(tiny):
    for public in (False, True):
        site = Site(FakeEngine(tiny), configured("secret", public_metrics=public))
        for path in ("/metrics", "/status.json"):
            assert site.get(path).status_code == (200 if public else 401)
            assert site.get(path, authorization="Bearer secret").status_code == 200
        assert site.get("/status").status_code == 200  # the page itself has no figures
        assert "secret" not in site.get("/status.json", authorization="Bearer secret").text


def test_no_page_asks_another_server(tiny):
    page = Site(FakeEngine(tiny), configured()).get("/status")
    assert "sha256-" in (policy := page.headers["content-security-policy"])
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "innerHTML" not in page.text
    assert "https:" not in page.text.replace("http://www.w3.org/2000/svg", "")


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


pages = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WAYS = [(scheme, width) for scheme in ("light", "dark") for width in (375, 1280)]


NAME = "<b>a-model-with-quite-a-long-name-32b-instruct</b>"


def filled(history, clock):
    """Fill a history with nine minutes of work."""
    for second in range(540):
        clock.now += 1
        history.add(NAME, tokens=second % 97, answers=int(second % 7 == 0))
        if second % 7 == 0:
            history.first(NAME, 0.05 * (second % 11))


@pytest.fixture
def busy(request, tiny, history, clock, monkeypatch):
    """Serve two models on a port, the first with a history; request.param: the server's keys."""
    monkeypatch.setattr(labs_history, "History", lambda: history)
    other = msgspec.structs.replace(labs.Config(), model_id="small")
    keys = getattr(request, "param", ())
    config = msgspec.structs.replace(configured(*keys), model_id=NAME, models={"small": other})
    engine = FakeEngine(tiny)
    engine.doing = {"running": 3, "waiting": 2}
    filled(history, clock)
    live = Live(engine, config)
    yield live
    live.close()


@contextlib.contextmanager
def opened(browser, live, scheme="light", width=1280):
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, device_scale_factor=1
    )
    context.set_default_timeout(8000)
    page, complaints = context.new_page(), []
    page.on("console", lambda line: line.type == "error" and complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{live.url}/status")
    yield page, complaints
    context.close()


@pages
@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), WAYS)
def test_the_page_shows_the_figures_to_everybody(browser, busy, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is absent")
    with opened(browser, busy, scheme, width) as (page, complaints):
        section = page.get_by_role("region", name=NAME)
        section.get_by_text("3 of 4").wait_for()
        assert section.get_by_role("heading").inner_text() == NAME  # markup is text
        assert section.get_by_role("img").get_attribute("aria-label").endswith("at most 90")
        assert section.locator("rect").count() == 54
        page.get_by_text("text · not loaded").wait_for()
        page.get_by_text("The same as a table").first.click()
        assert section.get_by_role("row").count() == 10
        assert "NaN" not in page.inner_text("body")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert not complaints


@pages
@pytest.mark.browser
def test_the_page_follows_and_keeps_what_is_open(browser, busy, history):
    with opened(browser, busy) as (page, complaints):
        page.clock.install()
        page.reload()
        page.get_by_text("3 of 4").wait_for()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # the keyboard alone opens the table
        busy.engine.doing = {"running": 1, "waiting": 0}
        page.clock.run_for(6000)
        page.get_by_text("1 of 4").wait_for()
        assert page.get_by_role("table").is_visible()
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        assert not complaints


@pages
@pytest.mark.browser
@pytest.mark.parametrize("busy", [("secret",)], indirect=True)
def test_a_server_with_keys_asks_for_one(browser, busy):
    with opened(browser, busy) as (page, _):
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Enter")
        page.get_by_text("3 of 4").wait_for()
        assert page.get_by_label("API key").is_hidden()


@pages
@pytest.mark.browser
def test_a_lost_server_is_told_and_the_figures_stay(browser, busy):
    with opened(browser, busy) as (page, _):
        page.get_by_text("3 of 4").wait_for()
        page.clock.install()
        page.route("**/status.json", lambda route: route.abort())
        page.reload()
        page.get_by_text("does not answer; trying again").wait_for()
        page.unroute("**/status.json")
        page.clock.run_for(6000)
        page.get_by_text("3 of 4").wait_for()
        assert page.get_by_role("status").inner_text() == ""
