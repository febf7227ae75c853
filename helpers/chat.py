"""A chat in a terminal: a `Conversation`, and commands that begin with a slash.

Answers go to stdout and everything else to stderr, so that a pipe receives only the answers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .answer import Answer
from .client import build_request, info
from .conversation import Conversation
from .errors import HelpersError, InvalidRequest, to_wire
from .terminal import accept_any_bytes, check_input, check_typed, is_notebook, stdout_in_terminal, write


def converse(conversation: Conversation) -> int:
    """Answer the lines of stdin until Ctrl-D or /exit, and return the exit status.

    If stdin is not a terminal, the status is 1 if any question or command failed, otherwise 0. In a terminal, it is 0.
    Raise `ServiceUnavailable` if no service answers at the beginning.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _set_up_readline()
    accept_any_bytes(sys.stdin)
    status, hint = 0, "(Ctrl-D or /exit ends the chat)"
    host, port = conversation.address
    model = info(host=host, port=port).model
    _note(f"This is {model}. Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands.")
    while True:
        try:
            conversation = _turn(conversation, _read_question())
        except EOFError:
            return 0 if is_terminal else status
        except HelpersError as error:
            _note(to_wire(error))
            status = 1
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _note(f"\n{hint}" if hint else "")
            hint = ""


def show(answer: Answer) -> None:
    """Print an answer while it is streamed, and then its summary. An exception, such as Ctrl-C, stops the answer."""
    try:
        with contextlib.closing(iter(answer)) as pieces:
            for piece in pieces:
                write(piece, sys.stdout, end="")
    finally:
        if answer.text or answer.finish_reason != "error":
            write("", sys.stdout)
    if answer.summary:
        _note(f"({answer.summary})")


def _note(text: str) -> None:
    write(text, sys.stderr)


def _set_up_readline() -> None:
    """Let `input` edit and remember lines, and complete commands, if Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims("")  # a command is completed from the beginning of the line
        readline.set_completer(lambda text, n: [*(name for name in _COMMANDS if name.startswith(text)), None][n])
        readline.parse_and_bind("tab: complete")
        if os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question


def _read_question() -> str:
    """Return the next line, joined with the one after it if it ends in a backslash. Raise `EOFError` at the end."""
    text = _read_line("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n"
        with contextlib.suppress(EOFError):
            text += _read_line("  ")
    return text.removeprefix("\ufeff").rstrip()


def _read_line(prompt: str) -> str:
    if is_notebook():
        return _read_line_in_notebook(prompt)
    if not sys.stdin.isatty():
        return input()
    with stdout_in_terminal():  # `chat | tee answers.txt`
        can_edit = sys.stdout.isatty() and sys.modules.get("readline") is not None
        if not sys.stdout.isatty():
            write(prompt, sys.stderr, end="")
            prompt = ""
        try:
            line = input(prompt)
        except EOFError:
            _note("")
            raise
    if not can_edit:
        check_typed(line)
    return line


def _read_line_in_notebook(prompt: str) -> str:
    try:
        return input(prompt)
    except RuntimeError:  # ipykernel's StdinNotImplementedError
        _note("This notebook cannot read input. Show a helpers.ChatBox instead.")
        raise EOFError from None


def _turn(conversation: Conversation, line: str) -> Conversation:
    """Answer a question or run a command, and return the conversation to continue with."""
    if not _COMMAND.match(line):
        if question := line.strip():
            check_input(question)
            _show_turn(conversation.stream(question))
        return conversation
    name, argument = [*line.split(maxsplit=1), ""][:2]
    command = _COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        raise InvalidRequest(f"There is no command {name}. Type /help for a list, or begin a question with a space.")
    if argument and not command.argument:
        raise InvalidRequest(f"{name} takes no argument. Leave {argument!r} out.")
    if command.argument == _FILE and not argument.strip("\"'"):
        raise InvalidRequest(f"{name} needs a file. Type {name} {_FILE}.")
    return command.run(conversation, argument) or conversation


def _show_turn(answer: Answer) -> None:
    """Show an answer. In a terminal, Ctrl-C stops it and the chat continues."""
    try:
        show(answer)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stays = ": its text stays in the conversation, /undo removes it" if answer.text else " before the first word"
        _note(f"(stopped{stays})")


def _help(conversation: Conversation, _: str) -> None:
    for name, command in _COMMANDS.items():
        _note(f"  {name + ' ' + command.argument:15} {command.help}")
    _note("A line that ends in a backslash continues in the next line. A line that begins with a space is a question.")


def _system(conversation: Conversation, text: str) -> None:
    if text == _NONE:
        conversation.system = None
        _note("(the system prompt is removed, from the next question on)")
    elif text:
        check_input(text)
        build_request([], system=text)  # raises if the text cannot be sent
        conversation.system = text
        _note("(the system prompt is set, from the next question on)")
    else:
        _note(conversation.system or "(there is no system prompt)")


def _undo(conversation: Conversation, _: str) -> None:
    before = len(conversation.turns)
    if not conversation.undo():
        raise InvalidRequest("There is nothing to undo. Ask a question first.")
    _note("(the turn is removed)" if len(conversation.turns) < before else "(the previous answer is back)")


def _regenerate(conversation: Conversation, _: str) -> None:
    _show_turn(conversation.regenerate())


def _window(conversation: Conversation, _: str) -> None:
    window = conversation.window()
    _note(f"({window.tokens} of {window.size} tokens used, {window.left} left)")


def _save(conversation: Conversation, file: str) -> None:
    with _readable_errors(file) as path:
        conversation.save(path)
    _note(f"(saved to {path})")


def _load(conversation: Conversation, file: str) -> Conversation:
    with _readable_errors(file) as path:
        loaded = Conversation.load(path, **conversation.options)
    _note(f"(loaded, turns: {len(loaded.turns)})")
    return loaded


def _exit(conversation: Conversation, _: str) -> None:
    raise EOFError


@contextlib.contextmanager
def _readable_errors(file: str) -> Iterator[str]:
    """Yield the path of `file`. Raise `InvalidRequest` if the file cannot be read or written."""
    path = _path(file)
    try:
        yield path
    except InvalidRequest:
        raise
    except (OSError, ValueError) as error:  # ValueError: a character that no file name may contain
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{path} cannot be used ({reason}). Choose another file.") from None


def _path(file: str) -> str:
    """Return the path of `file`, which may be quoted as in a shell: terminals quote a file that is dragged into them.

    An existing file with exactly that name wins.
    """
    path = os.path.expanduser(file)
    if os.path.exists(path):
        return path
    try:
        words = [file.strip('"')] if os.name == "nt" else shlex.split(file)
    except ValueError:  # a quotation mark without its partner
        return path
    return os.path.expanduser(words[0]) if len(words) == 1 else path


@dataclass(frozen=True)
class _Command:
    """A command, its help and its argument. `run` returns a conversation if the chat continues with another one."""

    run: Callable[[Conversation, str], Conversation | None]
    help: str
    argument: str = ""


_COMMAND = re.compile(r"/([a-zA-Z][^/\s]*)?(?!\S)")  # not a path, and not // or /*
_FILE, _NONE = "FILE", '""'
_COMMANDS = {
    "/help": _Command(_help, "list the commands"),
    "/system": _Command(
        _system, f"show the system prompt, or replace it from the next question on ({_NONE} removes it)", "[TEXT]"
    ),
    "/undo": _Command(_undo, "undo the latest question or /regenerate"),
    "/regenerate": _Command(_regenerate, "answer the latest question again (use a --temperature above 0)"),
    "/window": _Command(_window, "show how much of the context window the conversation uses"),
    "/save": _Command(_save, "save the conversation as JSON, with messages in OpenAI's format", _FILE),
    "/load": _Command(_load, "continue with a conversation from such a file", _FILE),
    "/exit": _Command(_exit, "end the chat, like /quit, /bye and Ctrl-D"),
}
_ALIASES = {"/quit": "/exit", "/bye": "/exit"}
