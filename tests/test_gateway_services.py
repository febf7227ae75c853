"""The gateway in front of several services: who gets a request, what is sent again, and what the gateway reports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from connections import connections_to
from eventually import until
from helpers.errors import GenerationFailed, InvalidRequest, QueueFull, ServiceUnavailable
from helpers.gateway import create_app
from helpers.gateway.services import Services
from helpers.schemas import ModelOutputDocument, PromptDocument
from scripted_service import ScriptedService, failed, tokens

CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
CHAT_PATH = "/v1/chat/completions"
FULL = QueueFull("The queue is full: 1 request is running and 0 waiting. Ask again in 7 s.")
STOPPED = ServiceUnavailable("The service was stopped before the answer was complete. Start it, and ask again.")


@pytest.fixture
def pair() -> Iterator[list[ScriptedService]]:
    with ScriptedService() as first, ScriptedService() as second:
        yield [first, second]


@pytest.fixture
def client(pair: list[ScriptedService]) -> TestClient:
    return TestClient(create_app([f"127.0.0.1:{service.port}" for service in pair]))


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def ask_until_only(client: TestClient, used: ScriptedService, other: ScriptedService) -> None:
    """Ask until six requests in a row reach `used` only. All are answered."""

    def six_requests_reach_it() -> bool:
        before = len(other.requests)
        for _ in range(6):
            text_of(client.post(CHAT_PATH, json=CHAT))
        return len(other.requests) == before

    until(six_requests_reach_it, "one service gets all requests")


def ask_until_both(client: TestClient, pair: list[ScriptedService]) -> None:
    """Ask until each service has got another request. All are answered."""
    before = [len(service.requests) for service in pair]

    def both_have_one_more() -> bool:
        text_of(client.post(CHAT_PATH, json=CHAT))
        return all(len(service.requests) > count for service, count in zip(pair, before, strict=True))

    until(both_have_one_more, "both services get requests")


# ---- Who gets a request


def test_the_services_take_turns(client: TestClient, pair: list[ScriptedService]) -> None:
    ask_until_both(client, pair)
    before = [len(service.requests) for service in pair]
    for _ in range(6):
        text_of(client.post(CHAT_PATH, json=CHAT))
    assert [len(service.requests) for service in pair] == [count + 3 for count in before]


def test_a_service_that_does_not_serve_is_left_out_and_comes_back(
    client: TestClient, pair: list[ScriptedService]
) -> None:
    ask_until_both(client, pair)
    pair[0].report_health(serving=False)
    ask_until_only(client, pair[1], other=pair[0])
    pair[0].report_health(serving=True)
    ask_until_both(client, pair)


def test_a_service_that_ends_is_left_out_and_comes_back(client: TestClient, pair: list[ScriptedService]) -> None:
    ask_until_both(client, pair)
    pair[0].stop()
    ask_until_only(client, pair[1], other=pair[0])
    pair[0].start()
    ask_until_both(client, pair)


def test_a_running_answer_goes_on_when_its_service_stops_to_serve(
    client: TestClient, pair: list[ScriptedService]
) -> None:
    for service in pair:
        service.script = service.half
    with client.stream("POST", CHAT_PATH, json={**CHAT, "stream": True}) as response:
        until(lambda: any(service.requests for service in pair), "the request has arrived")
        for service in pair:
            service.report_health(serving=False)
        for service in pair:
            service.resume.set()
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


def test_if_no_service_serves_one_of_them_says_why(client: TestClient, pair: list[ScriptedService]) -> None:
    ask_until_both(client, pair)
    for service in pair:
        service.script = lambda _: iter([failed(FULL)])
        service.report_health(serving=False)

    def is_refused() -> bool:
        response = client.post(CHAT_PATH, json=CHAT)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "7"
        return True

    for _ in range(3):  # before and after the health has arrived
        assert is_refused()
    assert client.get("/ready").status_code == 200


# ---- What is sent again


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [FULL, STOPPED], ids=["full", "stopped"])
def test_an_answer_that_fails_before_its_first_token_is_tried_once_more(
    client: TestClient, pair: list[ScriptedService], error: Exception, stream: bool
) -> None:
    attempts: list[Any] = []

    def fail_first(request: Any) -> Iterator[Any]:
        attempts.append(request)
        if len(attempts) == 1:
            yield failed(error)
        else:
            yield from pair[0].count_up(request)

    for service in pair:
        service.script = fail_first
    response = client.post(CHAT_PATH, json={**CHAT, "stream": stream})
    assert response.status_code == 200
    assert response.text.count("finish_reason") and "error" not in response.text
    assert len(attempts) == 2


def test_it_is_tried_only_twice(client: TestClient, pair: list[ScriptedService]) -> None:
    for service in pair:
        service.script = lambda _: iter([failed(STOPPED)])
    assert client.post(CHAT_PATH, json=CHAT).status_code == 503
    assert sum(len(service.requests) for service in pair) == 2


@pytest.mark.parametrize(
    ("begun", "error"),
    [
        (["Half "], STOPPED),
        ([""], STOPPED),  # a token whose text is not certain yet
        ([], InvalidRequest("The prompt is too long. Shorten it.")),
        ([], GenerationFailed("The model failed. Ask again.")),
    ],
    ids=["after a token", "after a token without text", "a wrong request", "a model that fails"],
)
def test_no_other_failure_is_tried_again(
    client: TestClient, pair: list[ScriptedService], begun: list[str], error: Exception
) -> None:
    for service in pair:
        service.script = lambda _: iter([*tokens(*begun), failed(error)])
    assert client.post(CHAT_PATH, json=CHAT).status_code in (400, 500, 503)
    assert sum(len(service.requests) for service in pair) == 1


def test_with_one_service_nothing_is_tried_again(scripted: ScriptedService) -> None:
    scripted.script = lambda _: iter([failed(STOPPED)])
    client = TestClient(create_app(f"127.0.0.1:{scripted.port}"))
    assert client.post(CHAT_PATH, json=CHAT).status_code == 503
    assert len(scripted.requests) == 1


# ---- What the gateway reports


def test_the_metrics_show_each_service(client: TestClient, pair: list[ScriptedService]) -> None:
    first, second = (f'service_up{{service="127.0.0.1:{service.port}"}}' for service in pair)
    lines = client.get("/metrics").text.splitlines()
    assert f"{first} 1.0" in lines and f"{second} 1.0" in lines
    pair[0].stop()
    lines = client.get("/metrics").text.splitlines()
    assert f"{first} 0.0" in lines and f"{second} 1.0" in lines
    assert client.get("/ready").status_code == 200
    pair[1].stop()
    assert client.get("/ready").status_code == 503


def test_services_with_different_models_answer_nothing(client: TestClient, pair: list[ScriptedService]) -> None:
    pair[0].model = "another"
    for response in (client.get("/ready"), client.get("/v1/models"), client.post(CHAT_PATH, json=CHAT)):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "models_differ"
        assert "another, scripted. Start all of them with the same --model." in response.text
    pair[0].model = "scripted"
    assert client.get("/ready").status_code == 200


# ---- Addresses


def test_a_name_stands_for_all_its_addresses(scripted: ScriptedService) -> None:
    client = TestClient(create_app(f"localhost:{scripted.port}"))
    assert text_of(client.post(CHAT_PATH, json=CHAT)) == "1:0 1:1 1:2 "
    assert f'service_up{{service="127.0.0.1:{scripted.port}"}} 1.0' in client.get("/metrics").text


def test_a_name_without_an_address_is_unavailable() -> None:
    client = TestClient(create_app("no-such-host.invalid:12345"))
    assert client.get("/ready").status_code == 503
    assert 'service_up{service="no-such-host.invalid:12345"} 0.0' in client.get("/metrics").text


@pytest.mark.parametrize("other", ["localhost:5", "[::1]:5"])
def test_several_services_need_addresses_of_one_version(other: str) -> None:
    with pytest.raises(InvalidRequest, match="Give addresses of one version, or a single name"):
        create_app(["127.0.0.1:5", other])


def test_a_call_that_is_left_ends(scripted: ScriptedService) -> None:
    """A call that does not end keeps its memory, and its connection even after `close`."""
    services = Services([f"127.0.0.1:{scripted.port}"])
    endless = PromptDocument(prompt="Tell me everything.", max_tokens=1_000_000)

    async def leave() -> None:
        async with aclosing(services.call("/stream", endless, ModelOutputDocument).documents_async()) as documents:
            await anext(documents)

    async def leave_and_close() -> None:
        for _ in range(20):
            await leave()
        await services.close()

    asyncio.run(leave_and_close())
    until(lambda: not connections_to(scripted.port), "the connection is closed")
