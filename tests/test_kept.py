# SPDX-License-Identifier: Apache-2.0
"""Tests of what the chat page keeps: settings made from /openapi.json, and conversations."""

from __future__ import annotations

import json
import threading

import kit
import kit_pages
import pytest

import labs
import labs_jsonl

browser, site, tab = kit_pages.browser, kit_pages.site, kit_pages.tab  # fixtures
pytestmark = pytest.mark.browser
WAIT_S = 10
expect = pytest.importorskip("playwright.sync_api").expect


def second(tab, site):
    """Open the page in another tab of the same browser profile."""
    page = tab.page.context.new_page()
    page.goto(site.url)
    return page


# ---------------------------------------------------------------- settings


def test_the_fields_are_those_of_the_openapi_document(tab, site):
    schemas = tab.page.request.get(f"{site.url}/openapi.json").json()["components"]["schemas"]
    properties = schemas["GenerateRequest"]["properties"]
    tab.page.locator("#gear").click()
    names = [each.get_attribute("name") for each in tab.panel.locator("[name]").all()]
    assert {"temperature", "top_p", "seed", "stop", "min_new_tokens", "reasoning"} <= {*names}
    for name in (set(names) & {*properties}) - {"logprobs"}:
        schema = properties[name]
        assert schema["description"]
        field = tab.page.locator(f"#of-{name}")
        expect(tab.page.locator(f"#about-{name}")).to_contain_text(schema["description"])
        kinds = schema.get("anyOf", [schema])
        for bound, attribute in (("minimum", "min"), ("maximum", "max")):
            limits = [kind[bound] for kind in kinds if bound in kind]
            for limit in limits:
                assert float(field.get_attribute(attribute)) == min(limit, 2**53 - 1)
    assert tab.page.locator("#usual .field").count() == 12


def test_the_defaults_are_the_configured_ones(tab, site):
    settings = labs.Generation(max_new_tokens=77, top_p=0.25, stop=("END",))
    document = kit.Site(site, kit.configured(generation=settings)).get("/openapi.json").json
    tab.page.route("**/openapi.json", lambda route: route.fulfill(json=document))
    tab.page.reload()
    for name, shown in (("max_new_tokens", "77"), ("top_p", "0.25"), ("stop", '["END"]')):
        expect(tab.page.locator(f"#about-{name}")).to_contain_text(f"Default: {shown}.")
    expect(tab.page.locator("#about-top_k")).not_to_contain_text("Default")


def test_every_setting_that_the_page_shows_reaches_the_engine(tab, site):
    tab.set(
        max_new_tokens="9", temperature="0.5", top_p="0.9", top_k="7", min_p="0.1", seed="3",
        repetition_penalty="1.1", frequency_penalty="-1", presence_penalty="1", stop="END",
    )  # fmt: skip
    tab.page.locator("#gear").click()
    tab.page.get_by_text("More settings").click()
    tab.page.get_by_label("min_new_tokens", exact=True).fill("2")
    tab.page.get_by_label("ignore_eos", exact=True).select_option("true")
    tab.page.get_by_label("logit_bias", exact=True).fill('{"5": -1}')
    tab.page.keyboard.press("Escape")
    tab.ask("?")
    tab.done()
    assert site.asked[0][1] == labs.Generation(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3,
        repetition_penalty=1.1, frequency_penalty=-1, presence_penalty=1, stop=("END",),
        min_new_tokens=2, ignore_eos=True, logit_bias={5: -1},
    )  # fmt: skip


def test_what_differs_from_the_default_is_marked_and_reset(tab):
    tab.set(temperature="0.5", System="Be brief.")
    gear = tab.page.locator("#gear")
    expect(gear).to_have_text("Settings (2)")
    gear.click()
    expect(tab.panel.locator(".changed label")).to_have_text(["System message", "temperature"])
    tab.press("Reset temperature")
    expect(tab.page.get_by_label("temperature", exact=True)).to_be_focused()
    expect(gear).to_have_text("Settings (1)")
    tab.press("Reset all")
    expect(gear).to_have_text("Settings")
    expect(tab.page.get_by_label("System message")).to_have_value("")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("top_p", "7", "Give a number from 0 to 1."),
        ("max_new_tokens", "1.5", "Give a whole number from 1 to 1048576."),
        ("seed", "9007199254740993", "Give a whole number from 0 to 9007199254740991."),
        ("tools", "{", "This is not JSON."),
    ],
)
def test_a_bad_setting_is_named_in_its_place_and_nothing_is_sent(tab, site, name, value, fault):
    tab.set(**{name: value})
    tab.ask("Hello?")
    expect(tab.page.locator(f"#about-{name} .error")).to_have_text(fault)
    expect(tab.page.get_by_label(name, exact=True)).to_be_focused()
    expect(tab.text).to_have_value("Hello?")
    assert site.asked == []


def test_settings_belong_to_a_conversation_and_a_new_one_begins_with_them(tab, site):
    tab.set(temperature="0.5")
    tab.ask("one")
    tab.done()
    tab.press("New chat")
    tab.set(temperature="0.7")
    tab.ask("two")
    tab.done()
    assert [each[1].temperature for each in site.asked] == [0.5, 0.7]
    tab.press("one", exact=True)
    tab.page.reload()
    expect(tab.page.locator("article.user .raw")).to_have_text("one")
    expect(tab.page.get_by_label("temperature", exact=True)).to_have_value("0.5")


# ---------------------------------------------------------------- conversations


def test_conversations_are_listed_searched_renamed_and_deleted(tab, site):
    for text in ("about rivers", "about kings"):
        tab.press("New chat")
        tab.ask(text)
        tab.done()
    expect(tab.list).to_have_text(["about kings", "about rivers"])
    tab.page.get_by_placeholder("Search").fill("RIVER")
    expect(tab.list).to_have_text(["about rivers"])
    tab.page.get_by_placeholder("Search").fill("")
    tab.press("Rename")
    tab.page.keyboard.type("__proto__")
    tab.page.keyboard.press("Escape")
    expect(tab.list).to_have_text(["about kings", "about rivers"])
    tab.press("Rename")
    tab.page.keyboard.type("__proto__")
    tab.page.keyboard.press("Enter")
    expect(tab.list).to_have_text(["__proto__", "about rivers"])
    tab.press("Delete")
    expect(tab.list).to_have_text(["about rivers"])
    expect(tab.log).to_be_empty()
    tab.press("Undo")
    expect(tab.list).to_have_text(["__proto__", "about rivers"])
    expect(tab.page.locator("article.user .raw")).to_have_text("about kings")


def test_a_conversation_that_is_deleted_amid_an_answer_stays_deleted(tab, site):
    site.pieces = ["Once upon", threading.Event()]
    tab.ask("A story")
    expect(tab.answer).to_contain_text("Once upon")
    tab.press("Delete")
    tab.done()
    assert site.gone.wait(WAIT_S)
    assert tab.stored() == []
    tab.press("Undo")
    expect(tab.answer).to_contain_text("Once upon")


def test_a_reload_returns_to_the_conversation_even_amid_an_answer(tab, site):
    site.pieces = ["Once upon", threading.Event()]
    tab.ask("A story")
    expect(tab.answer).to_contain_text("Once upon")
    tab.page.reload()
    expect(tab.answer).to_contain_text("Once upon")
    assert [turn["content"] for turn in tab.stored()[0]["turns"]] == ["A story", "Once upon"]


def test_an_exported_file_is_read_by_batch_and_imported_again(tab, site, tmp_path):
    tab.set(System="Be brief.", temperature="0.5", max_new_tokens="9", stop="END")
    tab.page.locator("#gear").click()
    tab.page.get_by_label("Probabilities").check()
    tab.page.get_by_label("API key").fill("secret")
    tab.page.keyboard.press("Escape")
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    tab.answers({"reasoning_content": "hm"}, {"tool_calls": [call]})
    tab.ask("one")
    tab.done()
    tab.answers({"content": "Fine."})
    tab.page.get_by_placeholder("Result of f").fill("42")
    tab.press("Go on with the results")
    tab.done()
    tab.press("New chat")
    tab.ask("two")
    tab.done()
    with tab.page.expect_download() as download:
        tab.press("Export all")
    path = tmp_path / "conversations.jsonl"
    download.value.save_as(path)
    assert "secret" not in path.read_text(encoding="utf-8")
    lines = path.read_bytes().splitlines()
    tasks = [labs_jsonl.read_task(kit.configured(), line, i) for i, line in enumerate(lines)]
    assert [task.error for task in tasks] == [None, None]
    messages = tasks[1].request.prompts[0].messages
    assert [message.role for message in messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert (messages[2].reasoning_content, messages[3].content) == ("hm", "42")
    assert tasks[1].request.options == {
        "temperature": 0.5, "max_new_tokens": 9, "stop": ("END",), "logprobs": 5,
    }  # fmt: skip
    before = tab.stored()
    tab.page.evaluate("() => localStorage.clear()")
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b"\n".join([*lines, b"no", b'{"messages": [{"role": "x"}]}', b"[]"]))
    tab.page.locator("#file").set_input_files(broken)
    expect(tab.notice).to_contain_text("Conversations imported: 2. Lines without one: 3,4,5.")
    after = {each["name"]: each for each in tab.stored()}
    for each in before:
        found = after[each["name"]]
        kept = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
        turns = [[{k: turn.get(k) for k in kept} for turn in one["turns"]] for one in (each, found)]
        assert turns[0] == turns[1]
        assert json.loads(found["settings"]["temperature"]) == 0.5
        assert found["settings"]["system"] == "Be brief."


def test_a_full_or_forbidden_storage_is_told_and_nothing_is_lost(tab, site):
    tab.page.evaluate("() => localStorage.setItem('other', 'x'.repeat(5200000))")
    site.pieces = ["y" * 100_000]
    tab.ask("one")
    expect(tab.notice).to_contain_text("This browser stores nothing more.")
    tab.done()
    expect(tab.list).to_have_text(["one"])
    tab.ask("two")
    tab.done()
    assert [len(message["content"]) for message in site.asked[1][0]][0::2] == [3, 3]
    with tab.page.expect_download() as download:
        tab.press("Export all")
    assert "yyyy" in download.value.path().read_text(encoding="utf-8")


def test_a_browser_that_keeps_nothing_still_chats(tab, site):
    for name in ("localStorage", "sessionStorage"):
        tab.page.add_init_script(
            f"Object.defineProperty(window, '{name}', {{ get() {{ throw Error('denied'); }} }})"
        )
    tab.page.reload()
    for text in ("one", "two"):
        tab.ask(text)
        tab.done()
    expect(tab.notice).to_contain_text("This browser stores nothing more.")
    expect(tab.list).to_have_text(["one"])
    assert len(site.asked[1][0]) == 3


def test_escape_in_the_field_for_a_name_stops_no_answer(tab, site):
    rest = threading.Event()
    site.pieces = ["Once", rest, " upon"]
    tab.ask("A story")
    expect(tab.answer).to_contain_text("Once")
    tab.press("Rename")
    tab.page.keyboard.press("Escape")
    rest.set()
    expect(tab.answer).to_contain_text("Once upon")


BAD = [
    "no JSON", "null", "[]", '{"turns": 3}', '{"turns": [{"role": "user", "content": 3}]}',
    '{"turns": [{"role": "user", "content": {"trim": 1}}]}', '{"turns": [null]}',
    '{"turns": [{"role": "assistant", "tool_calls": [3]}]}',
    '{"turns": [{"role": "user", "page": {"notes": 3}}]}',
    '{"turns": [{"role": "user", "page": {"figures": {"toString": 1}}}]}',
    '{"turns": [{"role": "user", "page": {"documents": [null]}}]}',
]  # fmt: skip


def test_stored_conversations_that_cannot_be_read_are_left_as_they_are(tab):
    tab.ask("one")
    tab.done()
    keep = "(all) => all.forEach((bad, i) => localStorage.setItem(`labs.chat.bad${i}`, bad))"
    tab.page.evaluate(keep, BAD)
    tab.page.evaluate("() => sessionStorage.setItem('chat', 'bad0')")
    tab.page.reload()
    expect(tab.list).to_have_text(["one"])
    tab.ask("two")
    tab.done()
    kept = (
        "(count) => [...Array(count).keys()].map((i) => localStorage.getItem(`labs.chat.bad${i}`))"
    )
    assert tab.page.evaluate(kept, len(BAD)) == BAD


def test_a_stored_conversation_without_a_name_does_not_break_the_list(tab):
    tab.page.evaluate("() => localStorage.setItem('labs.chat.x', JSON.stringify({turns: []}))")
    tab.ask("one")
    tab.done()
    expect(tab.list).to_have_count(2)


def test_a_large_import_is_read_at_once_and_what_is_not_kept_is_told(tab, tmp_path):
    lines = [json.dumps({"id": f"{i}", "messages": [{"role": "user", "content": "x"}]})
             for i in range(500)]  # fmt: skip
    large = {"messages": [{"role": "user", "content": "y" * 6_000_000}]}
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join([*lines, json.dumps(large), *["no"] * 20]), encoding="utf-8")
    tab.page.evaluate("() => { drawn = 0; const real = stored;"
                      " stored = () => { drawn++; return real(); }; }")  # fmt: skip
    tab.page.locator("#file").set_input_files(path)
    expect(tab.notice).to_have_text(
        "Conversations imported: 500. Lines without one: 502,503,504,505,506,507,508,509,510 …. "
        "This browser stores nothing more."
    )
    expect(tab.list).to_have_count(500)
    assert tab.page.evaluate("() => drawn") < 5


def test_a_bad_value_in_storage_breaks_no_export(tab):
    bad = {"id": "b", "name": "b", "turns": [{"role": "user", "content": "x"}],
           "settings": {"temperature": "no", "top_p": 3}}  # fmt: skip
    tab.page.evaluate("(bad) => localStorage.setItem('labs.chat.b', bad)", json.dumps(bad))
    with tab.page.expect_download() as download:
        tab.press("Export all")
    line = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert line["messages"] == [{"role": "user", "content": "x"}]


def test_two_tabs_lose_nothing_of_one_conversation(tab, site):
    tab.ask("one")
    tab.done()
    other = second(tab, site)
    other.locator("#list li > button").click()
    expect(other.locator("article.user .raw")).to_have_text("one")
    other.get_by_label("Message", exact=True).fill("from the other tab")
    other.keyboard.press("Enter")
    other.wait_for_function("() => !request && chat.turns.length === 4")
    expect(tab.page.locator("article.user .raw")).to_have_text(["one", "from the other tab"])
    both = "(words) => { chat.turns.push({role: 'user', content: words, page: {}}); save(); }"
    tab.page.evaluate("() => { request = { abort() {} }; }")  # an answer comes in this tab
    other.evaluate(both, "there")
    tab.page.wait_for_function("() => read(memory + chat.id).turns.length === 5")
    tab.page.evaluate(both, "here")
    expect(tab.notice).to_contain_text("Both versions are kept.")
    last = {each["turns"][-1]["content"] for each in tab.stored()}
    assert last == {"here", "there"}


@pytest.mark.parametrize("busy", ["neither", "first", "last"])
def test_tabs_that_write_at_once_lose_nothing(tab, site, busy):
    tab.ask("one")
    tab.done()
    other = second(tab, site)
    other.locator("#list li > button").click()
    expect(other.locator("article.user .raw")).to_have_text("one")
    both = [(tab.page, "first"), (other, "last")]
    for page, name in both:  # until both have written, neither sees or is told of the other's
        page.evaluate("() => { before = { read, met, told: [], there: read(memory + chat.id) };"
                      " met = (...each) => before.told.push(each);"
                      " read = (name) => name.endsWith(chat.id) ? before.there"
                      " : before.read(name); }")  # fmt: skip
        if name == busy:
            page.evaluate("() => { request = { abort() {} }; }")
    write = "(words) => { chat.turns.push({role: 'user', content: words, page: {}}); save(); }"
    tab.page.evaluate(write, "here")
    other.evaluate(write, "there")
    for page, _ in both:
        page.wait_for_function("() => before.told.length")
        page.evaluate(
            "() => { ({ read, met } = before); before.told.forEach((each) => met(...each)); }"
        )
    expect(tab.notice).to_contain_text("Both versions are kept.")
    expect(tab.list).to_have_count(2)
    kept = {each["name"]: each["turns"][-1]["content"] for each in tab.stored()}
    assert kept == {"one": "there", "one (copy)": "here"}
    tab.page.reload()
    expect(tab.page.locator("article.user .raw")).to_have_text(["one", "here"])
