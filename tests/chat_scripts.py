"""The answers of a scripted service in the tests of the chat box."""

from __future__ import annotations

from typing import Any

from helpers.errors import InvalidRequest
from scripted_service import ScriptedService, failed, last, tokens

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\n\n"
    '<svg onload="window.hacked = 3"></svg> [a](javascript:window.hacked=4) '
    "<https://example.org> https://example.org\n\n"
    "![b](/leak.png) <style onload='window.hacked = 5'>* { display: none }</style> "
    "\"' onfocus='window.hacked = 6' autofocus='\n\n"
    "</textarea></div></div><h1 onclick='window.hacked = 7'>c</h1> [d]\n\n[d]: /leak.html\n\n"
    "$\\href{https://example.org/leak}{x}$ costs $5 or $6\n\n"
    "```html\n<script>window.hacked = 8</script>\n```\n\n```<b onclick='window.hacked = 9'>\n<i>e</i>\n```"
)
"""A text that tries nine times to set ``window.hacked``, and to load addresses with "leak" or "example" in them."""


def say(service: ScriptedService, text: str) -> None:
    """Let each answer be `text`."""

    def script(request: Any) -> Any:
        yield from tokens(text)
        yield last("stop")

    service.script = script


def hold(service: ScriptedService, start: str = "One two", end: str = " three") -> None:
    """Let each answer begin with `start`, and continue with `end` when `resume` is set. A stop breaks it off."""
    service.resume.clear()

    def script(request: Any) -> Any:
        yield from tokens(start)
        service.resume.wait()
        yield from tokens(end)
        yield last("stop")

    service.script = script


def refuse_tags(service: ScriptedService) -> None:
    """Refuse a question that contains "[INST]"."""

    def script(request: Any) -> Any:
        if "[INST]" in request.messages[-1]["content"]:
            yield failed(InvalidRequest("The message contains [INST]. Remove it."))
        else:
            yield from service.count_up(request)

    service.script = script
