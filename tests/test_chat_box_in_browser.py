"""The chat box in a real JupyterLab, in a real browser, with keys and clicks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import helpers
from chat_page import ChatPage, words
from chat_scripts import HOSTILE, hold, say
from eventually import until_idle
from helpers.catalog import BUNDLED
from jupyterlab_fixture import JupyterLab, NotebookPage
from scripted_service import ScriptedService

LONG = "Tell me a long story about a lighthouse."

SLOW_ENTRY = """
import time
(entry,) = (w for w in box.widget.children if "helpers-chat-entry" in w._dom_classes)
entry.observe(lambda _: time.sleep(1), "value")"""

CELL_COUNT = "() => jupyterapp.shell.currentWidget.content.widgets.length"

RUN_WITHOUT_WAITING = """code => {
    jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code});
}"""

# Pixels above and below the visible part of a log.
SCROLLED = "log => [log.scrollTop, log.scrollHeight - log.scrollTop - log.clientHeight]"


DIRECTION = "element => getComputedStyle(element).direction"

# Pixels from the left to the end of an item's text, and to the right side of its list.
SIDES = """item => {
    const range = document.createRange();
    range.selectNodeContents(item);
    return [range.getBoundingClientRect().right, item.parentElement.getBoundingClientRect().right];
}"""

RIGHT_TO_LEFT = r"""הפקודה `ls` מציגה \(n^2\) קבצים.

- ראשון: C++ (מהיר)
- שני
- English item.

1. אחד
2. שתיים

> ציטוט מתוך ספר.

| שם | ערך |
|----|-----|
| אורך | 12 |
| width | 3. |

```python
print("שלום")  # ברכה
```

An English paragraph, with עברית inside.

פסקה אחרונה: מחיר $5, נכון?"""

FORMULAS = r"""Take \(x_1*y*z\) or $a*b*c$, and then

\[
\sum_{i} a_i
- b*c*d \\
\]

It costs $5 and $6, **really** $7."""


@pytest.fixture(scope="module")
def notebook(jupyterlab: JupyterLab) -> Iterator[NotebookPage]:
    """A notebook whose kernel has imported `helpers`."""
    page = jupyterlab.new_notebook("chat.ipynb")
    page.run("import helpers")
    yield page
    page.close()


def show(notebook: NotebookPage, port: int, **options: Any) -> ChatPage:
    """Show a new chat box in the notebook, whose conversation has these options."""
    options = {"port": port, "max_tokens": 3, **options}
    notebook.run(f"box = helpers.ChatBox(helpers.Conversation(**{options}))\nbox")
    return ChatPage(notebook)


def family_of(service: Any) -> list[psutil.Process]:
    """Return the processes of a service."""
    process = psutil.Process(service.pid)
    return [process, *process.children(recursive=True)]


@contextmanager
def suspended(service: Any) -> Iterator[None]:
    """Suspend a service during the block."""
    family = family_of(service)
    for one in family:
        one.suspend()
    try:
        yield
    finally:
        for one in family:
            one.resume()


@pytest.fixture
def bundled_in_small_window(bundled: Any) -> Iterator[Any]:
    """The bundled model with a context of 512 tokens."""
    with helpers.serve(BUNDLED, port=0, context_length=512) as service:
        yield service


# --- With a real model ----------------------------------------------------------------------------


def test_escape_stops_the_generation_in_the_service(notebook: NotebookPage, service: Any) -> None:
    chat = show(notebook, service.port, max_tokens=2000)
    steps = service.info().steps
    chat.send(LONG)
    chat.wait_for_words(count=5)
    with suspended(service):  # so that it cannot finish the answer before the key is pressed
        chat.stop_by_escape()
    until_idle(service)
    tokens = chat.python("box.conversation.answer.completion_tokens")
    # the prompt takes a step too, and the step that was running when Esc arrived brings nothing
    assert 5 <= tokens < 2000 and service.info().steps - steps <= tokens + 2
    chat.ask("What is the capital of France?")
    assert chat.finish_reasons() == ["cancelled", "stop"]


@pytest.mark.long
def test_ten_turns_overflow_the_window_and_stay_the_same_everywhere(
    notebook: NotebookPage, bundled_in_small_window: Any
) -> None:
    service = bundled_in_small_window
    chat = show(notebook, service.port, system="You answer briefly.", max_tokens=60)

    chat.ask("What is the capital of France?")
    chat.ask("And of Italy?")
    chat.edit("And of Spain?")
    chat.send(LONG)
    chat.wait_for_words(turn=2)
    with suspended(service):
        chat.stop_by_escape()
    chat.ask("Who are you?")
    chat.regenerate()
    notebook.save_and_reload()
    chat = ChatPage(notebook)
    for subject in ("a lighthouse", "the sea", "Paris", "Rome", "a ship"):
        chat.ask(f"Tell me a story about {subject}.")
    chat.ask("What did I ask first?")

    said = chat.in_conversation()
    questions = [question for question, _ in said]
    assert len(said) == 10 and questions[1:4] == ["And of Spain?", LONG, "Who are you?"]
    assert [reason == "cancelled" for reason in chat.finish_reasons()] == [question == LONG for question in questions]
    assert chat.python("box.conversation.answer.dropped_turns") > 0
    chat.root.locator(".helpers-chat-summary").last.get_by_text("did not fit the context window").wait_for()

    assert [(question, words(text)) for question, text in chat.on_screen()] == [(q, words(text)) for q, text in said]
    copies = chat.root.locator("[data-copy]").evaluate_all("buttons => buttons.map(button => button.dataset.copy)")
    assert copies == [text for _, text in said]
    saved = chat.python("(box.conversation.save('talk.json'), json.load(open('talk.json', encoding='utf-8')))[1]")
    contents = [message["content"] for message in saved["messages"]]
    assert contents == ["You answer briefly.", *(text for turn in said for text in turn)]
    notebook.take_pictures("04_conversation_ten_turns")


# --- Keys and buttons -----------------------------------------------------------------------------


def test_enter_sends_and_shift_enter_begins_a_line(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.entry.click()
    chat.entry.press("Enter")  # with nothing to send
    chat.entry.press_sequentially("Hello")
    chat.entry.press("Shift+Enter")
    chat.entry.press_sequentially("you")
    assert chat.entry.input_value() == "Hello\nyou"
    chat.entry.press("Enter")
    chat.wait_for_status("Answer cut off at max_tokens.")
    assert chat.in_conversation() == [("Hello\nyou", "1:0 1:1 1:2 ")]
    chat.wait_for_turns(("Hello\nyou", "1:0 1:1 1:2"))
    chat.wait_for_entry("")
    assert chat.has_focus()
    summary = chat.root.locator(".helpers-chat-summary").inner_text()
    assert re.match(r"3 tokens, first after \d+\.\d\d s, [\d.]+ tokens/s, cut off at max_tokens", summary)
    assert chat.page.evaluate(CELL_COUNT) == 1, "JupyterLab took a key for itself"


def test_the_send_button_sends_what_was_typed_last(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.entry.fill("Hel")
    chat.entry.press("Tab")
    chat.entry.fill("Hello")
    chat.click("Send")
    chat.wait_for_status("Answer cut off at max_tokens.")
    chat.wait_for_turns(("Hello", "1:0 1:1 1:2"))
    chat.wait_for_entry("")


def test_edit_and_cancel_keep_what_was_typed_last_in_a_busy_kernel(
    notebook: NotebookPage, scripted: ScriptedService
) -> None:
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.notebook.execute(SLOW_ENTRY)

    type_in_two_steps(chat, "a draft")
    chat.click("Edit question")
    chat.wait_for_entry("Hello")
    chat.python("None")
    chat.wait_for_entry("Hello")

    type_in_two_steps(chat, "another question")
    chat.click("Cancel")
    chat.wait_for_entry("a draft")
    chat.python("None")
    chat.wait_for_entry("a draft")


def type_in_two_steps(chat: ChatPage, text: str) -> None:
    for part in (text[:3], text):
        chat.entry.fill(part)
        chat.entry.press("Tab")


def test_letters_in_the_box_are_not_notebook_commands(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.root.locator(".helpers-chat-answer").click()
    chat.page.keyboard.type("ddb")  # would delete a cell and insert one
    assert chat.page.evaluate(CELL_COUNT) == 1


@pytest.mark.parametrize("key", ["Stop", "Escape"])
def test_an_answer_can_be_stopped_and_the_next_question_asked(
    notebook: NotebookPage, scripted: ScriptedService, key: str
) -> None:
    hold(scripted)
    chat = show(notebook, scripted.port)
    chat.send("Hello")
    chat.wait_for_words()
    chat.wait_for_button("Stop", instead_of="Send")
    if key == "Stop":
        chat.click("Stop")
    else:
        chat.entry.press("Escape")
    chat.wait_for_status("Answer stopped.")
    chat.wait_for_button("Send", instead_of="Stop")
    scripted.script = scripted.count_up
    chat.ask("And you?")
    assert chat.finish_reasons() == ["cancelled", "length"]
    chat.wait_for_turns(("Hello", "One two"), ("And you?", "2:0 2:1 2:2"))


def test_regenerate_replaces_the_latest_answer(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.regenerate()
    chat.wait_for_turns(("Hello", "2:0 2:1 2:2"))


def test_a_question_can_be_edited_and_the_draft_returns(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.draft("a draft")
    chat.begin_editing()
    chat.wait_for_entry("Hello")
    assert chat.has_focus()
    chat.ask("Why?")
    chat.wait_for_turns(("Why?", "2:0 2:1 2:2"))
    chat.wait_for_entry("a draft")


def test_escape_cancels_an_edit(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.draft("a draft")
    chat.begin_editing()
    chat.entry.press("Escape")
    chat.button("Cancel").wait_for(state="hidden")
    chat.wait_for_entry("a draft")
    chat.wait_for_turns(("Hello", "1:0 1:1 1:2"))


def test_an_answer_can_be_copied(notebook: NotebookPage, scripted: ScriptedService, jupyterlab: JupyterLab) -> None:
    jupyterlab.browser.grant_permissions(["clipboard-read", "clipboard-write"])
    say(scripted, "**One** <two>")
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.click("Copy the answer")
    chat.root.get_by_text("Copied").wait_for()
    assert chat.page.evaluate("() => navigator.clipboard.readText()") == "**One** <two>"


def test_an_example_is_asked_by_a_click(notebook: NotebookPage, scripted: ScriptedService) -> None:
    conversation = f"helpers.Conversation(port={scripted.port}, max_tokens=3)"
    notebook.run(f"box = helpers.ChatBox({conversation}, examples=['Hello', 'And you?'])\nbox")
    chat = ChatPage(notebook)
    chat.click("And you?")
    chat.wait_for_status("Answer cut off at max_tokens.")
    chat.wait_for_turns(("And you?", "1:0 1:1 1:2"))
    chat.button("Hello").wait_for(state="hidden")


def test_the_next_question_is_asked_with_the_settings(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.click("Settings")
    for label, value in (("System prompt", "Be brief."), ("Temperature", "1.5"), ("Max tokens", "4")):
        chat.root.get_by_label(label).fill(value)
        chat.root.get_by_label(label).press("Tab")
    chat.click("Settings")
    chat.root.get_by_label("Temperature").wait_for(state="hidden")
    chat.ask("Hello")
    (request,) = scripted.requests
    assert request.messages[0] == {"role": "system", "content": "Be brief."}
    assert (request.temperature, request.max_tokens) == (1.5, 4)


# --- Boxes, cells and the kernel ------------------------------------------------------------------


def test_two_boxes_do_not_disturb_each_other(notebook: NotebookPage, scripted: ScriptedService) -> None:
    hold(scripted)
    new = f"helpers.ChatBox(helpers.Conversation(port={scripted.port}))"
    notebook.run(f"one = {new}\none", f"two = {new}\ntwo")
    one, two = ChatPage(notebook, "one", 0), ChatPage(notebook, "two", 1)
    one.send("A lighthouse?")
    two.send("A ship?")
    one.wait_for_words()
    two.wait_for_words()
    one.entry.fill("a draft")
    two.stop_by_escape()
    one.wait_for_button("Stop", instead_of="Send")
    scripted.resume.set()
    one.wait_for_status("Answer complete.")
    one.wait_for_entry("a draft")
    one.wait_for_turns(("A lighthouse?", "One two three"))
    two.wait_for_turns(("A ship?", "One two"))


def test_cells_run_while_an_answer_comes(notebook: NotebookPage, scripted: ScriptedService) -> None:
    hold(scripted)
    chat = show(notebook, scripted.port)
    chat.send("Hello")
    chat.wait_for_words()
    assert chat.python("1 + 1") == 2
    scripted.resume.set()
    chat.wait_for_status("Answer complete.")


def test_an_answer_comes_while_a_cell_runs(
    notebook: NotebookPage, scripted: ScriptedService, jupyterlab: JupyterLab
) -> None:
    hold(scripted)
    chat = show(notebook, scripted.port)
    chat.send("Hello")
    chat.wait_for_words()
    gate = jupyterlab.folder / "gate"
    wait_for_gate = "import pathlib, time\nwhile not pathlib.Path('gate').exists(): time.sleep(0.05)"
    chat.page.evaluate(RUN_WITHOUT_WAITING, wait_for_gate)
    chat.button("Stop").focus()
    scripted.resume.set()
    chat.wait_for_status("Answer complete.")
    chat.page.wait_for_function("entry => document.activeElement === entry", arg=chat.entry.element_handle())
    gate.touch()
    assert chat.in_conversation() == [("Hello", "One two three")]


def test_after_a_reload_of_the_page_the_box_goes_on(notebook: NotebookPage, scripted: ScriptedService) -> None:
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.python("box.wait()")
    notebook.save_and_reload()
    chat = ChatPage(notebook)
    chat.wait_for_turns(("Hello", "1:0 1:1 1:2"))
    chat.ask("And you?")
    chat.wait_for_turns(("Hello", "1:0 1:1 1:2"), ("And you?", "2:0 2:1 2:2"))


@pytest.mark.long
def test_without_a_kernel_the_page_says_so_and_shows_the_stored_chat(
    jupyterlab: JupyterLab, scripted: ScriptedService
) -> None:
    notebook = jupyterlab.new_notebook("without_kernel.ipynb")
    notebook.run("import helpers")
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.python("box.wait()")
    chat.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    chat.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    chat.entry.fill("Are you there?")
    chat.entry.press("Enter")
    chat.wait_for_status(re.compile("^The kernel does not answer"))
    assert chat.entry.input_value().startswith("Are you there?")
    notebook.close()

    saved = json.loads((jupyterlab.folder / "without_kernel.ipynb").read_text())
    assert "widgets" not in saved["metadata"]
    page = jupyterlab.browser.new_page()
    page.goto(f"{jupyterlab.address}/lab/tree/without_kernel.ipynb?reset")
    stored = page.locator(".helpers-chat-stored")
    stored.wait_for()
    assert stored.locator(".helpers-chat-question").all_inner_texts() == ["You:\nHello"]
    assert words(stored.locator(".helpers-chat-answer").inner_text()) == words("Model 1:0 1:1 1:2")
    page.close()


# --- What comes from the model and the service ----------------------------------------------------


def test_nothing_that_a_model_says_runs_or_loads(
    notebook: NotebookPage, scripted: ScriptedService, tmp_path: Path
) -> None:
    requested: list[str] = []
    notebook.page.on("request", lambda request: requested.append(request.url))
    say(scripted, HOSTILE)
    chat = show(notebook, scripted.port)
    chat.ask(HOSTILE.replace("\n", " "))
    chat.log.hover()
    chat.log.locator(".helpers-chat-answer").click()
    assert chat.log.locator("a, img, script, svg, h1, iframe, form, input").count() == 0
    assert chat.log.locator("button").count() == 1
    assert chat.page.evaluate("() => window.hacked ?? null") is None
    assert not [url for url in requested if "leak" in url or "example" in url]
    assert "<script>window.hacked = 1</script>" in chat.on_screen()[0][1]


def test_the_stored_copy_of_a_hostile_chat_is_only_text(notebook: NotebookPage, scripted: ScriptedService) -> None:
    say(scripted, HOSTILE)
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    chat.python("box.wait()")
    stored = chat.page.locator(".helpers-chat-stored")
    stored.get_by_text("$5 or $6").wait_for(state="attached")
    assert stored.locator("a, img, script, svg, h1, mjx-container").count() == 0


def test_right_to_left_text_is_laid_out_from_right_to_left(notebook: NotebookPage, scripted: ScriptedService) -> None:
    say(scripted, RIGHT_TO_LEFT)
    chat = show(notebook, scripted.port)
    chat.entry.fill("שלום, מה זה `ls`?")
    assert chat.entry.evaluate(DIRECTION) == "rtl"
    chat.click("Settings")
    chat.root.get_by_label("System prompt").fill("ענה בקצרה.")
    assert chat.root.get_by_label("System prompt").evaluate(DIRECTION) == "rtl"
    chat.click("Settings")
    chat.ask("שלום, מה זה `ls`?")
    chat.python("box.wait()")
    stored = chat.page.locator(".helpers-chat-stored").last
    stored.get_by_text("שלום, מה").wait_for(state="attached")
    for shown in (chat.log, stored):
        directions = {
            name: shown.locator(f".helpers-chat-{name}").last.evaluate(DIRECTION)
            for name in ("question", "answer > p", "answer li", "answer td", "answer blockquote p", "answer pre code")
        }
        assert directions.pop("answer pre code") == "ltr"
        assert set(directions.values()) == {"rtl"}, directions
        assert [element.evaluate(DIRECTION) for element in shown.locator("p code, p span[dir]").all()] == ["ltr"] * 2
    for item in chat.log.locator(".helpers-chat-answer li").all():
        end, side = item.evaluate(SIDES)
        assert end > side - 60, "an item is far from its bullet"
    assert chat.entry.evaluate(DIRECTION) == "ltr"
    notebook.take_pictures("right_to_left")


def test_formulas_and_prices_are_shown_as_they_are_written(notebook: NotebookPage, scripted: ScriptedService) -> None:
    say(scripted, FORMULAS)
    chat = show(notebook, scripted.port)
    chat.ask("What is $a*b*c$?")
    chat.python("box.wait()")
    for shown in (chat.log, chat.page.locator(".helpers-chat-stored")):
        shown.get_by_text("really").wait_for(state="attached")
        text = shown.locator(".helpers-chat-answer").text_content()
        for formula in (r"\(x_1*y*z\)", "$a*b*c$", r"\sum_{i}", "- b*c*d", r"\]", "$5 and $6, really $7"):
            assert formula in text
        assert shown.locator("em, li, mjx-container").count() == 0
        assert shown.locator("strong").all_text_contents() == ["really"]
    notebook.take_pictures("formulas")


def test_the_log_follows_an_answer_but_not_if_the_user_has_scrolled_up(
    notebook: NotebookPage, scripted: ScriptedService
) -> None:
    lines = "".join(f"line {n}\n\n" for n in range(40))
    say(scripted, lines)
    chat = show(notebook, scripted.port)
    chat.ask("Hello")
    at_end, below = chat.log.evaluate(SCROLLED)
    assert at_end > 0 and below < 2

    chat.log.hover()
    chat.page.mouse.wheel(0, -200)
    chat.page.wait_for_function("([log, top]) => log.scrollTop < top", arg=[chat.log.element_handle(), at_end])
    here, _ = chat.log.evaluate(SCROLLED)
    hold(scripted, lines, lines)
    chat.notebook.execute("box.send('And you?')")
    chat.wait_for_words(turn=1, count=40)
    assert chat.log.evaluate(SCROLLED)[0] == here

    chat.log.focus()
    chat.page.keyboard.press("End")
    at_the_end = "([log, top]) => log.scrollTop > top && log.scrollHeight - log.scrollTop - log.clientHeight < 2"
    chat.page.wait_for_function(at_the_end, arg=[chat.log.element_handle(), at_end])
    at_end, _ = chat.log.evaluate(SCROLLED)
    scripted.resume.set()
    chat.wait_for_status("Answer complete.")
    chat.page.wait_for_function(at_the_end, arg=[chat.log.element_handle(), at_end + 100])


def test_an_answer_that_breaks_off_keeps_its_text_and_can_be_asked_again(
    notebook: NotebookPage, scripted: ScriptedService
) -> None:
    hold(scripted)
    chat = show(notebook, scripted.port)
    chat.send("Hello")
    chat.wait_for_words()
    scripted.stop()
    chat.wait_for_status("Answer failed.")
    chat.wait_for_turns(("Hello", "One two"))
    error = chat.root.locator(".helpers-chat-error").inner_text()
    assert error.startswith(f"ServiceUnavailable: The service at 127.0.0.1:{scripted.port} does not")

    chat.click("Retry")
    chat.wait_for_status(re.compile("ServiceUnavailable"))
    chat.wait_for_turns(("Hello", "One two"))

    scripted.script = scripted.count_up
    scripted.start()
    chat.click("Retry")
    chat.wait_for_status("Answer cut off at max_tokens.")
    chat.wait_for_turns(("Hello", "2:0 2:1 2:2"))


def test_a_text_typed_while_the_service_is_killed_stays(notebook: NotebookPage, tiny_folder: Path) -> None:
    with helpers.serve(str(tiny_folder), port=0) as service:
        chat = show(notebook, service.port)
        chat.ask("Hello")
        chat.begin_editing()
        family = family_of(service)
        for process in family:
            process.suspend()
        chat.send("And you?")
        chat.wait_for_status("Waiting for the first word …")
        chat.entry.press_sequentially("my next question")
        for process in family:
            process.kill()
        chat.wait_for_status(re.compile("ServiceUnavailable"))
    chat.wait_for_entry("my next question")
    assert [question for question, _ in chat.in_conversation()] == ["Hello"]
    chat.begin_editing()
    chat.wait_for_entry("And you?")
