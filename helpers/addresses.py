"""Hosts and ports as text: one form for all spellings of an address. This module never uses the network."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.request import proxy_bypass

from .errors import InvalidRequest

_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")


def clean_host(host: Any) -> str:
    """Return `host` without brackets, and an IP address in its shortest form: ``[0:0:0:0:0:0:0:1]`` is ``::1``.

    Raise `InvalidRequest` if `host` is anything else, such as a URL or an address with a port.
    """
    if not isinstance(host, str):
        raise InvalidRequest(f"{host!r} is not a host. Give a name or an IP address, such as 127.0.0.1.")
    name = host.strip()
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if (address := _ip_address(name)) is not None:
        return str(address)
    if not name or any(character in ":/@[]?#" or character.isspace() for character in name):
        raise InvalidRequest(
            f"{host!r} is not a host. Give a name or an IP address alone, such as 127.0.0.1, and the port separately."
        )
    return name


def host_to_ask(host: Any) -> str:
    """Return the host that a client connects to: the loopback address if a service listens on all (0.0.0.0, ::)."""
    name = clean_host(host)
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)


def join(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address."""
    return f"{bracketed(host)}:{port}"


def split(address: str) -> tuple[str, int]:
    """Return the host and the port of ``host:port``, as `join` writes it. Raise `InvalidRequest` if it is not that."""
    host, colon, port = address.strip().rpartition(":")
    is_open = ":" in host and not host.startswith("[")
    if not colon or is_open or not (port.isascii() and port.isdecimal() and int(port[:6]) <= 65535):
        raise InvalidRequest(f"{address!r} is not HOST:PORT. Write it like 127.0.0.1:12345 or [::1]:12345.")
    return clean_host(host), int(port)


def bracketed(host: str) -> str:
    """Return `host` as it stands in front of a port: an IPv6 address in brackets, any other host as it is."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Return whether `host` is an address or the name of this machine's loopback interface."""
    if (address := _ip_address(host)) is not None:
        return address.is_loopback
    name = host.rstrip(".").lower()
    return name in _LOOPBACK_NAMES or name.endswith(".localhost")


def bypasses_proxy(host: str) -> bool:
    """Return whether `host` is reached without a proxy: a loopback address, or one that ``no_proxy`` names."""
    return is_loopback(host) or bool(proxy_bypass(host))


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address that `host` spells, or None for a name. ``127.1`` is an address, as for ping and curl."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return None if len(host.split()) != 1 else ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(address, "ipv4_mapped", None) or address
