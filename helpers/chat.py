"""A chat in a terminal: a `Conversation`, turn by turn, and commands that begin with a slash.

Answers go to stdout, all else to stderr, so that a pipe gets the answers alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Callable, Iterator

from .client import Answer, Conversation, info, stream
from .errors import HelpersError, InvalidRequest, to_wire


def converse(talk: Conversation) -> int:
    """Answer what is typed, until Ctrl-D or /exit.

    Without a terminal each line of the input is a question or a command, and the status, else 0, is 1 if any of
    them failed. Raises `ServiceUnavailable` where no service answers at the beginning.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        _edit_lines()
    # what is no text is refused with a sentence where it is asked, and does not end the chat where it is read
    sys.stdin.reconfigure(errors="surrogateescape")
    status, how_to_end = 0, "(Ctrl-D or /exit ends the chat)"
    model = info(**{name: value for name, value in talk.options.items() if name in ("host", "port")}).model
    print(
        f"This is {model}. Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands.", file=sys.stderr
    )
    while True:
        try:
            talk = _turn(talk, _read_question())
        except EOFError:
            return 0 if terminal else status
        except HelpersError as error:
            print(to_wire(error), file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(f"\n{how_to_end}" if how_to_end else "", file=sys.stderr)
            how_to_end = ""


def show(answer: Answer) -> None:
    """Print an answer as it comes, and then how long it took; whoever leaves in the middle has stopped it."""
    try:
        with contextlib.closing(iter(answer)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        if answer.text or answer.finish_reason != "error":
            print(flush=True)
    if answer.summary:
        print(f"({answer.summary})", file=sys.stderr)


def _edit_lines() -> None:
    """Let `input` edit its line and remember earlier ones, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims("")  # a command stands at the beginning of the line
        readline.set_completer(lambda text, n: [*(name for name in _COMMANDS if name.startswith(text)), None][n])
        readline.parse_and_bind("tab: complete")
        if os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question


def _read_question() -> str:
    """The next line, joined by the one after it where it ends in a backslash; EOFError after the last."""
    text = _read_line("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n"
        with contextlib.suppress(EOFError):
            text += _read_line("  ")
    return text.strip()


def _read_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        return input()
    if not sys.stdout.isatty():  # `chat | tee answers.txt`
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        raise


def _turn(talk: Conversation, line: str) -> Conversation:
    """Answer a question, or do what a command says; the conversation to go on with."""
    if not line.startswith("/"):
        if line:
            _tell(talk.stream(line))
        return talk
    name, argument = [*line.split(maxsplit=1), ""][:2]
    command = _COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        raise InvalidRequest(f"There is no command {name}: /help lists them. A question begins with another character.")
    takes, do, _ = command
    if argument and not takes:
        raise InvalidRequest(f"{name} takes nothing after it: leave {argument!r} out.")
    if takes == _FILE and not argument:
        raise InvalidRequest(f"{name} needs to know the file: {name} {takes}.")
    return do(talk, argument) or talk


def _tell(answer: Answer) -> None:
    """Show an answer in a chat: Ctrl-C stops the answer, and nothing else."""
    try:
        show(answer)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        stays = ": what has come stays in the conversation, /undo drops it" if answer.text else " before the first word"
        print(f"(stopped{stays})", file=sys.stderr)


def _help(talk: Conversation, _: str) -> None:
    for name, (takes, _, help) in _COMMANDS.items():
        print(f"  {name + ' ' + takes:15} {help}", file=sys.stderr)
    print("A line that ends in a backslash goes on in the next.", file=sys.stderr)


def _system(talk: Conversation, text: str) -> None:
    if text:
        stream("?", system=text)  # which refuses what is no text
        talk.system = text
        print("(set, from the next question on)", file=sys.stderr)
    else:
        print(talk.system or "(there is none)", file=sys.stderr)


def _undo(talk: Conversation, _: str) -> None:
    before = len(talk.turns)
    if not talk.undo():
        raise InvalidRequest("There is nothing to undo: the conversation is empty.")
    print("(forgotten)" if len(talk.turns) < before else "(the answer before is back)", file=sys.stderr)


def _regenerate(talk: Conversation, _: str) -> None:
    _tell(talk.regenerate())


def _window(talk: Conversation, _: str) -> None:
    window = talk.window()
    print(f"({window.tokens} of {window.size} tokens taken, {window.left} left)", file=sys.stderr)


def _save(talk: Conversation, file: str) -> None:
    with _naming(file) as path:
        talk.save(path)
    print(f"(saved to {path})", file=sys.stderr)


def _load(talk: Conversation, file: str) -> Conversation:
    with _naming(file) as path:
        loaded = talk.load(path, **talk.options)
    print(f"(turns loaded: {len(loaded.turns)}, and their system prompt)", file=sys.stderr)
    return loaded


def _exit(talk: Conversation, _: str) -> None:
    raise EOFError


@contextlib.contextmanager
def _naming(file: str) -> Iterator[str]:
    """The path that was meant; what is wrong with it, in a sentence."""
    path = os.path.expanduser(file)
    try:
        yield path
    except InvalidRequest:
        raise
    except (OSError, ValueError) as error:  # ValueError: no name at the end, or characters that no file takes
        why = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{path} cannot be used ({why}). Give another file.") from None


_FILE = "FILE"
_COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], Conversation | None], str]] = {
    "/help": ("", _help, "lists the commands"),
    "/system": ("[TEXT]", _system, "shows the system prompt; with a text sets it, from the next question on"),
    "/undo": ("", _undo, "takes back the latest change: a question with its answer, or another answer"),
    "/regenerate": ("", _regenerate, "answers the latest question again; another answer takes a --temperature above 0"),
    "/window": ("", _window, "tells how much of the model's window the conversation takes"),
    "/save": (_FILE, _save, "writes the conversation as JSON, its messages in OpenAI's format"),
    "/load": (_FILE, _load, "goes on with a conversation from such a file, in place of this one"),
    "/exit": ("", _exit, "ends the chat; so do /quit, /bye and Ctrl-D"),
}
_ALIASES = {"/quit": "/exit", "/bye": "/exit"}
