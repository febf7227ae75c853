"""The gateway's chat page in a browser, as a user sees and uses it."""

from __future__ import annotations

import json
import re
from typing import Any

from eventually import until
from jupyterlab_fixture import LIMIT

ON_SCREEN = """log => [...log.querySelectorAll(".turn")].map(turn =>
    [".question", ".text"].map(part => turn.querySelector(part).innerText.trim()))"""

ANSWER_ENDED = re.compile("^Answer (complete|cut off|stopped|failed)")


class BrowserChat:
    """The chat page at `address`, in a browser context of its own with these options of Playwright.

    `close` raises `AssertionError` if the page loaded anything that does not come from `origin`, or if the browser
    reported an error other than the failures of requests to the API.
    """

    def __init__(self, chromium: Any, origin: str, path: str = "/", **options: Any) -> None:
        self.origin, self.address = origin, origin + path
        self.requested: list[str] = []
        self.problems: list[str] = []
        self.context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        self.context.set_default_timeout(LIMIT)
        self.context.on("request", lambda request: self.requested.append(request.url))
        self.context.on("console", self._on_message)
        self.context.on("weberror", lambda error: self.problems.append(str(error.error)))
        self.page = self.context.new_page()
        self.page.goto(self.address)

    def close(self) -> None:
        self.context.close()
        assert self.requested and not [url for url in self.requested if not url.startswith(self.origin)]
        assert not self.problems

    @property
    def entry(self) -> Any:
        return self.page.get_by_label("Message")

    @property
    def log(self) -> Any:
        return self.page.locator("#log")

    @property
    def alert(self) -> Any:
        return self.page.get_by_role("alert")

    @property
    def summary(self) -> str:
        """The line below the latest answer."""
        return str(self.log.locator(".summary").last.inner_text())

    def button(self, label: str) -> Any:
        return self.page.get_by_role("button", name=label, exact=True)

    def click(self, label: str) -> None:
        self.button(label).click()

    def send(self, question: str) -> None:
        self.entry.fill(question)
        self.entry.press("Enter")

    def ask(self, question: str) -> None:
        """Send, and wait for the end of the answer."""
        self.send(question)
        self.wait_for_end()

    def edit(self, number: int, question: str) -> None:
        """Replace question `number`, counted from 1, and wait for the end of the answer."""
        self.click(f"Edit question {number}")
        field = self.page.get_by_label(f"Question {number}", exact=True)
        field.fill(question)
        field.press("Enter")
        self.wait_for_end()

    def wait_for_status(self, status: str | re.Pattern[str]) -> None:
        self.page.get_by_role("status").get_by_text(status).wait_for()

    def wait_for_end(self) -> None:
        """Wait until the answer has ended: then there is a button to send the next question."""
        self.wait_for_status(ANSWER_ENDED)
        self.button("Send").wait_for()

    def wait_for_answer(self, text: str, turn: int = -1) -> None:
        """Wait until the latest answer on screen, or that of another turn, is `text`."""
        until(lambda: self.turns() and self.turns()[turn][1] == text, f"the answer {text!r}")

    def turns(self) -> list[tuple[str, str]]:
        """Return the questions and answers as a user reads them."""
        return [tuple(turn) for turn in self.log.evaluate(ON_SCREEN)]

    def set(self, **settings: object) -> None:
        """Fill in fields of the settings, by their names in the API."""
        self.click("Settings")
        for name, value in settings.items():
            self.page.locator(f"[name={name}]").fill(str(value))
        self.click("Close")

    def import_file(self, path: Any) -> None:
        self.click("Settings")
        with self.page.expect_file_chooser() as choosing:
            self.click("Import")
        choosing.value.set_files(path)

    def export(self, path: Any) -> None:
        self.click("Settings")
        with self.page.expect_download() as download:
            self.click("Export")
        download.value.save_as(path)
        self.click("Close")

    def copied(self, label: str) -> str:
        """Click a button that copies, and return what is in the clipboard."""
        self.page.evaluate("navigator.clipboard.writeText('')")
        button = self.button(label).last
        button.click()
        self.button("Copied").last.wait_for()
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def stored(self, area: str = "localStorage") -> str:
        """Return all that the browser stores for the page."""
        return json.dumps(self.page.evaluate(f"Object.entries({area})"), ensure_ascii=False)

    def _on_message(self, message: Any) -> None:
        is_refusal = message.text.startswith("Failed to load resource") and "/v1/" in message.location["url"]
        if message.type in ("error", "warning") and not is_refusal:
            self.problems.append(message.text)
