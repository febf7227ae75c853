"""Which hosts a request may name. It stops DNS rebinding: a foreign page whose own name resolves to 127.0.0.1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..addresses import clean_host, is_loopback
from ..errors import InvalidRequest
from .errors import ApiError
from .keys import Keys


def hosts_to_allow(host: str, keys: Keys, listed: Sequence[str] | None) -> Sequence[str] | None:
    """Return `create_app`'s `allowed_hosts` for a gateway that listens on `host`.

    Keys stop foreign pages too, because a browser does not know them. A gateway that listens on a network has names
    that it does not know. So both check only if `listed` names hosts.
    """
    return listed if listed or keys or not is_loopback(host) else ()


class CheckHost:
    """ASGI middleware: refuse a request whose header ``Host`` names neither this machine nor one of `hosts`."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app, self._hosts = app, {_comparable(host) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(host := Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            403,
            f"The host {host!r:.80} is not allowed. Call the gateway as localhost, or name the host with "
            "--allowed-host when you start the gateway.",
            code="host_not_allowed",
        )
        await refusal.response()(scope, receive, send)

    def _allows(self, header: str) -> bool:
        try:
            host = _comparable(re.sub(r":[0-9]*$", "", header))  # without the port
        except InvalidRequest:
            return False
        return is_loopback(host) or host in self._hosts


def _comparable(host: str) -> str:
    return clean_host(host).rstrip(".").lower()
