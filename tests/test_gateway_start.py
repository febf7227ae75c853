"""A gateway that a program or a notebook starts: keys, log, refusals, and that nothing is left behind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from background_program import Program
from eventually import until
from helpers.errors import InvalidRequest, ServiceUnavailable
from helpers.gateway.start import start_gateway
from helpers.processes import is_listening
from scripted_service import ScriptedService

pytestmark = pytest.mark.main

CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
PARENT = """
import signal
import sys
from helpers.gateway.start import start_gateway

print("LISTENS", start_gateway(sys.argv[1]).url, flush=True)
signal.pause()
"""


def gateways() -> list[psutil.Process]:
    """Return the gateways that this process has started."""
    return [child for child in psutil.Process().children() if "gateway" in child.cmdline()]


def test_a_started_gateway_answers_those_who_have_a_key_and_stops(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELPERS_API_KEYS", secrets.token_urlsafe())
    key = secrets.token_urlsafe()
    with start_gateway(f"127.0.0.1:{scripted.port}", keys=[f"ada {key}"]) as gateway:
        url = f"{gateway.url}/v1/chat/completions"
        for wrong in ("none", os.environ["HELPERS_API_KEYS"]):
            assert httpx.post(url, json=CHAT, headers={"authorization": f"Bearer {wrong}"}).status_code == 401
        reply = httpx.post(url, json=CHAT, headers={"authorization": f"Bearer {key}"})
        assert reply.json()["choices"][0]["message"]["content"] == "1:0 1:1 1:2 "
        until(lambda: "key=ada" in gateway.log(), "the request is in the log")
        (process,) = gateways()
        assert key not in " ".join(process.cmdline()) and key not in gateway.log()
        assert repr(gateway) == f"<Gateway on {gateway.url}, running>"
    gateway.stop()
    assert repr(gateway) == f"<Gateway on {gateway.url}, stopped>"
    assert not gateways()


def test_without_keys_it_is_open_even_if_the_program_has_keys_of_its_own(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELPERS_API_KEYS", secrets.token_urlsafe())
    with start_gateway(f"127.0.0.1:{scripted.port}") as gateway:
        assert httpx.post(f"{gateway.url}/v1/chat/completions", json=CHAT).status_code == 200


def test_it_ends_with_its_program_even_if_that_is_killed(
    scripted: ScriptedService, script: Callable[..., Program]
) -> None:
    parent = script("-c", PARENT, f"127.0.0.1:{scripted.port}")
    port = int(parent.wait_for("LISTENS").rpartition(":")[2])
    assert is_listening("127.0.0.1", port)
    parent.process.kill()
    parent.process.wait()
    until(lambda: not is_listening("127.0.0.1", port), "the gateway has ended")


@pytest.mark.parametrize(
    ("services", "keys"), [((), ()), (("nowhere",), ()), (("127.0.0.1:1",), ("short",)), (("127.0.0.1:1",), ("a b c",))]
)
def test_what_cannot_work_is_refused_before_anything_starts(services: tuple[str, ...], keys: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest):
        start_gateway(*services, keys=keys)
    assert not gateways()


def test_a_port_that_is_taken_is_refused(scripted: ScriptedService) -> None:
    with pytest.raises(ServiceUnavailable, match=f"Port {scripted.port} is taken"):
        start_gateway("127.0.0.1:1", port=scripted.port)


def test_a_gateway_that_ends_before_it_is_ready_raises_its_reason() -> None:
    several = ("127.0.0.1:1", "service.invalid:1")  # a name beside an address
    with pytest.raises(InvalidRequest, match="service.invalid"):
        start_gateway(*several)
    assert not gateways()
