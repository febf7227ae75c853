"""What a terminal shows, what a pipe gets, and what is read from stdin."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext

import pytest

from helpers.errors import HelpersError, InvalidRequest
from helpers.terminal import has_piped_input, open_streams, read_input, visible, write

HARMFUL = "\x1b]0;title\x07 \x1b[2J \x9b2J \r \x08 \x7f \x00 \u202e \u2066 \u2069"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_control_characters_are_text_on_a_terminal_and_unchanged_in_a_pipe() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        write(f"a\tb\n{HARMFUL}é 🦙 שלום", stream, end="")
    assert pipe.getvalue() == f"a\tb\n{HARMFUL}é 🦙 שלום"
    assert terminal.getvalue() == (
        r"a	b" + "\n" + r"\x1b]0;title\x07 \x1b[2J \x9b2J \r \x08 \x7f \x00 \u202e \u2066 \u2069" + "é 🦙 שלום"
    )


def test_every_character_that_controls_a_terminal_is_escaped() -> None:
    obeyed = [*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    kept = [number for number in obeyed if visible(chr(number)) == chr(number)]
    assert kept == [ord("\t"), ord("\n")]
    others = "".join(chr(number) for number in range(0x2000) if number not in obeyed)
    assert visible(others) == others


def test_a_closed_stream_is_replaced_so_that_nothing_else_takes_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    open_streams()
    opened = sys.stdin, sys.stdout, sys.stderr
    assert sys.stdin.read() == "" and print("gone") is None and print("gone", file=sys.stderr) is None
    for stream in opened:
        stream.close()


def test_nothing_is_written_to_a_stream_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    write("a note", None)
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_an_error_for_an_answer_but_not_for_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HelpersError, match=r"cannot be written \(No space left on device\)\. Free some space"):
        write("an answer", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    write("a note", sys.stderr)


# --- stdin ----------------------------------------------------------------------------------------


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"What is it?\n", "What is it?"),
        (b"  if a:\r\n    b\r\n", "  if a:\n    b"),
        ("\ufeffGrüße 🦙".encode(), "Grüße 🦙"),
        (b"", ""),
    ],
)
def test_stdin_is_read_as_text(monkeypatch: pytest.MonkeyPatch, content: bytes, text: str) -> None:
    set_stdin(monkeypatch, content)
    assert has_piped_input()
    assert read_input() == text


@pytest.mark.parametrize(("content", "encoding"), [("Grüße".encode("latin-1"), "utf-8"), ("Grüße".encode(), "ascii")])
def test_bytes_that_are_not_text_are_named_with_the_encoding_and_its_variable(
    monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str
) -> None:
    set_stdin(monkeypatch, content, encoding)
    with pytest.raises(InvalidRequest, match=rf"byte 0x{content[2]:02x}.* {encoding}\. Set PYTHONIOENCODING "):
        read_input()


def test_an_endless_pipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stdin(monkeypatch, b"y\n" * 1_000_000)
    with pytest.raises(InvalidRequest, match="longer than 1,000,000 characters"):
        read_input()


class Typed(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_line_that_the_terminal_may_have_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, is_cut in ((4095, True), (4094, sys.platform == "darwin")):
        text = f"Hello\n{'é' * (number // 2)}{'x' * (number % 2)}\nBye\n"
        monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(text.encode()), encoding="utf-8"))
        with pytest.raises(InvalidRequest, match=f"A line has {number} bytes") if is_cut else nullcontext():
            assert read_input() == text.rstrip()
    set_stdin(monkeypatch, b"x" * 5000)
    assert len(read_input()) == 5000


def test_a_terminal_and_a_closed_stdin_hold_no_piped_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for stdin in (None, Terminal(), open("/dev/null")):  # noqa: SIM115  closed below
        monkeypatch.setattr(sys, "stdin", stdin)
        assert not has_piped_input()
        if stdin:
            stdin.close()
            assert not has_piped_input()
