"""The chat box: its widgets in this process, and then in a real JupyterLab, in a browser, with keys and clicks."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import INSTALL, MINUTE, ROOT, JupyterLab, run_all_cells, shut_down, take_pictures, wait_for_kernel

import helpers
from helpers.client import Conversation
from helpers.errors import InvalidRequest
from helpers.processes import port_to_listen_on

nbformat = pytest.importorskip("nbformat", reason=INSTALL)
pytest.importorskip("ipywidgets", reason=INSTALL)

LONG = "Tell me a long story about a lighthouse."

NASTY = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\n\n"
    '<svg onload="window.hacked = 3"></svg> [a](javascript:window.hacked=4) <https://example.org> https://example.org\n\n'
    "![b](/leak.png) <style onload='window.hacked = 5'>* { display: none }</style> \"' onfocus='window.hacked = 6' autofocus='\n\n"
    "</textarea></div></div><h1 onclick='window.hacked = 7'>c</h1> [d]\n\n[d]: /leak.html\n\n"
    "$\\href{https://example.org/leak}{x}$ costs $5 or $6\n\n"
    "```html\n<script>window.hacked = 8</script>\n```\n\n```<b onclick='window.hacked = 9'>\n<i>e</i>\n```"
)


def shown(box: Any) -> list[str]:
    return [page.value for page in box._log.children]


def test_what_is_said_in_the_box_is_in_the_conversation(tiny_service: Any) -> None:
    talk = tiny_service.conversation("Be brief.", max_tokens=5)
    first = talk.ask("Hello")
    box = helpers.ChatBox(talk)
    box.send("And you?")
    box.wait()
    assert [turn.question for turn in talk.turns] == ["Hello", "And you?"]
    assert f'data-copy="{html.escape(first)}"' in shown(box)[0]
    assert len(shown(box)) == 2
    assert repr(box) == "<ChatBox, turns: 2>"
    talk.undo()
    box.send("Why?")
    box.wait()
    assert [">And you?<" in page for page in shown(box)] == [False, False]


def test_no_answer_of_a_model_runs_or_loads_anything(tmp_path: Path) -> None:
    from html.parser import HTMLParser

    class Elements(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags, self.attributes, self.copied = set(), set(), ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.attributes.update(name for name, _ in attrs)
            self.copied = dict(attrs).get("data-copy") or self.copied

    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY}]))
    box = helpers.ChatBox(Conversation.load(file))
    box._draw()
    elements = Elements()
    elements.feed(shown(box)[0])
    assert elements.tags <= {"div", "span", "b", "p", "br", "pre", "code", "button"}
    assert elements.attributes <= {"class", "type", "data-copy", "role", "aria-label"}
    assert elements.copied == NASTY


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("**a** *b* `c < d`", "<p><strong>a</strong> <em>b</em> <code>c &lt; d</code></p>"),
        ("1. a\n2. b", "<ol>\n<li>a</li>\n<li>b</li>\n</ol>"),
        ("one\ntwo", "<p>one<br />\ntwo</p>"),
        ("one\n-", "<p>one<br />\n-</p>"),
        ("|a|\n|-|\n|b|", "<td>b</td>"),
        ("```python\nreturn 1", '<span class="k">return</span>'),
        ("```\n1 < 2", "<pre><code>1 &lt; 2</code></pre>"),
        ("```klingon\n1 < 2", '<pre><code class="language-klingon">1 &lt; 2</code></pre>'),
    ],
)
def test_markdown_is_shown_as_such_also_while_it_is_incomplete(markdown: str, expected: str) -> None:
    from helpers.chat_box import _MARKDOWN

    assert expected in _MARKDOWN.render(markdown)


def test_a_refused_question_is_told_in_its_place_and_can_be_edited(tiny_service: Any) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5))
    box._text.value = "What is [INST]?"
    box._send.click()
    box.wait()
    assert "InvalidRequest: Message 1 (user) holds" in shown(box)[0]
    assert (box._repeat.description, box._text.value) == ("Retry", "")
    box._text.value = "a draft"
    box._edit.click()
    assert box._text.value == "What is [INST]?"
    box._text.value = "Hello\x1e"  # as Enter in the page does
    box.wait()
    assert [turn.question for turn in box.talk.turns] == ["Hello"]
    assert (box._repeat.description, box._text.value) == ("Regenerate", "a draft")


def test_what_a_cell_changes_is_shown_with_the_next_drawing(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=5)
    box = helpers.ChatBox(talk)
    talk.system = "Be kind."
    talk.options |= {"temperature": 0.5, "max_tokens": 7}
    box.send("Hello")
    box.wait()
    assert [field.value for field in box._settings.values()] == ["Be kind.", 0.5, 7]
    box._settings["system"].value = ""
    assert talk.system is None
    talk.options["temperature"] = 5.0  # which the field cannot show, and the service refuses
    box.send("Hello")
    box.wait()
    assert (talk.options["temperature"], "temperature is 5" in shown(box)[1]) == (5.0, True)
    talk.undo()
    talk.options["temperature"] = 0.5
    box._settings["max_tokens"].value = 3
    box.send("And you?")
    box.wait()
    assert [turn.answer.completion_tokens for turn in talk.turns] == [7, 3]


@pytest.mark.parametrize("keep_partial", [True, False])
def test_what_comes_to_nothing_leaves_screen_and_words_as_they_were(tiny_service: Any, keep_partial: bool) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5, keep_partial=keep_partial))
    box.send("Hello")
    box.wait()
    before = shown(box)
    box._text.value = "a draft"
    box._edit.click()
    box._text.value = "What is [INST]?\x1e"
    box.wait()
    assert (shown(box), len(box.talk.turns)) == (before, 1)
    assert "prompt injection" in box._status.value
    box._edit.click()
    assert box._text.value == "What is [INST]?"  # to be mended, still as an edit
    box._text.value = "What is INST?\x1e"
    box.wait()
    assert [turn.question for turn in box.talk.turns] == ["What is INST?"]
    assert box._text.value == "a draft"
    box._text.value = "What is <s>?\x1e"
    box.wait()
    box._text.value = "a draft"
    assert (box._text.value, len(box.talk.turns)) == ("a draft", 2 if keep_partial else 1)
    box._edit.click()
    assert box._text.value == "What is <s>?"
    box._text.value = "Who?\x1e"
    box.wait()
    assert ([turn.question for turn in box.talk.turns], box._text.value) == (["What is INST?", "Who?"], "a draft")
    before = shown(box)
    box.talk.options["port"] = port_to_listen_on("127.0.0.1", 0)
    box._repeat.click()
    box.wait()
    assert shown(box) == before and box._repeat.description == "Retry"
    box.talk.options["port"] = tiny_service.port
    box._repeat.click()
    box.wait()
    assert box._repeat.description == "Regenerate"
    while box.talk.turns[-1].question != "Hello":
        box._undo.click()
    assert len(shown(box)) == len(box.talk.turns) == 1


def test_what_was_cancelled_is_not_tried_again(tiny_service: Any) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5))
    box.send("Hello")
    box.wait()
    for give_up in (box._cancel, box._undo):
        box._edit.click()
        box._text.value = "What is [INST]?\x1e"
        box.wait()
        assert box._repeat.description == "Retry"
        if give_up is box._cancel:
            box._edit.click()
        give_up.click()
        assert (box._repeat.description, "injection" in box._status.value) == ("Regenerate", False)
    assert box._status.value == "Nothing has been said yet."


def test_an_edit_is_of_the_turn_that_it_began_with(tiny_service: Any) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5))
    box.send("Hello")
    box.wait()
    box._edit.click()
    box.talk.ask("And you?")
    box._text.value = "Good day\x1e"
    box.wait()
    assert [turn.question for turn in box.talk.turns] == ["Good day"]
    box._edit.click()
    box.talk.undo()
    box._text.value = "Good night\x1e"
    box.wait()
    assert [turn.question for turn in box.talk.turns] == ["Hello", "And you?"]
    assert "no longer there" in box._status.value and box._text.value == "Good night"


def test_an_answer_that_is_read_elsewhere_is_shown_and_can_be_stopped(service: Any, monkeypatch: Any) -> None:
    from helpers import chat_box

    monkeypatch.setattr(chat_box, "display", lambda *_, **__: None)  # it would print what a notebook is sent
    talk = service.conversation(max_tokens=400)
    first, second = helpers.ChatBox(talk), helpers.ChatBox(talk)
    first.send(LONG)
    while not talk.answer.text:
        pass
    second._ipython_display_()
    assert second._status.value == "Answering …" and second._stop.layout.display is None
    second._stop.click()
    for box in (first, second):
        box.wait()
        assert box._status.value == "Answer stopped."
        assert html.escape(talk.answer.text) in shown(box)[0]


def test_a_box_whose_answer_is_ended_by_another_can_go_on(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=100)
    first, second = helpers.ChatBox(talk), helpers.ChatBox(talk)
    for _ in range(10):
        first.send("Hello")
        second.send("And you?")
        second.wait()
        first.wait()
        assert first._send.layout.display is second._send.layout.display is None
        assert (first._stop.layout.display, second._stop.layout.display) == ("none", "none")
    assert len(talk.turns) == len(shown(second)) == 20


@pytest.mark.parametrize("keep_partial", [True, False])
def test_a_question_right_behind_a_stop_is_answered(tiny_service: Any, keep_partial: bool) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5, keep_partial=keep_partial))
    box.send("Hello")
    box.wait()
    box.talk.options["max_tokens"] = 400
    for number in range(1, 6):
        box._repeat.click()
        box.stop()
        box.send(f"Question {number}")
        box.stop()
    box.talk.options["max_tokens"] = 5
    box.send("And you?")
    box.wait()
    assert (box._trouble, box.talk.turns[-1].question) == ("", "And you?")
    assert box.talk.turns[-1].answer.finish_reason == "length"
    if not keep_partial:
        assert [turn.question for turn in box.talk.turns] == ["Hello", "And you?"]


def test_words_stay_however_deeply_they_are_nested_and_code_as_it_is() -> None:
    from helpers.chat_box import _MARKDOWN

    deep = "".join("  " * level + f"- level {level}\n" for level in range(14))
    assert "level 13" in _MARKDOWN.render(deep)
    assert "<code class=\"language-systemd\">" in _MARKDOWN.render("```systemd\n" + " " * 2000 + "x\n```")
    assert "\n\n<span" in _MARKDOWN.render("```python\n\n\nreturn 1\n```")


def test_an_edit_that_is_given_up_changes_nothing(tiny_service: Any) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5))
    box.send("Hello")
    box.wait()
    box._text.value = "a draft"
    box._edit.click()
    box._cancel.click()
    assert (box._text.value, len(box.talk.turns)) == ("a draft", 1)


def test_without_a_service_nothing_is_lost_and_a_retry_goes_on(tiny_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    box = helpers.ChatBox(Conversation(port=port, max_tokens=5))
    box.send("Hello")
    box.wait()
    assert "ServiceUnavailable: The service at" in shown(box)[0]
    with helpers.serve(str(tiny_folder), port=port):
        box._repeat.click()
        box.wait()
        whole = box.talk.turns[0].answer.text
        assert whole and "ServiceUnavailable" not in shown(box)[0]
    box._repeat.click()
    box.wait()
    assert box.talk.turns[0].answer.text == whole
    assert "ServiceUnavailable: The service at" in box._status.value
    assert box._repeat.description == "Retry"


def test_what_is_no_text_is_refused_and_what_was_typed_stays(tiny_service: Any) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5))
    with pytest.raises(InvalidRequest, match="surrogate"):
        box.send("\ud83d")
    box._text.value = "\ud83d"
    box._send.click()
    assert "surrogate" in box._status.value
    assert (box._text.value, box.talk.turns) == ("\ud83d", [])
    box._text.value = "Hello"
    box._send.click()
    box.wait()
    assert len(box.talk.turns) == 1


def test_empty_questions_are_not_asked(tiny_service: Any) -> None:
    box = helpers.ChatBox(tiny_service.conversation(max_tokens=5))
    for text in ("", "  \n ", "\x1e", " \x1e"):
        box._text.value = text
        box._send.click()
        box.wait()
    assert box.talk.turns == []


def test_a_second_question_stops_the_first_answer(service: Any) -> None:
    box = helpers.ChatBox(service.conversation(max_tokens=400))
    box.send(LONG)
    box.send("What is the capital of France?")
    box.wait()
    assert [turn.answer.finish_reason == "cancelled" for turn in box.talk.turns] == [True, False]
    assert "Paris" in shown(box)[1]


# ---- In a browser ----

IN_KERNEL = """async code => {
    const {kernel} = jupyterapp.shell.currentWidget.sessionContext.session;
    const future = kernel.requestExecute({code, store_history: false});
    let text = "";
    future.onIOPub = ({content}) => text += content.text ?? content.traceback?.join("\\n") ?? "";
    await future.done;
    return text.trim();
}"""


ON_SCREEN = """root => [...root.querySelectorAll(".helpers-chat-turn")].map(turn => ["question", "answer"].map(part => {
    const element = turn.querySelector(".helpers-chat-" + part).cloneNode(true);
    element.querySelector(".helpers-chat-who").remove();
    return element.textContent.trim();
}))"""


class Chat:
    """A notebook with a chat box, `name` in the kernel, as a person sees it."""

    def __init__(self, page: Any, name: str = "box", number: int = 0) -> None:
        self.page, self.name = page, name
        self.root = page.locator(".helpers-chat[data-ready]").nth(number)
        self.root.wait_for(timeout=2 * MINUTE)
        self.text = self.root.get_by_label("Message")
        self.status = self.root.get_by_role("status")

    def click(self, button: str) -> None:
        self.root.get_by_role("button", name=button, exact=True).click()

    def ask(self, question: str) -> None:
        """Type, and press Enter; until the kernel has taken it."""
        self.text.fill(question)
        self.text.press("Enter")
        self.page.wait_for_function(
            "([text, question]) => !text.value.includes(question)", arg=[self.text.element_handle(), question]
        )

    def wait(self, status: str | re.Pattern[str] = re.compile("^Answer |ServiceUnavailable")) -> None:
        """Until the box says so; at first until an answer has ended."""
        self.status.get_by_text(status).wait_for(timeout=2 * MINUTE)

    def wait_for_words(self, turn: int = 0, count: int = 5) -> None:
        """Until the answer of the turn has more words."""
        self.page.wait_for_function(
            "([root, turn, count]) => "
            "root.querySelectorAll('.helpers-chat-answer')[turn]?.innerText.split(/\\s+/).length > count",
            arg=[self.root.element_handle(), turn, count],
            timeout=MINUTE,
        )

    def python(self, code: str) -> Any:
        """The value of an expression in the notebook's kernel, by way of JSON."""
        said = self.page.evaluate(IN_KERNEL, f"import json; print(json.dumps({code}))")
        try:
            return json.loads(said)
        except ValueError:
            raise AssertionError(said) from None

    def in_object(self) -> list[list[str | None]]:
        return self.python(
            f"[[t.question, t.answer.text, t.answer.finish_reason] for t in {self.name}.talk.turns]"
        )

    def save_and_reload(self) -> Chat:
        """The same box in the page loaded anew."""
        self.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        self.page.reload()
        wait_for_kernel(self.page)
        return Chat(self.page, self.name)

    def on_screen(self) -> list[tuple[str, str]]:
        """Questions and answers, as they can be read."""
        return [tuple(turn) for turn in self.root.evaluate(ON_SCREEN)]


def words(text: str) -> list[str]:
    """The words alone, as Markdown's signs and line breaks are not to be seen."""
    return re.findall(r"\w+", text)


@pytest.fixture
def chat(jupyterlab: JupyterLab) -> Iterator[Callable[..., Chat]]:
    """Open a notebook with these cells, by default one with a chat box, and run them."""
    pages = []

    def start(*cells: str, port: int, **options: Any) -> Chat:
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
        cells = cells or (f"import helpers\nbox = helpers.ChatBox(helpers.Conversation(port={port}, {words}))\nbox",)
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        page = jupyterlab.open(f"chat-{len(pages)}.ipynb", notebook)
        pages.append(page)
        run_all_cells(page)
        return Chat(page)

    yield start
    for page in pages:
        shut_down(page)


def test_enter_sends_and_shift_enter_begins_a_line(chat: Any, tiny_service: Any) -> None:
    box = chat(port=tiny_service.port, max_tokens=5)
    box.text.click()
    box.text.press("Enter")
    box.text.type("Hello")
    box.text.press("Shift+Enter")
    box.text.type("you")
    assert box.text.input_value() == "Hello\nyou"
    box.text.press("Enter")
    box.wait()
    assert box.text.input_value() == ""
    assert [question for question, *_ in box.in_object()] == ["Hello\nyou"]
    assert [question for question, _ in box.on_screen()] == ["Hello\nyou"]
    assert box.text.evaluate("text => document.activeElement === text")
    note = box.root.locator(".helpers-chat-note").inner_text()
    assert re.match(r"5 tokens, first after \d+\.\d\d s, [\d.]+ tokens/s, cut off at the limit of tokens", note)
    assert box.page.evaluate("() => jupyterapp.shell.currentWidget.content.widgets.length") == 1


def test_stop_ends_the_generation_within_a_step_and_the_talk_goes_on(chat: Any, service: Any) -> None:
    box = chat(port=service.port, max_tokens=400)
    for turn, stop in enumerate([lambda: box.click("Stop"), lambda: box.text.press("Escape")]):
        before = service.info().steps
        box.ask(LONG)
        box.wait_for_words(turn)
        stop()
        box.wait("Answer stopped.")
        while service.info().live:
            pass
        tokens = box.python("box.talk.answer.completion_tokens")
        # one step for the prompt, at most one that was under way, and a token that nobody has taken from the wire
        assert 5 <= tokens < 400 and service.info().steps - before <= tokens + 2
        assert box.root.get_by_role("button", name="Send").is_visible()
        assert not box.root.get_by_role("button", name="Stop").is_visible()
    box.ask("What is the capital of France?")
    box.wait("Answer complete.")
    assert [reason for *_, reason in box.in_object()] == ["cancelled", "cancelled", "stop"]


def test_regenerate_edit_copy_settings_and_examples(chat: Any, tiny_service: Any, jupyterlab: JupyterLab) -> None:
    cell = (
        f"import helpers\nbox = helpers.ChatBox(helpers.Conversation(port={tiny_service.port}, max_tokens=5), "
        "examples=['Hello', 'And you?'])\nbox"
    )
    box = chat(cell, port=tiny_service.port)
    box.click("And you?")
    box.wait()
    (old,) = box.in_object()
    assert not box.root.get_by_role("button", name="Hello").is_visible()

    jupyterlab.browser.grant_permissions(["clipboard-read", "clipboard-write"])
    box.click("Copy the answer")
    box.root.get_by_text("Copied").wait_for()
    assert box.page.evaluate("() => navigator.clipboard.readText()") == old[1]
    box.root.locator(".helpers-chat-answer").click()
    box.page.keyboard.type("ddb")  # which would delete and insert cells, were it for the notebook
    assert box.page.evaluate("() => jupyterapp.shell.currentWidget.content.widgets.length") == 1

    box.click("Settings")
    for label, value in (("System prompt", "Be brief."), ("Temperature", "1.5"), ("Max tokens", "9")):
        box.root.get_by_label(label).fill(value)
        box.root.get_by_label(label).press("Tab")
    box.click("Settings")
    box.root.get_by_label("Temperature").wait_for(state="hidden")
    box.click("Regenerate")
    box.root.get_by_text("9 tokens, first after").wait_for()
    ((question, text, _),) = box.in_object()
    assert (question, box.python("box.talk.answer.completion_tokens")) == ("And you?", 9)
    assert text != old[1]
    assert box.python("[box.talk.system, box.talk.options['temperature']]") == ["Be brief.", 1.5]

    box.text.fill("a draft")
    box.click("Edit question")
    box.wait(re.compile("is being edited"))
    assert (box.text.input_value(), box.text.evaluate("e => document.activeElement === e")) == ("And you?", True)
    box.text.press("Escape")
    box.root.get_by_role("button", name="Cancel").wait_for(state="hidden")
    assert box.text.input_value() == "a draft"
    box.click("Edit question")
    box.wait(re.compile("is being edited"))
    box.ask("Why?")
    box.wait()
    assert [question for question, *_ in box.in_object()] == ["Why?"]
    assert [question for question, _ in box.on_screen()] == ["Why?"]
    assert box.text.input_value() == "a draft"


def test_two_boxes_do_not_disturb_each_other_and_the_kernel_is_free(chat: Any, service: Any) -> None:
    new = f"helpers.ChatBox(helpers.Conversation(port={service.port}, max_tokens=400))"
    one = chat("import helpers", f"one = {new}\none", f"two = {new}\ntwo", port=service.port)
    two = Chat(one.page, "two", 1)
    one.name = "one"
    one.ask(LONG)
    two.ask("Tell me a long story about a ship.")
    one.wait_for_words()
    two.wait_for_words()
    assert one.python("1 + 1") == 2
    one.text.fill("a draft")
    two.text.press("Escape")
    two.wait("Answer stopped.")
    assert one.root.get_by_role("button", name="Stop").is_visible()
    one.click("Stop")
    one.wait("Answer stopped.")
    assert one.text.input_value() == "a draft"
    ((asked, text, _),), ((asked_other, other, _),) = one.in_object(), two.in_object()
    assert (asked, asked_other) == (LONG, "Tell me a long story about a ship.")
    assert words(one.on_screen()[0][1]) == words(text) and words(two.on_screen()[0][1]) == words(other)


def test_a_busy_kernel_does_not_hold_up_an_answer(chat: Any, service: Any, jupyterlab: JupyterLab) -> None:
    box = chat(port=service.port, max_tokens=60)
    box.ask(LONG)
    box.wait_for_words()
    gate = jupyterlab.folder / "gate"
    busy = "import pathlib, time\nwhile not pathlib.Path('gate').exists(): time.sleep(0.05)"
    box.page.evaluate(
        "code => { jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}) }", busy
    )
    box.root.get_by_role("button", name="Stop").focus()
    box.wait("Answer cut off at the limit of tokens.")
    box.page.wait_for_function("text => document.activeElement === text", arg=box.text.element_handle())
    gate.touch()
    assert len(box.in_object()) == 1


def test_nothing_that_a_model_says_runs_or_loads(chat: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY}]
    (tmp_path / "talk.json").write_text(json.dumps(messages))
    cell = f"import helpers\nbox = helpers.ChatBox(helpers.Conversation.load({str(tmp_path / 'talk.json')!r}))\nbox"
    box = chat(cell, port=1)
    requested: list[str] = []
    box.page.on("request", lambda request: requested.append(request.url))
    log = box.root.get_by_role("region", name="Conversation")
    log.hover()
    log.locator(".helpers-chat-answer").click()
    assert log.locator("a, img, script, svg, h1, iframe, form, input").count() == 0
    assert log.locator("button").count() == 1
    assert box.page.evaluate("() => window.hacked ?? null") is None
    assert not [url for url in requested if "leak" in url or "example" in url]
    assert "<script>window.hacked = 1</script>" in box.on_screen()[0][1]
    saved = box.page.locator(".helpers-chat-saved")
    assert "$5 or $6" in saved.text_content()
    assert saved.locator("a, img, script, svg, h1, mjx-container").count() == 0


def test_a_long_answer_does_not_pull_a_reader_away(chat: Any, tiny_service: Any) -> None:
    box = chat(port=tiny_service.port, max_tokens=450)
    log = box.root.get_by_role("region", name="Conversation")
    place = "log => [log.scrollTop, log.scrollHeight - log.scrollTop - log.clientHeight]"

    def wait_for(condition: str, *values: float) -> None:
        box.page.wait_for_function(f"([log, value]) => {condition}", arg=[log.element_handle(), *values])

    for _ in range(2):
        box.ask("Hello")
        box.wait()
    at_end, left = log.evaluate(place)
    assert at_end > 0 and left < 2
    log.hover()
    box.page.mouse.wheel(0, -200)
    wait_for("log.scrollTop < value", at_end)
    here, left = log.evaluate(place)
    box.page.evaluate(IN_KERNEL, "box.send('Hello'); box.wait()")
    box.page.evaluate(IN_KERNEL, "box.send('Hello')")
    box.click("Stop")
    box.wait("Answer stopped.")
    wait_for("log.scrollHeight - log.scrollTop - log.clientHeight > value + 100", left)
    assert log.evaluate(place)[0] == here
    log.focus()
    box.page.keyboard.press("End")
    wait_for("log.scrollHeight - log.scrollTop - log.clientHeight < 2", 0)
    at_end, _ = log.evaluate(place)
    box.page.evaluate(IN_KERNEL, "box.send('Hello'); box.wait()")
    wait_for("log.scrollTop > value + 100 && log.scrollHeight - log.scrollTop - log.clientHeight < 2", at_end)


def test_a_killed_service_is_told_and_after_its_return_the_talk_goes_on(chat: Any, embedded: Any) -> None:
    with helpers.serve("smollm2", port=0) as first:
        box = chat(port=first.port, max_tokens=400)
        box.ask("What is the capital of France?")
        box.wait("Answer complete.")
        box.ask(LONG)
        box.wait_for_words(1)
        psutil.Process(first.pid).kill()
        box.wait("Answer failed.")
    said = box.in_object()
    assert [reason for *_, reason in said] == ["stop", "error"]
    assert said[1][1] and words(box.on_screen()[1][1]) == words(said[1][1])
    trouble = box.root.locator(".helpers-chat-trouble")
    assert trouble.inner_text().startswith(f"ServiceUnavailable: The service at 127.0.0.1:{first.port} does not")
    box.click("Retry")
    box.status.get_by_text("ServiceUnavailable").wait_for()
    assert box.in_object() == said
    with helpers.serve("smollm2", port=first.port):
        box.ask("And of Italy?")
        box.wait("Answer complete.")
        assert box.in_object()[:2] == said
        box.click("Edit question")
        box.wait(re.compile("is being edited"))
        box.ask("And of Spain?")
        box.wait("Answer complete.")
    assert [question for question, *_ in box.in_object()] == ["What is the capital of France?", LONG, "And of Spain?"]


def test_what_is_typed_meanwhile_stays_where_nothing_comes(chat: Any, tiny_folder: Path) -> None:
    with helpers.serve(str(tiny_folder), port=0) as service:
        box = chat(port=service.port, max_tokens=5)
        box.ask("Hello")
        box.wait()
        box.click("Edit question")
        box.wait(re.compile("is being edited"))
        processes = [psutil.Process(service.pid), *psutil.Process(service.pid).children()]
        for process in processes:
            process.suspend()
        box.ask("And you?")
        box.wait(re.compile("Waiting for the first word"))
        box.text.type("my next question")
        for process in processes:
            process.kill()
        box.status.get_by_text("ServiceUnavailable").wait_for()
    assert box.text.input_value() == "my next question"
    box.click("Edit question")
    box.wait(re.compile("is being edited"))
    assert box.text.input_value() == "And you?"
    box.text.press("Escape")
    box.root.get_by_role("button", name="Cancel").wait_for(state="hidden")
    assert box.text.input_value() == "my next question"
    assert [question for question, *_ in box.in_object()] == ["Hello"]


def test_after_a_reload_the_box_goes_on_and_without_a_kernel_its_words_are_there(
    chat: Any, tiny_service: Any, jupyterlab: JupyterLab
) -> None:
    box = chat(port=tiny_service.port, max_tokens=5)
    box.ask("Hello")
    box.wait()
    said = box.on_screen()
    box.python("box.wait()")  # until the notebook has been handed its words, too
    box = box.save_and_reload()
    assert box.on_screen() == said
    box.ask("And you?")
    box.wait()
    box.page.wait_for_function("() => document.querySelectorAll('.helpers-chat .helpers-chat-turn').length === 2")
    assert [question for question, *_ in box.in_object()] == ["Hello", "And you?"]
    box.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    box.text.fill("Is anybody there?")
    box.text.press("Enter")
    box.wait(re.compile("The kernel does not answer yet"))
    assert box.text.input_value().startswith("Is anybody there?")
    box.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")

    saved = json.loads((jupyterlab.folder / "chat-0.ipynb").read_text())
    assert "widgets" not in saved["metadata"]
    page = jupyterlab.browser.new_page()
    page.goto(f"{jupyterlab.address}/lab/tree/chat-0.ipynb?reset")
    transcript = page.locator(".helpers-chat-saved")
    transcript.wait_for(timeout=MINUTE)
    assert transcript.locator(".helpers-chat-question").all_inner_texts() == ["You:\nHello"]
    assert words(transcript.locator(".helpers-chat-answer").inner_text()) == ["Model", *words(said[0][1])]
    page.close()


def test_ten_turns_in_the_lessons_own_box(chat: Any, embedded: Any, jupyterlab: JupyterLab) -> None:
    """Until after its window has overflowed: one stopped, one asked again, one edited, and the page loaded anew."""
    lesson = nbformat.read(ROOT / "notebooks" / "04_conversation.ipynb", as_version=4)
    cells = [cell.source for cell in lesson.cells if re.search("^(service|talk|box) = ", cell.source, re.MULTILINE)]
    assert len(cells) == 3
    box = chat(*cells, port=0)
    questions = [
        "What is the capital of France?",
        "And of Italy?",
        LONG,
        "Who are you?",
        "What is a lighthouse?",
        "Write a poem about the sea.",
        "Tell me about Paris.",
        "Tell me about Rome.",
        "Tell me a story about a ship.",
        "What did I ask first?",
    ]
    for turn, question in enumerate(questions):
        if turn == 5:
            box = box.save_and_reload()
        box.ask(question)
        if question == LONG:
            box.wait_for_words(turn)
            box.text.press("Escape")
        box.wait()
        if turn == 1:
            box.click("Edit question")
            box.wait(re.compile("is being edited"))
            questions[1] = "And of Spain?"
            box.ask(questions[1])
            box.wait()
        if turn == 3:
            before = box.python("id(box.talk.answer)")
            box.click("Regenerate")
            while box.python("id(box.talk.answer) == %d or not box.talk.answer.finish_reason" % before):
                pass
            box.wait()
    said = box.in_object()
    assert [question for question, *_ in said] == questions
    assert [reason == "cancelled" for *_, reason in said] == [question == LONG for question in questions]
    assert box.python("box.talk.answer.dropped_turns") > 0
    assert "for which the window has no room" in box.root.locator(".helpers-chat-note").last.inner_text()
    on_screen = box.on_screen()
    assert [(question, words(text)) for question, text in on_screen] == [(q, words(text)) for q, text, _ in said]
    copied = box.root.locator("[data-copy]").evaluate_all("buttons => buttons.map(button => button.dataset.copy)")
    assert copied == [text for _, text, _ in said]
    box.page.evaluate(IN_KERNEL, "box.talk.save('talk.json')")
    saved = json.loads((jupyterlab.folder / "talk.json").read_text("utf-8"))
    contents = [message["content"] for message in saved["messages"]]
    assert contents == [box.python("box.talk.system"), *(text for turn in said for text in turn[:2])]
    if folder := os.environ.get("SCREENSHOTS"):
        take_pictures(box.page, Path(folder) / "04_conversation_ten_turns")
    box.page.evaluate(IN_KERNEL, "service.stop()")
