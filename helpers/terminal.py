"""The three standard streams of a command: what is read from stdin, and what a terminal may show."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import TextIO

from .errors import HelpersError, InvalidRequest

_MAX_INPUT = 1_000_000  # characters, so that an endless pipe does not fill the memory
_MAX_TYPED = 1023 if sys.platform == "darwin" else 4095  # bytes of a line: MAX_CANON, or N_TTY_BUF_SIZE in Linux

# All control characters but newline and tab, and the characters that change the direction of the text after them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def open_streams() -> None:
    """Replace closed standard streams with the null device. Let stdout escape the characters that it cannot encode.

    If stderr is closed, ``print(file=sys.stderr)`` writes to stdout, and the next file or socket gets its number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  open until the program ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_unwritten() -> None:
    """Drop what stdout and stderr cannot write, as on a full disk. Otherwise, Python reports an error when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), stream.fileno())


def is_notebook() -> bool:
    """Return whether a notebook's kernel runs this program."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and shell.has_trait("kernel")


def visible(text: str) -> str:
    """Return `text` with its control characters spelled out, as ``\\x1b``. Newlines and tabs stay."""
    return _CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def write(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Print `text`: `visible` on a terminal, and unchanged in a pipe. Raise `HelpersError` if stdout cannot take it."""
    if stream is None:
        return
    try:
        print(visible(text) if stream.isatty() else text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        if stream is sys.stderr:
            return
        raise HelpersError(
            f"The output cannot be written ({error.strerror}). Free some space, or send the output to another place."
        ) from None


def accept_any_bytes(stream: TextIO | None) -> None:
    """Let bytes that are not text pass, so that `check_decoded` can name them."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


@contextlib.contextmanager
def stdout_in_terminal() -> Iterator[None]:
    """Redirect stdout to the terminal of stderr if stdout is not a terminal, because `input` then lacks readline."""
    if sys.stdout.isatty() or not sys.stderr.isatty():
        yield
        return
    number = sys.stdout.fileno()
    stdout = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    try:
        yield
    finally:
        os.dup2(stdout, number)
        os.close(stdout)


def check_typed(text: str) -> None:
    """Raise `InvalidRequest` if the terminal may have cut a line. Without readline, it cuts long lines silently."""
    encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
    longest = max(len(line.encode(encoding, "surrogateescape")) for line in text.split("\n"))
    if longest >= _MAX_TYPED and os.name != "nt":
        raise InvalidRequest(
            f"A line has {longest} bytes, and the terminal cuts longer lines. Send the text from a file: < FILE."
        )


def check_decoded(text: str, name: str, *, encoding: str, fix: str) -> None:
    """Raise `InvalidRequest` if `text` holds a byte that Python could not decode."""
    if found := _ESCAPED_BYTE.search(text):
        byte = ord(found[0]) - 0xDC00
        raise InvalidRequest(f"{name} contains the byte 0x{byte:02x}, which is not text in {encoding}. {fix}")


def check_input(text: str) -> None:
    """Raise `InvalidRequest` if a text from stdin holds a byte that Python could not decode."""
    encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
    fix = "Set PYTHONIOENCODING to the encoding of the text, such as utf-8, and start again."
    check_decoded(text, "The text", encoding=encoding, fix=fix)


def check_argument(text: str, name: str) -> None:
    """Raise `InvalidRequest` if an argument of the command line holds a byte that Python could not decode."""
    encoding = sys.getfilesystemencoding()
    fix = "Write it in UTF-8." if encoding == "utf-8" else "Set PYTHONUTF8=1 if it is UTF-8, or write it in ASCII."
    check_decoded(text, name, encoding=encoding, fix=fix)


def has_piped_input() -> bool:
    """Return whether stdin is a pipe or a file, and not a terminal, the null device or that of a notebook's kernel."""
    stdin = sys.stdin
    if stdin is None or stdin.closed or not stdin.readable() or is_notebook():
        return False
    try:
        return not stat.S_ISCHR(os.fstat(stdin.fileno()).st_mode)
    except io.UnsupportedOperation:  # a stream without a file descriptor, such as `io.StringIO`
        return not stdin.isatty()


def read_input() -> str:
    """Return all text of stdin. Raise `InvalidRequest` if it is too long or not text."""
    accept_any_bytes(sys.stdin)
    text = sys.stdin.read(_MAX_INPUT + 1)
    if len(text) > _MAX_INPUT:
        raise InvalidRequest(f"The text in stdin is longer than {_MAX_INPUT:,} characters. Shorten it.")
    if sys.stdin.isatty():
        check_typed(text)
    check_input(text)
    return text.removeprefix("\ufeff").rstrip()
