"""The chat page at ``/`` of the gateway, in a real browser, with keys and clicks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from browser_chat import BrowserChat
from chat_scripts import HOSTILE, hold, say
from eventually import until
from helpers.conversation import Conversation
from helpers.gateway import create_app
from helpers.gateway.page import FILES
from jupyterlab_fixture import INSTALL, chromium_in
from running_gateway import RunningGateway, running_gateway
from scripted_service import ScriptedService, last, tokens

KEY = "a-key-of-some-length"
FOLDER = Path(__file__).parents[1] / "helpers" / "gateway" / "page"
Opener = Callable[..., BrowserChat]

RENDERED = """async text => {
    const {MarkdownView} = await import(new URL("page/markdown.js", location));
    const whole = document.createElement("div"), growing = document.createElement("div");
    new MarkdownView(whole).update(text);
    const view = new MarkdownView(growing);
    for (let end = 0; end <= text.length; end += 7) view.update(text.slice(0, end));
    view.update(text);
    return [whole.innerHTML, growing.innerHTML].map(html => html.replace(/ (?:dir|title)="[^"]+"/g, ""));
}"""

# The lowest contrast of a text with what is behind it, and that text.
LOWEST_CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = color => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data;
    };
    const light = color => {
        const [r, g, b] = [...rgba(color)].slice(0, 3).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        const color = getComputedStyle(element).backgroundColor;
        return rgba(color)[3] === 255 ? color : behind(element.parentElement);
    };
    const hasText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const shown = [...document.querySelectorAll("body *")].filter(element => element.checkVisibility());
    const contrasts = shown.filter(hasText).map(element => {
        const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
        return [(high + 0.05) / (low + 0.05), element.textContent];
    });
    return [contrasts.length, ...contrasts.sort((a, b) => a[0] - b[0])[0]];
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser. An event loop runs meanwhile, so `asyncio.run` would raise."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=INSTALL)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium_in(driver))
        yield browser
        browser.close()


@pytest.fixture
def gateway(scripted: ScriptedService) -> Iterator[RunningGateway]:
    with running_gateway(scripted.port) as running:
        yield running


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Opener]:
    """Open chat pages. All of them are closed and checked after the test."""
    with ExitStack() as stack:

        def open_one(gateway: RunningGateway, path: str = "/", **options: Any) -> BrowserChat:
            chat = BrowserChat(chromium, gateway.root, path, **options)
            stack.callback(chat.close)
            return chat

        yield open_one


@pytest.fixture
def chat(open_page: Opener, gateway: RunningGateway) -> BrowserChat:
    """A chat page in front of the scripted service."""
    return open_page(gateway)


# ---- What is served


def test_the_page_and_its_files_are_open_and_say_what_the_browser_may_do(scripted: ScriptedService) -> None:
    client = TestClient(create_app(f"127.0.0.1:{scripted.port}", keys=[KEY]))
    for path, media_type in {"/": "text/html", **{f"/page/{name}": FILES[name] for name in FILES}}.items():
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == media_type
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy.pop("img-src") == policy.pop("script-src") == policy.pop("style-src") == "'self'"
        assert policy.pop("connect-src") == policy.pop("require-trusted-types-for").replace("script", "self")
        names = {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}
        assert policy == dict.fromkeys(names, "'none'")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "scripted" not in response.text
    assert not scripted.requests


def test_only_the_files_of_the_page_are_served(scripted: ScriptedService) -> None:
    client = TestClient(create_app(f"127.0.0.1:{scripted.port}"))
    assert {path.name for path in FOLDER.iterdir()} == {"index.html", *FILES}
    for name in ("index.html", "other.js", "..%2Fkeys.py", "../keys.py", "%2e%2e/keys.py", ""):
        assert client.get(f"/page/{name}").status_code == 404


def test_the_page_has_no_inline_code_and_no_way_to_make_html_of_text() -> None:
    html = (FOLDER / "index.html").read_text("utf-8")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=\"page/chat.js\"></script>)", html)
    assert all(url.startswith("page/") for url in re.findall(r"(?:src|href)=\"(.*?)\"", html))
    for script in FOLDER.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|setHTML|document\.write|"
            r"\beval\b|new Function",
            script.read_text("utf-8"),
        ), script.name


# ---- Asking


def test_an_answer_grows_on_screen_before_it_ends(chat: BrowserChat, scripted: ScriptedService) -> None:
    hold(scripted)
    chat.send("Hello")
    chat.wait_for_answer("One two")
    assert chat.button("Stop").is_visible() and not chat.button("Send").is_visible()
    scripted.resume.set()
    chat.wait_for_status("Answer complete.")
    assert chat.turns() == [("Hello", "One two three")]
    assert re.fullmatch(r"2 tokens, first after \d+\.\d\d s, \d+\.\d tokens/s", chat.summary)
    (request,) = scripted.requests
    assert request.messages == [{"role": "user", "content": "Hello"}]


def test_escape_stops_the_generation_in_the_service(
    chat: BrowserChat, scripted: ScriptedService, gateway: RunningGateway
) -> None:
    scripted.script = scripted.half
    chat.send("Hello")
    chat.wait_for_answer("Half an")
    assert scripted.running == 1
    chat.page.keyboard.press("Escape")
    chat.wait_for_status("Answer stopped.")
    until(lambda: scripted.running == 0, "the gateway cancels the request")
    assert 499 in [record.status for record in gateway.records]
    assert chat.turns() == [("Hello", "Half an")]
    assert chat.summary.endswith("stopped")
    scripted.resume.set()


def test_regenerating_and_editing_replace_an_answer_and_what_follows(
    chat: BrowserChat, scripted: ScriptedService
) -> None:
    chat.set(max_completion_tokens=2)
    chat.ask("One")
    chat.ask("Two")
    chat.click("Regenerate")
    chat.wait_for_answer("3:0 3:1")
    assert chat.turns() == [("One", "1:0 1:1"), ("Two", "3:0 3:1")]
    chat.ask("Three")
    assert [message["content"] for message in scripted.requests[-1].messages] == [
        *("One", "1:0 1:1 ", "Two", "3:0 3:1 ", "Three")
    ]
    chat.edit(2, "Zwei")
    chat.wait_for_answer("5:0 5:1")
    assert chat.turns() == [("One", "1:0 1:1"), ("Zwei", "5:0 5:1")]
    assert [message["content"] for message in scripted.requests[-1].messages] == ["One", "1:0 1:1 ", "Zwei"]


def test_a_new_answer_that_fails_before_its_first_word_replaces_nothing(
    chat: BrowserChat, scripted: ScriptedService
) -> None:
    chat.set(max_completion_tokens=1)
    chat.ask("One")
    chat.ask("Two")
    scripted.script = scripted.refuse
    chat.edit(1, "Eins")
    chat.alert.get_by_text("The question is refused. Ask another one.").wait_for()
    assert chat.turns() == [("One", "1:0"), ("Two", "2:0")]
    scripted.script = scripted.count_up
    chat.click("Retry")
    chat.wait_for_answer("4:0")
    assert chat.turns() == [("Eins", "4:0")] and not chat.alert.is_visible()


def test_the_settings_are_sent_and_wrong_ones_are_not(chat: BrowserChat, scripted: ScriptedService) -> None:
    chat.set(system="Be brief.", temperature="0.5", top_p="0.9", max_completion_tokens=2, seed=3, stop="END\n\nSTOP")
    chat.ask("Hello")
    (request,) = scripted.requests
    assert request.messages[0] == {"role": "system", "content": "Be brief."}
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (2, 0.5, 0.9, 3)
    assert request.stop == ["END", "STOP"]
    assert chat.summary.endswith("cut off at max_tokens")
    chat.set(temperature=3)
    chat.send("And you?")
    assert chat.page.get_by_role("dialog").is_visible() and chat.page.evaluate("document.activeElement.name") == (
        "temperature"
    )
    assert len(scripted.requests) == 1
    chat.click("Close")
    assert chat.entry.input_value() == "And you?"


def test_the_page_says_which_turns_were_dropped(chat: BrowserChat, scripted: ScriptedService) -> None:
    def script(request: Any) -> Any:
        yield from tokens("Hi")
        yield last("stop", dropped_turns=2)

    scripted.script = script
    chat.ask("Hello")
    assert chat.summary.endswith("without the oldest 2 turns, which did not fit the context window")


def test_copying_gives_the_text_as_the_model_wrote_it(chat: BrowserChat, scripted: ScriptedService) -> None:
    text = "**Bold**:\n\n```python\nif x:\n\tprint(1)\n```\n"
    say(scripted, text)
    chat.ask("Hello")
    assert chat.copied("Copy the answer") == text
    assert chat.copied("Copy the code") == "if x:\n\tprint(1)"


def test_the_answer_of_a_real_model_is_the_services(open_page: Opener, tiny_service: Any) -> None:
    expected = tiny_service.ask("Tell me everything.", max_tokens=30)
    with running_gateway(tiny_service.port) as gateway:
        chat = open_page(gateway)
        chat.set(max_completion_tokens=30)
        chat.ask("Tell me everything.")
        assert chat.copied("Copy the answer") == expected.text
        assert chat.summary.startswith("30 tokens, first after ")
        assert chat.page.locator("#model").inner_text() == tiny_service.info().model.rpartition("/")[2]


# ---- Failures


def test_a_failure_in_the_middle_keeps_the_text_and_can_be_asked_again(
    chat: BrowserChat, scripted: ScriptedService
) -> None:
    scripted.script = scripted.fail
    chat.ask("Hello")
    assert chat.turns() == [("Hello", "Half an")]
    assert chat.log.locator(".error").inner_text() == "The question is refused. Ask another one."
    assert chat.summary.endswith("failed")
    say(scripted, "Better")
    chat.click("Retry")
    chat.wait_for_answer("Better")
    assert [request.messages[-1]["content"] for request in scripted.requests] == ["Hello", "Hello"]


def test_while_the_service_is_away_the_page_says_so_and_tries_again(
    open_page: Opener, gateway: RunningGateway, scripted: ScriptedService
) -> None:
    hold(scripted)
    scripted.stop()
    chat = open_page(gateway)
    chat.alert.get_by_text("The service behind the gateway does not answer, or went away.").wait_for()
    scripted.start()
    chat.click("Retry")
    chat.page.locator("#model").get_by_text("scripted").wait_for()
    chat.send("Hello")
    chat.wait_for_answer("One two")
    scripted.stop()
    chat.wait_for_status("Answer failed.")
    assert chat.turns() == [("Hello", "One two")]
    assert chat.log.locator(".error").inner_text().startswith("The service behind the gateway does not answer")


def test_without_a_gateway_the_page_says_so(open_page: Opener, scripted: ScriptedService) -> None:
    with running_gateway(scripted.port) as gateway:
        chat = open_page(gateway)
        chat.page.locator("#model").get_by_text("scripted").wait_for()
    chat.ask("Hello")
    assert chat.log.locator(".error").inner_text() == (
        "The gateway does not answer. Check that it runs, and ask again."
    )


# ---- What is stored


def test_a_reload_brings_the_conversation_back(chat: BrowserChat, scripted: ScriptedService) -> None:
    chat.set(system="Be brief.", max_completion_tokens=2)
    chat.ask("One")
    hold(scripted)
    chat.send("Two")
    chat.wait_for_answer("One two")
    summary = chat.log.locator(".summary").first.inner_text()
    chat.page.reload()
    chat.wait_for_answer("One two")
    scripted.resume.set()
    assert chat.turns() == [("One", "1:0 1:1"), ("Two", "One two")]
    assert chat.log.locator(".summary").all_inner_texts()[0] == summary
    assert chat.summary.endswith("stopped")
    scripted.script = scripted.count_up
    chat.ask("Three")
    messages = scripted.requests[-1].messages
    assert [message["content"] for message in messages] == ["Be brief.", "One", "1:0 1:1 ", "Two", "One two", "Three"]


def test_conversations_are_kept_apart_until_they_are_deleted(chat: BrowserChat) -> None:
    chat.set(max_completion_tokens=1)
    chat.ask("One")
    chat.click("New")
    assert chat.turns() == []
    chat.ask("Two")
    choice = chat.page.get_by_label("Conversation", exact=True).and_(chat.page.get_by_role("combobox"))
    assert choice.locator("option").all_inner_texts() == ["Two", "One"]
    choice.select_option("One")
    chat.wait_for_answer("1:0")
    chat.page.once("dialog", lambda dialog: dialog.accept())
    chat.click("Settings")
    chat.click("Delete")
    chat.wait_for_answer("2:0")
    chat.page.reload()
    chat.wait_for_answer("2:0")
    assert choice.locator("option").all_inner_texts() == ["Two"]


@pytest.mark.parametrize("full", [True, False], ids=["full", "forbidden"])
def test_if_nothing_can_be_stored_the_page_says_so_and_works(
    open_page: Opener, gateway: RunningGateway, full: bool
) -> None:
    chat = open_page(gateway)
    if full:
        fill = "for (let size = 2 ** 22; size >= 1; size /= 2) for (;;) try { localStorage.setItem("
        chat.page.evaluate(fill + "'x' + Math.random(), 'x'.repeat(size)) } catch { break }")
    else:
        forbid = (
            "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('', 'SecurityError') }})"
        )
        chat.context.add_init_script(forbid)
        chat.page.reload()
    chat.set(max_completion_tokens=1)
    chat.ask("Hello")
    assert chat.turns() == [("Hello", "1:0")]
    says = "The browser's storage is full. Export this" if full else "The browser stores nothing for this page. Export"
    chat.alert.get_by_text(says).wait_for()


def test_python_reads_an_exported_conversation_and_the_page_a_saved_one(
    chat: BrowserChat, scripted: ScriptedService, tmp_path: Path
) -> None:
    chat.set(system="Sei kurz. 🦙", max_completion_tokens=2)
    chat.ask('Grüße\u2028 "quoted" \\ <b>')
    scripted.script = scripted.fail
    chat.ask("Two")
    chat.export(tmp_path / "exported.json")
    loaded = Conversation.load(tmp_path / "exported.json", port=scripted.port)
    assert loaded.system == "Sei kurz. 🦙"
    assert [(question, answer.text, answer.finish_reason, answer.error) for question, answer in loaded.turns] == [
        ('Grüße\u2028 "quoted" \\ <b>', "1:0 1:1 ", "length", None),
        ("Two", "Half an ", "error", "The question is refused. Ask another one."),
    ]
    loaded.save(tmp_path / "saved.json")
    assert (tmp_path / "saved.json").read_bytes() == (tmp_path / "exported.json").read_bytes()

    scripted.script = scripted.count_up
    loaded.ask("Three")
    loaded.save(tmp_path / "saved.json")
    chat.import_file(tmp_path / "saved.json")
    chat.wait_for_status("Conversation imported.")
    assert [question for question, _ in chat.turns()] == ['Grüße\u2028 "quoted" \\ <b>', "Two", "Three"]
    assert chat.log.locator(".error").nth(1).inner_text() == "The question is refused. Ask another one."
    chat.export(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "saved.json").read_bytes()


NO_CONVERSATIONS = {
    "{": "talk.json is not a JSON file. Choose a saved conversation.",
    "{}": "talk.json does not hold a conversation: It has no list of messages. Choose another file.",
    "null": "It has no list of messages.",
    '[{"role": "user"}]': "Message 1 has no text.",
    '[{"role": "assistant", "content": "x"}]': "Message 1 should be of the role user.",
    '[{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]': "Message 2 should be of the role",
    r'[{"role": "user", "content": "\ud83d"}]': "Message 1 is not valid Unicode.",
    "[" + " " * (8 * 2**20) + "]": "talk.json has more than 8 MiB. Choose a smaller file.",
}


def test_a_file_without_a_conversation_is_refused(chat: BrowserChat, tmp_path: Path) -> None:
    chat.set(max_completion_tokens=1)
    chat.ask("Hello")
    for content, says in NO_CONVERSATIONS.items():
        (tmp_path / "talk.json").write_text(content)
        chat.import_file(tmp_path / "talk.json")
        chat.alert.get_by_text(says).wait_for()
        assert chat.turns() == [("Hello", "1:0")]


def test_a_key_is_asked_for_and_stays_in_the_session(
    open_page: Opener, scripted: ScriptedService, tmp_path: Path
) -> None:
    with running_gateway(scripted.port, keys=[KEY]) as gateway:
        chat = open_page(gateway)
        field = chat.page.get_by_label("API key")
        field.fill("another-key-of-some-length")
        field.press("Enter")
        chat.alert.get_by_text("The API key is missing or wrong.").wait_for()
        field.fill(KEY)
        chat.click("Use this key")
        chat.page.locator("#model").get_by_text("scripted").wait_for()
        assert not field.is_visible()
        chat.set(max_completion_tokens=1)
        chat.ask("Hello")
        assert chat.turns() == [("Hello", "1:0")]
        assert KEY in chat.stored("sessionStorage") and KEY not in chat.stored() and KEY not in chat.page.url
        chat.export(tmp_path / "exported.json")
        assert KEY not in (tmp_path / "exported.json").read_text() + "".join(chat.requested)
        chat.page.reload()
        chat.page.locator("#model").get_by_text("scripted").wait_for()

        other_tab = chat.context.new_page()
        other_tab.goto(chat.address)
        other_tab.get_by_label("API key").wait_for()
        other_tab.close()

        chat.click("Settings")
        chat.click("Forget the key")
        field.wait_for()
        assert KEY not in chat.stored("sessionStorage")


# ---- What comes from the model


def test_nothing_that_a_model_says_runs_or_loads(chat: BrowserChat, scripted: ScriptedService) -> None:
    say(
        scripted,
        f"{HOSTILE}\n\n[w](https://example.org/w) [x](JavaScript:window.hacked=10) [y](data:text/html,hi) "
        "[z](java\tscript:window.hacked=11) [v](//example.org) ![i](https://example.org/leak.png)\n\n"
        "| a |\n|---|\n| ![t](https://example.org/leak.png) <img src=/leak.gif> |\n",
    )
    chat.ask(HOSTILE.replace("\n", " "))
    assert chat.log.locator("img, script, svg, style, h1, iframe, form, input, object, video").count() == 0
    links = chat.log.locator("a")
    assert set(links.evaluate_all("links => links.map(link => link.href)")) == {
        "https://example.org/",
        "https://example.org/w",
    }
    assert set(links.evaluate_all("links => links.map(link => `${link.target} ${link.rel}`)")) == {
        "_blank noopener noreferrer nofollow"
    }
    text = chat.log.inner_text()
    for shown in ("<script>window.hacked = 1</script>", "[x](JavaScript:", "![i](https://example.org/leak.png)"):
        assert shown in text
    assert chat.page.evaluate("() => window.hacked ?? null") is None
    assert not [url for url in chat.requested if "leak" in url or "example" in url]
    refused = "() => { try { document.body.innerHTML = '<b>'; return false } catch { return true } }"
    assert chat.page.evaluate(refused), "the browser lets a script make HTML of text"
    chat.problems.clear()  # the browser reports that


@pytest.fixture(scope="module")
def reading(chromium: Any) -> Iterator[BrowserChat]:
    """A page whose scripts the tests of Markdown call."""
    with ScriptedService() as service, running_gateway(service.port) as gateway:
        chat = BrowserChat(chromium, gateway.root)
        yield chat
        chat.close()


def link(address: str, text: str) -> str:
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{text}</a>'


RULES = {
    "a\nb  \nc": "<p>a<br>b<br>c</p>",
    "# A *b* #\n###### c": "<h3>A <em>b</em></h3><h6>c</h6>",
    "**a** __b__ *c* _d_": "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em></p>",
    "***a*** ~~b~~ ~c~": "<p><em><strong>a</strong></em> <s>b</s> ~c~</p>",
    "a_b_c 2 * 3 * 4 **a": "<p>a_b_c 2 * 3 * 4 **a</p>",
    "*a **b** c*": "<p><em>a <strong>b</strong> c</em></p>",
    r"\*a\* `` `b` `` `c": "<p>*a* <code>`b`</code> `c</p>",
    "`a*b`*c*": "<p><code>a*b</code><em>c</em></p>",
    "---\n* * *": "<hr><hr>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "- a\n  - b\n- c\n\n  d": "<ul><li>a<ul><li>b</li></ul></li><li>c<p>d</p></li></ul>",
    "3. a\n   b\n4. c\n- d": '<ol start="3"><li>a<br>b</li><li>c</li></ol><ul><li>d</li></ul>',
    "a\n- b\n\nc 1986. d\n1986. e": "<p>a</p><ul><li>b</li></ul><p>c 1986. d<br>1986. e</p>",
    "1. a\n\t- b": "<ol><li>a<ul><li>b</li></ul></li></ol>",
    "|a|b|\n|:-:|--:|\n|1|`x\\|y`|\n|1|2|3|": (
        '<div class="table"><table><thead><tr><th class="center">a</th><th class="end">b</th></tr></thead><tbody>'
        '<tr><td class="center">1</td><td class="end"><code>x|y</code></td></tr>'
        '<tr><td class="center">1</td><td class="end">2 | 3</td></tr></tbody></table></div>'
    ),
    r"\(a*b*c\) $a_b_$, $5 and *$6*": r"<p>\(a*b*c\) $a_b_$, $5 and <em>$6</em></p>",
    "\\[\na_1\n- b_2\n\\]\nc": "<p>\\[<br>a_1<br>- b_2<br>\\]</p><p>c</p>",
    "(see https://a.b/c_(d)).": f"<p>(see {link('https://a.b/c_(d)', 'https://a.b/c_(d)')}).</p>",
    "<https://a.b> xhttp://c.d": f"<p>{link('https://a.b/', 'https://a.b')} xhttp://c.d</p>",
    "[a*b*](http://c.d) [g](<http://h.i>)": f"<p>{link('http://c.d/', 'a<em>b</em>')} {link('http://h.i/', 'g')}</p>",
    "[a](ftp://f) [https://g.h](http://i.j)": f"<p>[a](ftp://f) {link('http://i.j/', 'https://g.h')}</p>",
    "<b>&amp;</b>": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
}
"""Markdown → HTML, without the directions of texts."""


@pytest.mark.parametrize("text", RULES)
def test_markdown_becomes_these_elements_at_once_and_while_it_grows(reading: BrowserChat, text: str) -> None:
    assert reading.page.evaluate(RENDERED, text) == [RULES[text]] * 2


@pytest.mark.parametrize(
    "text",
    [
        "> " * 3000,
        "- " * 3000,
        "**a " * 3000,
        "[" * 3000 + "a](b)",
        "*_" * 3000,
        "`" * 3000,
        "![](" * 3000,
        "\n" * 9000,
    ],
    ids=lambda text: text[:4],
)
def test_a_text_that_never_ends_its_marks_is_shown(reading: BrowserChat, text: str) -> None:
    depth = """async text => {
        const {MarkdownView} = await import(new URL("page/markdown.js", location));
        const element = document.createElement("div");
        new MarkdownView(element).update(`x ${text}\\n\\n${text}`);
        const depthOf = node => 1 + Math.max(0, ...[...node.children].map(depthOf));
        return [element.textContent.startsWith("x"), depthOf(element)];
    }"""
    has_text, depth_reached = reading.page.evaluate(depth, text)
    assert has_text and depth_reached < 50


# ---- How it can be used


def test_it_works_mounted_in_another_app(open_page: Opener, scripted: ScriptedService) -> None:
    with running_gateway(scripted.port, mounted_at="/llm", keys=[KEY]) as gateway:
        chat = open_page(gateway, "/llm")
        chat.page.get_by_label("API key").fill(KEY)
        chat.click("Use this key")
        chat.set(max_completion_tokens=1)
        chat.ask("Hello")
        assert chat.turns() == [("Hello", "1:0")]
        assert all(url.startswith(f"{gateway.root}/llm") for url in chat.requested)


def test_everything_can_be_done_with_the_keyboard(chat: BrowserChat, scripted: ScriptedService) -> None:
    keyboard = chat.page.keyboard

    def tab_to(label: str, key: str = "Tab") -> None:
        """Press Tab until a control has the focus, and can be seen to have it."""
        for _ in range(30):
            keyboard.press(key)
            name, outline = chat.page.evaluate(
                "() => { const {activeElement: one} = document;"
                " return [one.ariaLabel || one.labels?.[0]?.textContent.trim() || one.textContent,"
                " getComputedStyle(one).outlineStyle] }"
            )
            if name.startswith(label):
                assert outline != "none", name
                return
        raise AssertionError(f"Tab never reaches {label}")

    tab_to("Settings", "Shift+Tab")
    keyboard.press("Enter")
    tab_to("Max tokens")
    keyboard.type("2")
    keyboard.press("Escape")
    tab_to("Message")
    keyboard.type("One")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    chat.wait_for_answer("1:0 1:1")
    assert chat.turns()[0][0] == "One\ntwo"
    chat.wait_for_end()
    tab_to("Edit question 1", "Shift+Tab")
    keyboard.press("Enter")
    keyboard.press("Escape")
    assert chat.page.evaluate("document.activeElement.ariaLabel") == "Edit question 1"
    keyboard.press("Enter")
    keyboard.press("Control+A")
    keyboard.type("Three")
    keyboard.press("Enter")
    chat.wait_for_answer("2:0 2:1")
    chat.wait_for_end()
    assert chat.page.evaluate("document.activeElement.id") == "entry"
    tab_to("Regenerate", "Shift+Tab")
    keyboard.press("Enter")
    chat.wait_for_answer("3:0 3:1")
    chat.wait_for_end()
    tab_to("Copy the answer", "Shift+Tab")
    keyboard.press("Enter")
    chat.button("Copied").wait_for()
    tab_to("New", "Shift+Tab")
    keyboard.press("Enter")
    until(lambda: chat.turns() == [], "a new conversation")
    scripted.script = scripted.half
    keyboard.type("Four")
    keyboard.press("Enter")
    chat.wait_for_answer("Half an")
    tab_to("Stop")
    keyboard.press("Enter")
    chat.wait_for_status("Answer stopped.")
    until(lambda: chat.page.evaluate("document.activeElement.id") == "entry", "the entry has the focus")
    scripted.resume.set()


def test_a_screen_reader_hears_the_end_of_an_answer_and_not_each_token(chat: BrowserChat) -> None:
    chat.page.evaluate("""() => {
        window.heard = [];
        const status = document.querySelector("[role=status]");
        const listen = () => heard.at(-1) === status.textContent || heard.push(status.textContent);
        new MutationObserver(listen).observe(status, {childList: true, subtree: true, characterData: true});
    }""")
    chat.set(max_completion_tokens=50)
    chat.ask("Hello")
    assert chat.page.evaluate("heard.filter(Boolean)") == [
        "Waiting for the first word …",
        "Answering …",
        "Answer cut off at max_tokens.",
    ]
    assert chat.page.locator("[aria-live], [role=log]").count() == 0
    for role, name in (("banner", ""), ("main", "Conversation"), ("navigation", "Conversations"), ("contentinfo", "")):
        assert chat.page.get_by_role(role, name=name).count() == 1
    assert chat.page.get_by_role("article", name="Turn 1").get_by_role("heading").all_inner_texts() == ["You", "Model"]


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_every_text_can_be_read_and_nothing_is_wider_than_a_phone(
    open_page: Opener, gateway: RunningGateway, scripted: ScriptedService, color_scheme: str
) -> None:
    chat = open_page(gateway, color_scheme=color_scheme, viewport={"width": 360, "height": 640})
    row = "| " + " | ".join(["a long cell"] * 9) + " |"
    code = "# " + "x" * 300
    say(scripted, f"{'w' * 300} [a](https://b.c) `code`\n\n> quote\n\n{row}\n{'|-' * 9}|\n{row}\n\n```sh\n{code}\n```")
    chat.ask("q" * 300)
    scripted.script = scripted.fail
    chat.ask("Fail.")
    count, contrast, text = chat.page.evaluate(LOWEST_CONTRAST)
    assert count > 20 and contrast >= 4.5, text
    widths = "() => [document.documentElement, document.querySelector('main')].map(one => one.scrollWidth)"
    assert chat.page.evaluate(widths) == [360, 360]
    chat.click("Settings")
    count, contrast, text = chat.page.evaluate(LOWEST_CONTRAST)
    assert count > 30 and contrast >= 4.5, text
    other = {"light": "dark", "dark": "light"}[color_scheme]
    before = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
    chat.page.get_by_label("Theme").select_option(other)
    assert chat.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    chat.page.reload()
    assert chat.page.evaluate("document.documentElement.dataset.theme") == other


def test_the_page_follows_an_answer_unless_the_user_has_scrolled_up(
    chat: BrowserChat, scripted: ScriptedService
) -> None:
    lines = "".join(f"line {number}\n\n" for number in range(60))
    hold(scripted, lines, lines + "end")
    chat.send("Hello")
    below = "main => main.scrollHeight - main.scrollTop - main.clientHeight"
    main = chat.page.get_by_role("main")
    until(lambda: len(chat.turns()[0][1]) > 400 and main.evaluate(below) < 2, "the end is in sight")
    main.hover()
    chat.page.mouse.wheel(0, -300)
    until(lambda: main.evaluate(below) > 200, "the page is scrolled up")
    top = main.evaluate("main => main.scrollTop")
    scripted.resume.set()
    chat.wait_for_end()
    assert main.evaluate("main => main.scrollTop") == top
    hold(scripted, lines, lines)
    chat.send("And you?")
    until(lambda: len(chat.turns()) == 2 and main.evaluate(below) < 2, "the end is in sight")
    scripted.resume.set()
    chat.wait_for_end()
    until(lambda: main.evaluate(below) < 2, "the end is in sight")
