"""Token ids in, text out as soon as it is certain.

Knows how a tokenizer writes bytes into tokens; knows no model. A token is no unit of text: an emoji
or a Chinese character may take several, and a word's leading space belongs to the token. So a stream
that decodes its tokens one by one loses spaces and prints `�`, and one that decodes everything again
for each token does quadratic work. Here each token costs the same, and at every moment

    what was returned so far  ==  the certain beginning of  tokenizer.decode(all ids)

The two families of tokenizers that chat models use are read exactly as their own decoders read them
(`ByteLevel` and `ByteFallback` in huggingface/tokenizers, `tokenizers/src/decoders/`).
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Callable, Sequence

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer:
    """The text of one answer, token by token.

    `tokenizer` is a Hugging Face tokenizer. The text ends before that string of `stop` which is complete
    first; text that may be the beginning of one is held back until it is decided. All pieces joined equal
    ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)``, cut at
    the stop string. Text of a tokenizer from neither family is certain only at the end, and comes then.
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = ()) -> None:
        self._text = _text_of(tokenizer)
        self._special = {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._token_of = tokenizer.convert_ids_to_tokens
        self._stop = [s for s in stop if s]
        self._held = ""
        self.stopped = False
        """True once a stop string has come: the text is complete, further tokens add nothing."""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; may be empty."""
        if token_id in self._special:
            return ""
        token = self._token_of(token_id)
        return "" if token is None else self._until_stop(self._text.push(token_id, token))

    def finish(self) -> str:
        """The rest: incomplete bytes as `�`, and what was held back for a stop string."""
        rest = self._until_stop(self._text.finish())
        rest, self._held = rest + self._held, ""
        return rest

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            _, begins = min(found)
            return text[:begins]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0


def _text_of(tokenizer: Any) -> "_ByteLevel | _SentencePiece | _AtTheEnd":
    """The reader for this tokenizer's family, chosen by the decoder that it declares itself."""
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
    return _AtTheEnd(
        lambda ids: tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def _gpt2_bytes() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (openai/gpt-2, `src/encoder.py`)."""
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
            raw = bytes(self._BYTES[c] for c in token)
        except KeyError:  # a token that was added as plain text
            raw = token.encode()
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """Llama 2's family: `▁` for a space, and `<0x..>` for each byte of a character that has no token.

    A run of such bytes is decoded as a whole, and one wrong byte makes `�` of all of them: so its text
    is certain when the run ends. Of the whole text, `strip` leading spaces are dropped.
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
    """Any other tokenizer: only its own decoding of the whole is certain."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        return self._decode(self._ids)
