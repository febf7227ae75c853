"""Hosts and ports as text."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.addresses import bypasses_proxy, clean_host, host_to_ask, is_loopback, join
from helpers.errors import InvalidRequest


@pytest.mark.parametrize(
    ("spelling", "address"),
    [
        ("::1", "[::1]:5"),
        ("[::1]", "[::1]:5"),
        ("0:0:0:0:0:0:0:1", "[::1]:5"),
        ("[0000::0001]", "[::1]:5"),
        ("::", "[::]:5"),
        ("FE80::1%eth0", "[fe80::1%eth0]:5"),
        ("::ffff:127.0.0.1", "127.0.0.1:5"),
        ("127.1", "127.0.0.1:5"),
        (" 127.0.0.1 ", "127.0.0.1:5"),
        ("0.0.0.0", "0.0.0.0:5"),
        ("localhost", "localhost:5"),
        ("service.example", "service.example:5"),
    ],
)
def test_every_spelling_of_a_host_becomes_one_address(spelling: str, address: str) -> None:
    assert join(clean_host(spelling), 5) == address


@pytest.mark.parametrize(
    "wrong", ["", " ", "localhost:5", "[::1]:5", "[]", "http://localhost", "a/b", "me@host", "a b", None, 5, b"::1"]
)
def test_what_is_not_a_host_alone_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not a host. Give a name or an IP address"):
        clean_host(wrong)


def test_a_client_asks_a_service_that_listens_everywhere_on_the_loopback() -> None:
    hosts = ["0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0", "192.0.2.1"]
    assert [host_to_ask(host) for host in hosts] == ["127.0.0.1", "::1", "::1", "::1", "192.0.2.1"]


def test_a_proxy_is_bypassed_for_the_loopback_and_for_what_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost", "LocalHost.", "a.localhost"):
        assert is_loopback(host)
        assert bypasses_proxy(host)
    for host in ("10.0.0.1", "service.example", "localhost.example"):
        assert not is_loopback(host)
        assert not bypasses_proxy(host)
    for name in ("no_proxy", "NO_PROXY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "10.0.0.1,.example")
            assert bypasses_proxy("10.0.0.1")
            assert bypasses_proxy("service.example")
            assert bypasses_proxy("127.0.0.1")
            assert not bypasses_proxy("10.0.0.2")
