"""Token ids in, text out as soon as it is certain.

This module knows how a tokenizer writes bytes into tokens, but knows no model. A token is not a unit of text: an emoji
or a Chinese character may take several tokens, and the space before a word belongs to the word's token. If a stream
decodes its tokens one by one, it loses spaces and prints `�`. If it decodes all ids again for each token, the work is
quadratic. Here, each token costs the same, and the text so far is always the certain beginning of
``tokenizer.decode(all ids)``.

Chat models use two families of tokenizers. Both are decoded exactly as by their own decoders (`ByteLevel` and
`ByteFallback` in huggingface/tokenizers, `tokenizers/src/decoders/`).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of one answer, token by token.

    - `tokenizer`: a Hugging Face tokenizer.
    - `stop`: the text ends before the stop string that is complete first. Text that may be the beginning of a stop
      string is held back until later tokens decide it.

    All pieces joined equal ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)``, up
    to the stop string. For a tokenizer of another family, `finish` returns the whole text at the end.
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = ()) -> None:
        self._decoder = _decoder_for(tokenizer)
        self._special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._token_of = tokenizer.convert_ids_to_tokens
        self._stop = [string for string in stop if string]
        self._held = ""
        self.stopped = False
        """True after a stop string. The text is then complete, and further tokens add nothing."""

    def push(self, token_id: int) -> str:
        """Return the text that becomes certain with this token. It may be empty."""
        if token_id in self._special:
            return ""
        token = self._token_of(token_id)
        return "" if token is None else self._until_stop(self._decoder.push(token_id, token))

    def finish(self) -> str:
        """Return the rest: the text held back for a stop string, and incomplete bytes as `�`."""
        rest = self._until_stop(self._decoder.finish())
        rest, self._held = rest + self._held, ""
        return rest

    def _until_stop(self, piece: str) -> str:
        """Return what is certain of the text held back and `piece`, up to a stop string. Hold back the rest."""
        if self.stopped:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(begin + len(string), begin) for string in self._stop if (begin := text.find(string)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            _, begin = min(found)
            return text[:begin]
        keep = max(_overlap(text, string) for string in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


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

    def finish(self) -> str:
        """Return the rest of the text."""


def _decoder_for(tokenizer: Any) -> _Decoder:
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
            return _SentencePiece(space["pattern"]["String"], space["content"], strip)
    return _AtTheEnd(lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _gpt2_bytes() -> dict[str, int]:
    """Return the character that stands for each byte in byte-level BPE (openai/gpt-2, `src/encoder.py`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    return table | {chr(256 + n): b for n, b in enumerate(others)}


class _ByteLevel:
    """GPT-2's family: a token is a string of bytes, each written as one printable character."""

    _BYTES = _gpt2_bytes()

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        try:
            raw = bytes(self._BYTES[character] for character in token)
        except KeyError:  # a token that was added to the vocabulary as plain text
            raw = token.encode()
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """Llama 2's family: `▁` stands for a space, and `<0x..>` for a byte of a character that has no token.

    A run of such bytes is decoded as a whole, and one invalid byte turns all of it into `�`, so the text of a run is
    certain when the run ends. `strip` spaces are dropped from the beginning of the text.
    """

    def __init__(self, space: str, replacement: str, strip: int) -> None:
        self._space, self._replacement, self._strip = space, replacement, strip
        self._run = bytearray()

    def push(self, token_id: int, token: str) -> str:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_run() + token.replace(self._space, self._replacement))

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "�" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
            else:
                self._strip, text = self._strip - 1, text[1:]
        return text


class _AtTheEnd:
    """Any other tokenizer: only its own decoding of all ids is certain."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        return self._decode(self._ids)
