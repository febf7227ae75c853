"""Foreign pages in a browser: what they may send to a gateway without keys, and under which names it answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from helpers.errors import InvalidRequest
from helpers.gateway import Keys, create_app
from helpers.gateway.hosts import hosts_to_allow
from running_gateway import running_gateway
from scripted_service import ScriptedService
from test_gateway import CHAT, CHAT_PATH, error_of

KEY = "a-key-of-some-length"


def client_of(service: ScriptedService, **options: Any) -> TestClient:
    return TestClient(create_app(f"127.0.0.1:{service.port}", **options))


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.:80",
        "127.0.0.1:8000",
        "127.8.8.8",
        "[::1]:8000",
        "[0:0::1]",
        "a.Org:9",
    ],
)
def test_a_request_may_name_this_machine_or_a_listed_host(scripted: ScriptedService, host: str) -> None:
    client = client_of(scripted, allowed_hosts=["A.org."])
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example:8000", "evil@localhost", "192.168.0.1", "::1", "[::2]:80", "b.a.org", ""],
)
def test_a_request_that_names_another_host_does_not_reach_the_model(scripted: ScriptedService, host: str) -> None:
    client = client_of(scripted, allowed_hosts=["a.org"], cors=["http://evil.example"])
    for path in (CHAT_PATH, "/v1/nothing"):
        error = error_of(client.post(path, json=CHAT, headers={"host": host}), 403)
        assert error["code"] == "host_not_allowed"
    error_of(client.get("/health", headers={"host": host}), 403)
    assert not scripted.requests


def test_a_mounted_gateway_answers_under_every_name_by_default(scripted: ScriptedService) -> None:
    assert client_of(scripted).get("/health", headers={"host": "anything.example"}).status_code == 200


def test_a_host_that_is_not_one_is_refused(scripted: ScriptedService) -> None:
    with pytest.raises(InvalidRequest, match="is not a host"):
        client_of(scripted, allowed_hosts=["https://a.org"]).get("/health")


@pytest.mark.parametrize(
    ("host", "keys", "listed", "allowed"),
    [
        ("127.0.0.1", [], None, ()),
        ("::1", [], None, ()),
        ("localhost", [], ["a.org"], ["a.org"]),
        ("127.0.0.1", [KEY], None, None),
        ("127.0.0.1", [KEY], ["a.org"], ["a.org"]),
        ("0.0.0.0", [], None, None),
        ("0.0.0.0", [], ["a.org"], ["a.org"]),
    ],
)
def test_only_an_open_gateway_on_this_machine_checks_the_host_unasked(
    host: str, keys: list[str], listed: Any, allowed: Any
) -> None:
    assert hosts_to_allow(host, Keys(keys), listed) == allowed


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "text/plain; application/json", "multipart/form-data", "application/x-www-form-urlencoded"],
)
def test_what_a_browser_sends_across_origins_without_asking_does_not_reach_the_model(
    scripted: ScriptedService, kind: str | None
) -> None:
    headers = {"origin": "https://evil.example", **({"content-type": kind} if kind else {})}
    with running_gateway(scripted.port) as gateway:
        for path in (CHAT_PATH, "/v1/completions", "/v1/responses"):
            response = httpx.post(f"{gateway.root}{path}", content=json.dumps(CHAT), headers=headers)
            error_of(response, 415)
            assert "access-control-allow-origin" not in response.headers
    assert not scripted.requests
