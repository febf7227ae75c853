"""The chat box without a browser: its widgets, and its HTML. The answers come from a scripted service."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import helpers
from chat_scripts import HOSTILE, hold, refuse_tags
from eventually import until
from helpers.answer import Answer
from helpers.catalog import INSTALL_LAB
from helpers.conversation import Conversation, Turn
from helpers.errors import InvalidRequest
from scripted_service import ScriptedService

pytest.importorskip("ipywidgets", reason=INSTALL_LAB)
from helpers.chat_box.page import copy_button, render_markdown, stored_copy, turn_html

ENTER = "\x1e"
"""What the page's script appends to a text when the user presses Enter."""

NO_QUESTIONS = "Nothing has been said yet."


class Screen:
    """A box's widgets, as a user sees and uses them."""

    def __init__(self, box: helpers.ChatBox) -> None:
        self.box = box
        box._ipython_display_()

    def _all(self) -> Iterator[Any]:
        waiting = [self.box.widget]
        while waiting:
            widget = waiting.pop()
            waiting += getattr(widget, "children", ())
            yield widget

    def _with_class(self, name: str) -> Any:
        (widget,) = [widget for widget in self._all() if name in widget._dom_classes]
        return widget

    def field(self, label: str) -> Any:
        (field,) = [widget for widget in self._all() if getattr(widget, "description", "") == label]
        return field

    @property
    def entry(self) -> str:
        return self.field("Message").value

    @property
    def turns(self) -> list[str]:
        return [page.value for page in self._with_class("helpers-chat-log").children]

    @property
    def status(self) -> str:
        return self._with_class("helpers-chat-status").value

    @property
    def buttons(self) -> set[str]:
        """Return the labels of the visible buttons, except "Settings", which is always visible."""
        rows = [widget for widget in self._all() if "helpers-chat-row" in widget._dom_classes]
        buttons = [button for row in rows if row.layout.display != "none" for button in row.children]
        return {button.description for button in buttons if button.layout.display != "none"} - {"Settings"}

    def type(self, text: str) -> None:
        self.field("Message").value = text

    def ask(self, question: str) -> None:
        """Type, press Enter, and wait for the answer."""
        self.type(question + ENTER)
        self.box.wait()

    def click(self, label: str) -> None:
        assert label in self.buttons
        self.field(label).click()
        if label not in ("Send", "Stop"):
            self.box.wait()


def show(service: ScriptedService, **options: Any) -> Screen:
    return Screen(helpers.ChatBox(service.conversation(**{"max_tokens": 3, **options})))


def questions(screen: Screen) -> list[str]:
    return [turn.question for turn in screen.box.conversation.turns]


# --- Asking ---------------------------------------------------------------------------------------


def test_the_box_and_its_conversation_hold_the_same_turns(scripted: ScriptedService) -> None:
    conversation = scripted.conversation("Be brief.", max_tokens=3)
    first = conversation.ask("Hello")
    screen = Screen(helpers.ChatBox(conversation))
    screen.ask("And you?")
    assert questions(screen) == ["Hello", "And you?"]
    assert f'data-copy="{html.escape(first)}"' in screen.turns[0]
    assert ">And you?<" in screen.turns[1] and len(screen.turns) == 2
    assert repr(screen.box) == "<ChatBox, turns: 2>"


def test_what_a_cell_takes_back_leaves_the_screen_with_the_next_question(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.box.conversation.undo()
    screen.ask("Why?")
    assert len(screen.turns) == 1 and ">Why?<" in screen.turns[0]


def test_enter_and_the_send_button_ask_the_same(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.type("And you?")
    screen.click("Send")
    screen.box.wait()
    assert questions(screen) == ["Hello", "And you?"]
    assert (screen.entry, screen.status) == ("", "Answer cut off at max_tokens.")


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_question_is_not_asked(scripted: ScriptedService, text: str) -> None:
    screen = show(scripted)
    screen.ask(text)
    screen.type(text)
    screen.click("Send")
    screen.box.wait()
    assert scripted.requests == [] and screen.status == NO_QUESTIONS


def test_an_example_is_asked_by_a_click_and_offered_before_the_first_question_only(scripted: ScriptedService) -> None:
    box = helpers.ChatBox(scripted.conversation(max_tokens=3), examples=["Hello", "And you?"])
    screen = Screen(box)
    assert screen.buttons == {"Send", "Hello", "And you?"}
    screen.click("And you?")
    assert questions(screen) == ["And you?"]
    assert screen.buttons == {"Send", "Regenerate", "Edit question", "Undo"}
    screen.click("Undo")
    assert screen.buttons == {"Send", "Hello", "And you?"}


def test_an_answer_that_comes_can_only_be_stopped(scripted: ScriptedService) -> None:
    hold(scripted)
    screen = show(scripted)
    screen.box.send("Hello")
    until(lambda: screen.status == "Answering …", "the first words on screen")
    assert screen.buttons == {"Stop"}
    screen.click("Stop")
    screen.box.wait()
    assert screen.status == "Answer stopped."
    assert screen.box.conversation.answer.text.startswith("One")
    assert screen.buttons == {"Send", "Regenerate", "Edit question", "Undo"}


def test_a_question_by_program_stops_the_answer_before_it(scripted: ScriptedService) -> None:
    hold(scripted)
    screen = show(scripted)
    screen.box.send("Hello")
    until(lambda: screen.box.conversation.answer.text, "the first words")
    scripted.script = scripted.count_up
    screen.box.send("And you?")
    screen.box.wait()
    answers = [turn.answer for turn in screen.box.conversation.turns]
    assert [answer.finish_reason for answer in answers] == ["cancelled", "length"]


@pytest.mark.parametrize("keep_partial", [True, False])
def test_a_question_right_after_a_stop_is_answered(scripted: ScriptedService, keep_partial: bool) -> None:
    screen = show(scripted, keep_partial=keep_partial)
    screen.ask("Hello")
    hold(scripted)
    for number in range(5):
        screen.field("Regenerate").click()
        screen.box.stop()
        screen.box.send(f"Question {number}")
        screen.box.stop()
    scripted.script = scripted.count_up
    screen.box.send("And you?")
    screen.box.wait()
    assert screen.box.conversation.answer.finish_reason == "length"
    assert screen.status == "Answer cut off at max_tokens."
    if not keep_partial:
        assert questions(screen) == ["Hello", "And you?"]


# --- Two boxes, one conversation ------------------------------------------------------------------


def test_an_answer_that_is_read_elsewhere_is_shown_and_can_be_stopped(scripted: ScriptedService) -> None:
    hold(scripted)
    conversation = scripted.conversation()
    first = Screen(helpers.ChatBox(conversation))
    first.box.send("Hello")
    until(lambda: conversation.answer and conversation.answer.text, "the first words")
    second = Screen(helpers.ChatBox(conversation))
    assert second.status == "Answering …" and second.buttons == {"Stop"}
    second.click("Stop")
    for screen in (first, second):
        screen.box.wait()
        assert screen.status == "Answer stopped."
        assert conversation.answer.text in screen.turns[0]


def test_two_boxes_that_stop_each_others_answers_can_both_go_on(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=30)
    first, second = Screen(helpers.ChatBox(conversation)), Screen(helpers.ChatBox(conversation))
    for _ in range(10):
        first.box.send("Hello")
        second.box.send("And you?")
        second.box.wait()
        first.box.wait()
        assert "Send" in first.buttons & second.buttons and "Stop" not in first.buttons | second.buttons
    assert len(conversation.turns) == len(second.turns) == 20


def test_a_question_that_another_one_overtakes_shows_an_error_and_can_be_asked_again(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = scripted.conversation(max_tokens=3)
    first, second = Screen(helpers.ChatBox(conversation)), Screen(helpers.ChatBox(conversation))
    original = conversation.stream

    def overtaken(question: str) -> Answer:
        answer = original(question)
        if not conversation.turns and question == "Hello":
            second.ask("And you?")
        return answer

    monkeypatch.setattr(conversation, "stream", overtaken)
    first.ask("Hello")
    assert "The conversation has changed since this question was asked. Ask it again." in first.status
    assert "service" not in first.status and questions(first) == ["And you?"]
    first.click("Retry")
    assert questions(first) == ["And you?", "Hello"] and first.status == "Answer cut off at max_tokens."


def test_a_question_that_a_cell_has_removed_cannot_be_edited(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.box.conversation.undo()
    screen.click("Edit question")
    assert "InvalidRequest: There is no question left to edit." in screen.status


# --- Editing, regenerating, undoing ---------------------------------------------------------------


def test_an_edited_question_replaces_the_latest_turn_and_the_draft_returns(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.type("a draft")
    screen.click("Edit question")
    assert screen.entry == "Hello" and "You are editing a question" in screen.status
    screen.ask("Good day")
    assert questions(screen) == ["Good day"] and screen.entry == "a draft"


def test_a_cancelled_edit_changes_nothing(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.type("a draft")
    screen.click("Edit question")
    screen.click("Cancel")
    assert questions(screen) == ["Hello"] and screen.entry == "a draft"


def test_an_edit_replaces_the_turn_that_it_began_with(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.click("Edit question")
    screen.box.conversation.ask("And you?")
    screen.ask("Good day")
    assert questions(screen) == ["Good day"]


def test_an_edit_of_a_turn_that_has_gone_is_refused_and_the_text_stays(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.click("Edit question")
    screen.box.conversation.undo()
    screen.ask("Good night")
    assert questions(screen) == [] and screen.entry == "Good night"
    assert "no longer in the conversation" in screen.status


def test_regenerate_replaces_the_latest_answer_and_undo_brings_it_back(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    screen.click("Regenerate")
    assert screen.box.conversation.answer.text == "2:0 2:1 2:2 " and len(screen.turns) == 1
    screen.click("Undo")
    assert screen.box.conversation.answer.text == "1:0 1:1 1:2 " and "1:0" in screen.turns[0]


# --- Errors ---------------------------------------------------------------------------------------


def test_the_service_refuses_a_question_and_it_can_be_edited(tiny_service: Any) -> None:
    screen = Screen(helpers.ChatBox(tiny_service.conversation(max_tokens=5)))
    too_long = "Hello " * 600
    screen.ask(too_long)
    assert "InvalidRequest: " in screen.turns[0] and "context window of 512. Shorten it." in screen.turns[0]
    assert screen.buttons == {"Send", "Retry", "Edit question", "Undo"} and screen.entry == ""
    screen.click("Edit question")
    assert screen.entry == too_long.strip()
    screen.ask("What does [INST] mean?")
    assert questions(screen) == ["What does [INST] mean?"]
    assert "Regenerate" in screen.buttons


@pytest.mark.parametrize("keep_partial", [True, False])
def test_a_refused_edit_leaves_the_turn_and_can_be_corrected(scripted: ScriptedService, keep_partial: bool) -> None:
    refuse_tags(scripted)
    screen = show(scripted, keep_partial=keep_partial)
    screen.ask("Hello")
    before = screen.turns
    screen.type("a draft")
    screen.click("Edit question")
    screen.ask("What is [INST]?")
    assert screen.turns == before and "InvalidRequest: The message contains [INST]" in screen.status
    screen.click("Edit question")
    assert screen.entry == "What is [INST]?"
    screen.ask("What is INST?")
    assert questions(screen) == ["What is INST?"] and screen.entry == "a draft"


@pytest.mark.parametrize("keep_partial", [True, False])
def test_a_refused_question_can_be_corrected(scripted: ScriptedService, keep_partial: bool) -> None:
    refuse_tags(scripted)
    screen = show(scripted, keep_partial=keep_partial)
    screen.ask("Hello")
    screen.ask("What is [INST]?")
    assert questions(screen) == ["Hello", "What is [INST]?"][: 2 if keep_partial else 1]
    screen.type("a draft")
    screen.click("Edit question")
    assert screen.entry == "What is [INST]?"
    screen.ask("Who?")
    assert questions(screen) == ["Hello", "Who?"] and screen.entry == "a draft"


@pytest.mark.parametrize("give_up", ["Cancel", "Undo"])
def test_a_refused_edit_that_is_given_up_is_not_tried_again(scripted: ScriptedService, give_up: str) -> None:
    refuse_tags(scripted)
    screen = show(scripted)
    screen.ask("Hello")
    screen.ask("And you?")
    screen.click("Edit question")
    screen.ask("What is [INST]?")
    assert "Retry" in screen.buttons
    if give_up == "Cancel":
        screen.click("Edit question")
    screen.click(give_up)
    assert "Regenerate" in screen.buttons and "InvalidRequest" not in screen.status


def test_without_a_service_a_question_stays_and_retry_asks_it_again(scripted: ScriptedService) -> None:
    scripted.stop()
    screen = show(scripted)
    screen.ask("Hello")
    assert "ServiceUnavailable: The service at" in screen.turns[0]
    scripted.start()
    screen.click("Retry")
    assert questions(screen) == ["Hello"] and "ServiceUnavailable" not in screen.turns[0]
    assert "Regenerate" in screen.buttons


@pytest.mark.parametrize("keep_partial", [True, False])
def test_a_failed_regeneration_keeps_the_answer(scripted: ScriptedService, keep_partial: bool) -> None:
    screen = show(scripted, keep_partial=keep_partial)
    screen.ask("Hello")
    before = screen.turns
    scripted.stop()
    screen.click("Regenerate")
    assert screen.turns == before
    assert "ServiceUnavailable: The service at" in screen.status and "Retry" in screen.buttons


@pytest.mark.parametrize("way", ["Enter", "Send"])
def test_a_text_that_cannot_be_sent_stays_in_the_entry(scripted: ScriptedService, way: str) -> None:
    screen = show(scripted)
    screen.type("\ud83d" + (ENTER if way == "Enter" else ""))
    if way == "Send":
        screen.click("Send")
    assert "not valid Unicode" in screen.status
    assert screen.entry == "\ud83d" and questions(screen) == []
    screen.ask("Hello")
    assert questions(screen) == ["Hello"]


def test_a_refused_call_of_send_raises_and_leaves_the_box_alone(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.ask("Hello")
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        screen.box.send("\ud83d")
    screen.click("Regenerate")
    assert questions(screen) == ["Hello"] and screen.box.conversation.answer.text.startswith("2:0")


# --- Settings -------------------------------------------------------------------------------------


def test_the_fields_show_what_a_cell_has_set(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.box.conversation.system = "Be kind."
    screen.box.conversation.options |= {"temperature": 0.5, "max_tokens": 7}
    screen.ask("Hello")
    labels = ("System prompt", "Temperature", "Max tokens")
    assert [screen.field(label).value for label in labels] == ["Be kind.", 0.5, 7]


def test_the_next_question_is_asked_with_what_a_user_has_set(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.field("System prompt").value = "Be brief."
    screen.field("Temperature").value = 1.5
    screen.field("Max tokens").value = 2
    screen.ask("Hello")
    (request,) = scripted.requests
    assert request.messages[0] == {"role": "system", "content": "Be brief."}
    assert (request.temperature, request.max_tokens) == (1.5, 2)
    screen.field("System prompt").value = ""
    assert screen.box.conversation.system is None


def test_a_setting_that_a_field_cannot_show_is_not_changed_by_it(scripted: ScriptedService) -> None:
    screen = show(scripted)
    screen.box.conversation.options["temperature"] = 5.0
    screen.ask("Hello")
    assert screen.box.conversation.options["temperature"] == 5.0
    assert "InvalidRequest: temperature is 5.0" in screen.status and screen.entry == "Hello"


# --- The HTML -------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The tags and attributes of an HTML text, and what its copy button would copy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.copied: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.copied = dict(attrs).get("data-copy") or self.copied


def test_a_hostile_turn_is_only_text() -> None:
    turn = Turn(HOSTILE, Answer.ended(HOSTILE))
    elements = Elements(turn_html(turn) + copy_button(turn))
    assert elements.tags <= {"div", "span", "b", "p", "br", "pre", "code", "button"}
    assert elements.attributes <= {"class", "type", "data-copy", "role", "aria-label", "dir"}
    assert elements.copied == HOSTILE


def test_the_stored_copy_holds_the_turns_and_no_formulas() -> None:
    copy = stored_copy("1234", [Turn("Who?", Answer.ended("**Ada** costs $5 or $6"))])
    assert copy["text/plain"] == "You: Who?\n\nModel: **Ada** costs $5 or $6\n"
    assert "<strong>Ada</strong> costs $5 or $6" in copy["text/html"]
    assert "mathjax_ignore" in copy["text/html"] and "<button" not in copy["text/html"]
    assert stored_copy("1234", [])["text/plain"] == NO_QUESTIONS


def test_a_conversation_from_a_file_is_shown_with_its_errors(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ad"}]
    answers = [{"finish_reason": "error", "error": "ServiceUnavailable: <gone>"}]
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"messages": messages, "answers": answers}))
    screen = Screen(helpers.ChatBox(Conversation.load(file)))
    (turn,) = screen.turns
    assert ">Who?<" in turn and ">Ad</p>" in turn and "ServiceUnavailable: &lt;gone&gt;" in turn
    assert screen.status == "Answer failed." and "Retry" in screen.buttons


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
def test_markdown_is_rendered_even_while_it_is_incomplete(markdown: str, expected: str) -> None:
    assert expected in without_directions(render_markdown(markdown))


def without_directions(text: str) -> str:
    return re.sub(' dir="(auto|ltr)"', "", text)


@pytest.mark.parametrize(
    "formula",
    [
        r"\(x_1*y*z\)",
        r"\[a\_b \{c\} \\ *d*\]",
        "$a*b*c$",
        r"$\{a\}*b*c \$ d$",
        "$$x*y*z$$",
        r"\begin{align*}a*b*c \\ d\end{align*}",
        "\\[\n- b\n+ *c*\n# d\n> e\n1. f\n| g | h |\n|-|-|\n\\]",
        "$$\n- b*c*d\n$$",
        "\\begin{align}\n- a\n* b *c*\n\\end{align}",
        r"\(a*b*c",
        "\\[\n- a*b*c",
    ],
)
@pytest.mark.parametrize("before", ["", "**Bold** costs $5:\n", "> a\n\n", "- item\n\n  "])
def test_a_formula_is_shown_as_it_is_written(formula: str, before: str) -> None:
    indented = formula.replace("\n", "\n  ") if before.startswith("-") else formula
    shown = html.unescape(without_directions(render_markdown(before + indented)))
    assert f"<span>{formula}</span>".replace("\n", "<br />\n") in shown.replace("\n  ", "\n")
    assert ("<strong>Bold</strong> costs $5:" in shown) == before.startswith("**")


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("$5 and $6, **really** $7", "$5 and $6, <strong>really</strong> $7"),
        ("**$5** or **$6**", "<strong>$5</strong> or <strong>$6</strong>"),
        ("$1,000-$2,000 *x* US$5-US$6", "$1,000-$2,000 <em>x</em> US$5-US$6"),
        ("from $5 for **this** to 6$", "from $5 for <strong>this</strong> to 6$"),
        (r"\$5 *or* \$6", "$5 <em>or</em> $6"),
        (r"`\(x\)` `$a*b*c$`", r"<code>\(x\)</code> <code>$a*b*c$</code>"),
        ("```\n$$\n\\[\n```", "<pre><code>$$\n\\[\n</code></pre>"),
        (r"\*no\* \_emphasis\_", "*no* _emphasis_"),
        ("the *end*\n\n\\[a\n\n*b*", "<p><em>b</em></p>"),
    ],
)
def test_prices_code_and_escaped_signs_are_not_formulas(markdown: str, expected: str) -> None:
    assert expected in without_directions(render_markdown(markdown))


def test_many_unfinished_formulas_take_no_longer_than_other_text() -> None:
    for start in ("\\(", "\\[\n", "$a ", "$$\na\n", "\\begin{a}\n", "\\[\n\n", "\\[\n$$\n"):
        assert render_markdown(start * 5_000)


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("שלום", '<p dir="auto">שלום</p>'),
        ("# שלום", '<h1 dir="auto">'),
        ("- שלום\n- a", '<ul dir="auto">\n<li>'),
        ("1. שלום", '<ol dir="auto">\n<li>'),
        ("> שלום", '<blockquote dir="auto">\n<p>'),
        ("|ש|\n|-|\n|a|", '<table dir="auto">'),
        ("```python\nx", '<pre dir="ltr"><code class="language-python">'),
        ("    x = 1", '<pre dir="ltr"><code>x = 1'),
        ("`ls` שלום", '<p dir="auto"><code dir="ltr">ls</code> שלום</p>'),
        (r"\(x\) שלום", r'<p dir="auto"><span dir="ltr">\(x\)</span> שלום</p>'),
    ],
)
def test_each_block_has_the_direction_of_its_text(markdown: str, expected: str) -> None:
    assert expected in render_markdown(markdown)


def test_the_speakers_name_does_not_decide_the_direction_of_a_question() -> None:
    turn = turn_html(Turn("שלום", Answer.ended("", "error", "error")))
    assert '<div class="helpers-chat-question" dir="auto"><span class="helpers-chat-speaker" dir="ltr">' in turn
    assert 'class="helpers-chat-error" dir="auto"' in turn


def test_deeply_nested_text_is_shown() -> None:
    deep = "".join("  " * level + f"- level {level}\n" for level in range(14))
    assert "level 13" in render_markdown(deep)


def test_code_keeps_its_blank_lines() -> None:
    assert "\n\n<span" in render_markdown("```python\n\n\nreturn 1\n```")


@pytest.mark.parametrize("language", ["systemd", "python"])
def test_code_that_could_block_a_lexer_is_shown_as_it_is(language: str) -> None:
    assert f'<code class="language-{language}">  ' in render_markdown(f"```{language}\n" + " " * 2000 + "x\n```")
