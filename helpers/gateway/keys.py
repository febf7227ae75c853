"""API keys: which request may pass. Only hashes of the keys stay in memory, and nothing here is ever logged."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InvalidRequest

VARIABLE = "HELPERS_API_KEYS"
"""The environment variable that holds keys, separated by commas or line ends."""
_SHORTEST = 16
"""Characters. A key is random, not a password, so one round of SHA-256 is enough to hide it."""


class Keys:
    """API keys. Each line is ``KEY`` or ``NAME KEY``; the name appears in metrics and the log. ``#`` begins a comment.

    The constructor raises `InvalidRequest` for a line of another form and for a key of fewer than 16 characters.
    Without keys, every request may pass.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._names: list[tuple[bytes, str]] = []
        for number, line in enumerate(lines, start=1):
            if words := line.partition("#")[0].split():
                self._add(words, number)

    @classmethod
    def load(cls, file: str | Path | None = None) -> Keys:
        """Return the keys in `file` and in the environment variable HELPERS_API_KEYS.

        Raise `InvalidRequest` if the file cannot be read, and if it or the variable is given but holds no key: a
        gateway that was meant to be closed must not be open.
        """
        lines: list[str] = []
        if file is not None:
            try:
                lines += Path(file).expanduser().read_text("utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not text"
                raise InvalidRequest(f"The file of keys {file} cannot be read ({reason}). Name another one.") from None
        variable = os.environ.get(VARIABLE)
        if variable is not None:
            lines += variable.replace(",", "\n").splitlines()
        keys = cls(lines)
        if not keys and (file is not None or variable is not None):
            source = VARIABLE if file is None else file
            raise InvalidRequest(f"{source} holds no key. Write one key on each line.")
        return keys

    def __bool__(self) -> bool:
        return bool(self._names)

    def name_of(self, key: str) -> str | None:
        """Return the name of `key`, or None if it is not one of the keys. The time does not depend on the keys."""
        hashed = _hash(key)
        found = None
        for known, name in self._names:  # all of them, in any case
            if hmac.compare_digest(known, hashed):
                found = name
        return found

    def _add(self, words: list[str], number: int) -> None:
        """Add the key of one line. An error names the line, never the key."""
        if len(words) > 2:
            raise InvalidRequest(f"Line {number} of the keys has {len(words)} words. Write KEY, or NAME KEY.")
        name, key = words if len(words) == 2 else (f"key-{len(self._names) + 1}", words[0])
        if len(key) < _SHORTEST:
            raise InvalidRequest(
                f"The key on line {number} has {len(key)} characters. Use at least {_SHORTEST}, for example those "
                'that `python -c "import secrets; print(secrets.token_urlsafe())"` prints.'
            )
        self._names.append((_hash(key), name))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
