"""A chat box in the page of a notebook, as a user sees and uses it."""

from __future__ import annotations

import re
from typing import Any

from eventually import until
from jupyterlab_fixture import NotebookPage

ON_SCREEN = """root => [...root.querySelectorAll(".helpers-chat-turn")].map(turn => ["question", "answer"].map(part => {
    const element = turn.querySelector(".helpers-chat-" + part).cloneNode(true);
    element.querySelector(".helpers-chat-speaker").remove();
    return element.textContent.trim();
}))"""

HAS_WORDS = """([root, turn, count]) =>
    root.querySelectorAll(".helpers-chat-answer")[turn]?.innerText.split(/\\s+/).length > count"""

KERNEL_ENTRY = "[w.value for w in {}.widget.children if 'helpers-chat-entry' in w._dom_classes]"

ANSWER_ENDED = re.compile("^Answer |ServiceUnavailable")


class ChatPage:
    """The chat box number `number` in a notebook's page. In the notebook's kernel it is called `name`."""

    def __init__(self, notebook: NotebookPage, name: str = "box", number: int = 0) -> None:
        self.notebook, self.page, self.name = notebook, notebook.page, name
        self.root = self.page.locator(".helpers-chat[data-ready]").nth(number)
        self.root.wait_for()
        self.entry = self.root.get_by_label("Message")
        self.status = self.root.get_by_role("status")
        self.log = self.root.get_by_role("region", name="Conversation")

    def button(self, label: str) -> Any:
        return self.root.get_by_role("button", name=label, exact=True)

    def click(self, label: str) -> None:
        self.button(label).click()

    def wait_for_button(self, label: str, *, instead_of: str) -> None:
        """Wait until one button is on screen and the other is not: the page shows them one after the other."""
        self.button(label).wait_for()
        self.button(instead_of).wait_for(state="hidden")

    def send(self, question: str) -> None:
        """Type, press Enter, and wait until the kernel has taken the text."""
        self.entry.fill(question)
        self.entry.press("Enter")
        self.page.wait_for_function(
            "([entry, question]) => !entry.value.includes(question)", arg=[self.entry.element_handle(), question]
        )

    def draft(self, text: str) -> None:
        """Type, leave the entry, and wait until the kernel has the text."""
        self.entry.fill(text)
        self.entry.press("Tab")
        until(lambda: self.python(KERNEL_ENTRY.format(self.name)) == [text], "the draft in the kernel")

    def ask(self, question: str) -> None:
        """Send, and wait for the end of the answer."""
        self.send(question)
        self.wait_for_status(ANSWER_ENDED)
        self.python("None")  # the page holds the entry's next text back until it has read all that the kernel sent

    def edit(self, question: str) -> None:
        """Replace the latest question, and wait for the end of the answer."""
        self.begin_editing()
        self.ask(question)

    def begin_editing(self) -> None:
        self.click("Edit question")
        self.wait_for_status("You are editing a question")

    def regenerate(self) -> None:
        """Click "Regenerate", and wait for the end of the new answer."""
        answer = f"{self.name}.conversation.answer"
        before = self.python(f"id({answer})")
        self.click("Regenerate")
        until(lambda: self.python(f"id({answer}) != {before} and {answer}.finish_reason"), "another answer")
        self.wait_for_status(ANSWER_ENDED)

    def stop_by_escape(self) -> None:
        self.entry.press("Escape")
        self.wait_for_status("Answer stopped.")

    def wait_for_status(self, status: str | re.Pattern[str]) -> None:
        self.status.get_by_text(status).wait_for()

    def wait_for_entry(self, text: str) -> None:
        """Wait until the entry contains exactly `text`."""
        arguments = [self.entry.element_handle(), text]
        self.page.wait_for_function("([entry, text]) => entry.value === text", arg=arguments)

    def wait_for_turns(self, *turns: tuple[str, str]) -> None:
        """Wait until these questions and answers are on screen, and no others."""
        until(lambda: self.on_screen() == list(turns), f"{turns} on screen")

    def wait_for_words(self, turn: int = 0, count: int = 1) -> None:
        """Wait until the answer of a turn has more than `count` words."""
        self.page.wait_for_function(HAS_WORDS, arg=[self.root.element_handle(), turn, count])

    def has_focus(self) -> bool:
        return self.entry.evaluate("entry => document.activeElement === entry")

    def python(self, expression: str) -> Any:
        return self.notebook.value_of(expression)

    def in_conversation(self) -> list[tuple[str, str]]:
        """Return the questions and answers of the Python object."""
        return [tuple(turn) for turn in self.python(f"[[q, a.text] for q, a in {self.name}.conversation.turns]")]

    def finish_reasons(self) -> list[str]:
        return self.python(f"[turn.answer.finish_reason for turn in {self.name}.conversation.turns]")

    def on_screen(self) -> list[tuple[str, str]]:
        """Return the questions and answers as a user reads them."""
        return [tuple(turn) for turn in self.root.evaluate(ON_SCREEN)]


def words(text: str) -> list[str]:
    """Return the words alone, because the page does not show the signs of Markdown."""
    return re.findall(r"\w+", text)
