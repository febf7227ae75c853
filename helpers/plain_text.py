"""What a speaker says is text: no spelling in a message becomes a token that structures the dialog.

A tokenizer reads ``<|im_start|>`` as one special token wherever it stands. This module reads it so only if the chat
template wrote it. In a message, it is encoded as ordinary characters. The tokenizer itself encodes all other messages.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .chat_template import TAG, control_token_ids
from .errors import InvalidRequest


def _secret() -> str:
    """Return random private-use characters. No message contains them, because a client cannot guess them."""
    return "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(8))


_MARK = _secret()
"""What `mark` writes into contents. A chat template copies it as it copies any text."""


def mark(contents: Iterable[str], tokenizer: Any) -> list[str]:
    """Return the contents of messages so that `encode` can tell them apart from the template's text.

    A mark follows each character that begins a special token's spelling, because a template may remove parts of a
    content, and what is left could be a spelling. At the ends of a content,
    it keeps content and template from spelling a token together. Whitespace at the ends stays at the ends, because
    templates strip it. Most contents need no mark.
    """
    spellings = _spellings_of(tokenizer)
    return [spellings.marked(content) for content in contents]


def encode(marked: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that holds contents from `mark`. Only spellings outside of them become special tokens.

    Raise `InvalidRequest` if the tokenizer still makes a special token of a content's characters: some normalisers turn
    other characters, such as ``＜``, into a spelling.
    """
    spellings = _spellings_of(tokenizer)
    text = marked.replace(_MARK, "")
    written = spellings.any.findall(marked)
    own = spellings.checked_among(spellings.ids[spelling] for spelling in written)
    if spellings.any.findall(text) == written:
        ids = tokenizer.encode(text, add_special_tokens=False)
        left = iter(own)
        if all(token_id in left for token_id in spellings.checked_among(ids)):
            return list(ids)
    if encoder := _encoder_of(tokenizer, spellings):
        ids = encoder.encode(spellings.any.sub(lambda found: encoder.secrets.get(found[0], found[0]), marked))
        if spellings.checked_among(ids) == own:
            return ids
    found = [repr(spelling) for spelling in spellings.ids if text.count(spelling) > marked.count(spelling)]
    raise InvalidRequest(
        f"A message contains {' and '.join(found) or 'characters'} that this model's tokenizer can only read as a "
        "special token. Spell it differently."
    )


@dataclass(frozen=True, eq=False)
class _Spellings:
    """The special tokens and control tokens of a tokenizer, by their spelling."""

    ids: dict[str, int]
    any: re.Pattern[str]
    first: re.Pattern[str]
    beginnings: frozenset[str]
    ends: frozenset[str]
    longest: int
    checked_ids: frozenset[int]

    def marked(self, content: str) -> str:
        """Return `content` with its marks."""
        marked = self.first.sub(rf"\g<0>{_MARK}", content)
        text = marked.strip()
        lengths = range(1, self.longest)
        if any(text[:n] in self.ends or text[-n:] in self.beginnings for n in lengths):
            begin = len(marked) - len(marked.lstrip())
            marked = f"{marked[:begin]}{_MARK}{text}{_MARK}{marked[begin + len(text) :]}"
        return marked

    def checked_among(self, ids: Iterable[int]) -> list[int]:
        """Return those of the ids that must not come from a message."""
        return [token_id for token_id in ids if token_id in self.checked_ids]


def _spellings_of(tokenizer: Any) -> _Spellings:
    named = tuple(map(str, tokenizer.all_special_tokens))
    return _read_spellings(tokenizer, str(tokenizer.chat_template), len(tokenizer), named)


@lru_cache(maxsize=16)
def _read_spellings(tokenizer: Any, template: str, size: int, named: tuple[str, ...]) -> _Spellings:
    """Return the spellings. `template` and `size` are only keys of the cache: a tokenizer may change."""
    control = control_token_ids(tokenizer)
    ids = {str(token): tokenizer.convert_tokens_to_ids(token) for token in named}
    ids |= {
        str(token): token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token_id in control
    }
    ids = {spelling: token_id for spelling, token_id in ids.items() if len(spelling.strip()) > 1}
    longest_first = "|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)"
    # every unknown character has this id; GPT-2 ends its answers with it, too
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    firsts = re.escape("".join(sorted({spelling[0] for spelling in ids})))
    # a template may look for a tag in a content, as Qwen's does for </think>
    read = sorted(re.escape(tag[1:]) for tag in set(TAG.findall(template)) - ids.keys())
    cuts = [(spelling, cut) for spelling in ids for cut in range(1, len(spelling))]
    return _Spellings(
        ids=ids,
        any=re.compile(longest_first),
        first=re.compile(f"[{firsts}](?!{'|'.join(read) or '(?!)'})" if ids else "(?!)"),
        beginnings=frozenset(spelling[:cut] for spelling, cut in cuts),
        ends=frozenset(spelling[cut:] for spelling, cut in cuts),
        longest=max(map(len, ids), default=0),
        checked_ids=frozenset(ids.values()) - unknown,
    )


@dataclass(frozen=True, eq=False)
class _Encoder:
    """A copy of a fast tokenizer that knows its special tokens under secret spellings only.

    transformers' ``split_special_tokens`` would change the tokenizer for the requests in all other threads, and for
    added tokens that are not special it does nothing.
    """

    tokenizer: Any
    secrets: dict[str, str]
    ids: dict[str, int]

    def encode(self, marked: str) -> list[int]:
        """Return the ids of a marked text whose special tokens have their secret spellings."""
        encoded = self.tokenizer.encode(marked.replace(_MARK, ""), add_special_tokens=False)
        return [self.ids.get(token, token_id) for token, token_id in zip(encoded.tokens, encoded.ids, strict=True)]


@lru_cache(maxsize=2)  # a copy takes up to 100 MB
def _encoder_of(tokenizer: Any, spellings: _Spellings) -> _Encoder | None:
    """Return the encoder, or None for a tokenizer that is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import AddedToken, Tokenizer

    copied = json.loads(backend.to_str())
    added, copied["added_tokens"] = copied["added_tokens"], []
    copied |= {"post_processor": None, "truncation": None, "padding": None}
    copy = Tokenizer.from_str(json.dumps(copied))
    secret = {token["content"]: _secret() for token in added if token["content"] in spellings.ids}
    ids, tokens = {}, []
    for token in added:
        spelling = secret.get(token["content"], token["content"])
        ids[spelling] = token["id"]
        flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokens.append(AddedToken(spelling, **flags))
    copy.add_tokens(tokens)  # all at once, because each call rebuilds the search for all of them
    return _Encoder(copy, secret, ids)
