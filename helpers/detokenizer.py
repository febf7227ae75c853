"""Token ids in, text out as soon as it is certain.

This module knows how a tokenizer writes bytes into tokens, but knows no model. A token is not a unit of text: an emoji
or a Chinese character may take several tokens, and the space before a word belongs to the word's token. If a stream
decodes its tokens one by one, it loses spaces and prints `�`. If it decodes all ids again for each token, the work is
quadratic. Here, each token costs the same, and the text so far is always the certain beginning of
``tokenizer.decode(all ids)``.

Chat models use two families of tokenizers. Both are decoded as by their own decoders (`ByteLevel` and `ByteFallback`
in huggingface/tokenizers, `tokenizers/src/decoders/`). There is one exception: if bytes are not valid UTF-8,
`ByteFallback` loses the valid characters beside them too, and this module does not.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from .chat_template import control_token_ids

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of one answer, token by token.

    - `tokenizer`: a Hugging Face tokenizer.
    - `stop`: the text ends before the stop string that is complete first. Text that may be the beginning of a stop
      string is held back until later tokens decide it. A stop string may contain the spelling of control tokens.
    - `continues`: the ids of the prompt that the text continues. The text is then ``decode(continues + ids)`` without
      ``decode(continues)`` at its beginning, so it keeps the space in front of its first word.
    - `lstrip`: leave out leading spaces.

    Control tokens (`chat_template.control_token_ids`) are not shown. All pieces joined equal ``tokenizer.decode(ids)``
    without their ids, up to the stop string, if the bytes of the answer are valid UTF-8. If not, each sequence of
    invalid bytes is one `�`, as in ``bytes.decode(errors="replace")``. For a tokenizer of another family, the text
    comes at the end, from `finish`.
    """

    def __init__(
        self, tokenizer: Any, *, stop: Sequence[str] = (), continues: Sequence[int] = (), lstrip: bool = False
    ) -> None:
        self._decoder = _decoder_for(tokenizer, list(continues))
        self._control = control_token_ids(tokenizer)
        self._token_of = tokenizer.convert_ids_to_tokens
        self._lstrip = lstrip
        self._held = ""
        self._all = self._shown = _StopStrings([string for string in stop if string])
        self.stopped = False
        """True after a stop string. The text is then complete, and further tokens add nothing."""
        self.length = 0
        """How many characters the tokens so far make, with those that are held back for a stop string."""

    def push(self, token_id: int) -> str:
        """Return the text that becomes certain with this token. It may be empty."""
        token = self._token_of(token_id)
        if token is None:
            return ""
        if token_id not in self._control:
            return self._show(self._decoder.push(token_id, token))
        if not self._all.strings:
            return ""
        return self._show(self._decoder.flush()) + self._hide(token)

    def utf8_of(self, token_id: int) -> bytes:
        """Return the bytes of a token: those that it adds to the text, or the spelling of a control token."""
        token = self._token_of(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._control else self._decoder.utf8_of(token_id, token)

    def finish(self) -> str:
        """Return the rest: the text held back for a stop string, and incomplete bytes as `�`."""
        rest = self._show(self._decoder.finish())
        rest, self._held = rest + self._held, ""
        return rest

    def _show(self, piece: str) -> str:
        """Return what is certain of the text held back and `piece`, up to a stop string. Hold back the rest."""
        if self._lstrip:
            piece = piece.lstrip(" ")
            self._lstrip = not piece
        self.length += len(piece)
        if self.stopped or not self._all.strings:
            return "" if self.stopped else piece
        self._held += piece
        return self._until_stop([strings.push(piece, shown=True) for strings in {self._all, self._shown}])

    def _hide(self, spelling: str) -> str:
        """Return the held-back text that a control token makes certain. Its spelling may complete a stop string."""
        if self.stopped:
            return ""
        if self._shown is self._all:  # from here on, the texts with and without control tokens differ
            self._shown = copy.copy(self._all)
        return self._until_stop([self._all.push(spelling, shown=False)])

    def _until_stop(self, found: list[tuple[int, int] | None]) -> str:
        complete = [match for match in found if match]
        self.stopped = bool(complete)
        if complete:
            _, left_out = max(complete)  # the stop string that is complete first has the most characters after it
        else:
            left_out = max(self._all.held, self._shown.held)
        certain = len(self._held) - left_out
        piece, self._held = self._held[:certain], "" if self.stopped else self._held[certain:]
        return piece


class _StopStrings:
    """A search for stop strings in a text that comes in pieces, some of them not shown."""

    def __init__(self, strings: list[str]) -> None:
        self.strings = strings
        self._text = ""
        self._is_shown: list[bool] = []

    @property
    def held(self) -> int:
        """Return how many shown characters at the end of the text may belong to a stop string."""
        return sum(self._is_shown)

    def push(self, piece: str, *, shown: bool) -> tuple[int, int] | None:
        """Return None, or the place of the stop string that is complete first.

        The place is the number of characters after it, and the number of shown characters from its beginning on.
        """
        text, is_shown = self._text + piece, self._is_shown + [shown] * len(piece)
        found = [(begin + len(string), begin) for string in self.strings if (begin := text.find(string)) >= 0]
        if found:
            end, begin = min(found)
            return len(text) - end, sum(is_shown[begin:])
        first = len(text) - max(_overlap(text, string) for string in self.strings)
        self._text, self._is_shown = text[first:], is_shown[first:]
        return None


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0


class _Decoder(Protocol):
    """A decoder from the tokens of one family to text."""

    def push(self, token_id: int, token: str) -> str:
        """Return the text that becomes certain with this token."""

    def utf8_of(self, token_id: int, token: str) -> bytes:
        """Return the bytes that a token stands for."""

    def flush(self) -> str:
        """Return the text that becomes certain if a control token follows."""

    def finish(self) -> str:
        """Return the rest of the text."""


def _decoder_for(tokenizer: Any, continues: list[int]) -> _Decoder:
    """Return the decoder for the tokenizer's family, which the tokenizer itself declares."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    declared = json.loads(backend.decoder.__getstate__()) if backend and backend.decoder else {}
    if declared.get("type") == "ByteLevel":
        return _ByteLevel()
    steps = declared.get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        space, *_, last = steps
        strip = last.get("start", 0) if last.get("content") == " " and not last.get("stop") else 0
        if "String" in space["pattern"] and (kinds[3:] == [] or strip):
            return _SentencePiece(space["pattern"]["String"], space["content"], 0 if continues else strip)
    return _AtTheEnd(tokenizer, continues)


def _gpt2_bytes() -> dict[str, int]:
    """Return the character that stands for each byte in byte-level BPE (openai/gpt-2, `src/encoder.py`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    return table | {chr(256 + n): b for n, b in enumerate(others)}


class _Bytes:
    """Bytes in UTF-8, decoded to characters as soon as these are complete."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def flush(self) -> str:
        return ""

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteLevel(_Bytes):
    """GPT-2's family: a token is a string of bytes, each written as one printable character."""

    _BYTES = _gpt2_bytes()

    def push(self, token_id: int, token: str) -> str:
        return self._utf8.decode(self.utf8_of(token_id, token))

    def utf8_of(self, token_id: int, token: str) -> bytes:
        try:
            return bytes(self._BYTES[character] for character in token)
        except KeyError:  # a token that was added to the vocabulary as plain text
            return token.encode()


class _SentencePiece(_Bytes):
    """Llama 2's family: `▁` stands for a space, and `<0x..>` for a byte of a character that has no token.

    `strip` spaces are dropped from the beginning of the text.
    """

    def __init__(self, space: str, replacement: str, strip: int) -> None:
        super().__init__()
        self._space, self._replacement, self._strip = space, replacement, strip

    def push(self, token_id: int, token: str) -> str:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return self._stripped(self._utf8.decode(bytes.fromhex(byte[1])))
        return self._stripped(super().finish() + token.replace(self._space, self._replacement))

    def utf8_of(self, token_id: int, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace(self._space, self._replacement).encode()

    def finish(self) -> str:
        return self._stripped(super().finish())

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
            else:
                self._strip, text = self._strip - 1, text[1:]
        return text


class _AtTheEnd:
    """Any other tokenizer: only its own decoding of all ids is certain."""

    def __init__(self, tokenizer: Any, continues: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = continues
        self._returned = len(self._decode(self._ids))

    def push(self, token_id: int, token: str) -> str:
        self._ids.append(token_id)
        return ""

    def utf8_of(self, token_id: int, token: str) -> bytes:
        return self._decode([token_id]).encode()

    def flush(self) -> str:
        return "" if self._decode(self._ids).endswith("�") else self.finish()

    def finish(self) -> str:
        text = self._decode(self._ids)
        piece, self._returned = text[self._returned :], len(text)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
