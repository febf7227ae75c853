"""The gateway in front of a scripted service: fields, failures, keys, limits, and clients that leave."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from helpers.errors import GenerationFailed, InvalidRequest, QueueFull
from helpers.gateway import Keys, create_app
from helpers.gateway.server import HttpProtocol
from helpers.schemas import ModelOutputDocument
from running_gateway import RunningGateway, running_gateway
from scripted_service import ScriptedService, failed, last, tokens

KEY, OTHER_KEY = "a-key-of-some-length", "another-key-of-some-length"
CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
CHAT_PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USAGE = {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}, "dropped_turns": 0}


@pytest.fixture
def client(scripted: ScriptedService) -> TestClient:
    return TestClient(create_app(f"127.0.0.1:{scripted.port}"))


@pytest.fixture
def gateway(scripted: ScriptedService) -> Iterator[RunningGateway]:
    with running_gateway(scripted.port, keep_alive=0.05) as running:
        yield running


def events_of(text: str) -> list[Any]:
    """Return the data of each event; the end, [DONE], as a text."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, whose shape is OpenAI's."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)


# ---- Answers


def test_a_chat_is_answered(client: TestClient) -> None:
    reply = client.post(CHAT_PATH, json=CHAT).json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "scripted"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "1:0 1:1 1:2 ", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert reply["usage"] == USAGE | {"completion_tokens": 3, "total_tokens": 8}


def test_a_streamed_chat_begins_with_the_role_and_ends_with_done(client: TestClient) -> None:
    response = client.post(CHAT_PATH, json={**CHAT, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        *({"content": f"1:{n} "} for n in range(3)),
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert not any("usage" in chunk for chunk in chunks)


def test_the_usage_comes_in_a_chunk_of_its_own_if_the_client_asks_for_it(client: TestClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    *chunks, usage, _ = events_of(client.post(CHAT_PATH, json={**CHAT, **options}).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == USAGE | {"completion_tokens": 6, "total_tokens": 11}


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_is_a_complete_answer(client: TestClient, stream: bool) -> None:
    response = client.post(CHAT_PATH, json={**CHAT, "n": 3, "stream": stream})
    texts = {0: "", 1: "", 2: ""}
    if stream:
        for chunk in events_of(response.text)[:-1]:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        texts = {choice["index"]: choice["message"]["content"] for choice in response.json()["choices"]}
    assert sorted(texts.values()) == [f"{n}:0 {n}:1 {n}:2 " for n in (1, 2, 3)]


def test_each_choice_has_a_seed_of_its_own(client: TestClient, scripted: ScriptedService) -> None:
    client.post(CHAT_PATH, json={**CHAT, "n": 3, "seed": 2**31 + 5})
    assert sorted(request.seed for request in scripted.requests) == [5, 6, 7]


def test_a_raw_prompt_is_continued(client: TestClient, scripted: ScriptedService) -> None:
    body = {"model": "scripted", "prompt": ["One", "Two"], "max_tokens": 2, "n": 2}
    reply = client.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["prompt_tokens"] == 10  # each prompt once
    assert sorted(request.prompt for request in scripted.requests) == ["One", "One", "Two", "Two"]


def test_a_raw_prompt_is_streamed(client: TestClient) -> None:
    body = {"model": "scripted", "prompt": "One", "max_tokens": 2, "stream": True}
    *chunks, done = events_of(client.post("/v1/completions", json=body).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["1:0 ", "1:1 ", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"


def test_the_service_gets_the_fields_of_the_request(client: TestClient, scripted: ScriptedService) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "END"}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hello", "name": "Ada"},
    ]
    client.post(CHAT_PATH, json={"model": "scripted", "messages": messages, "max_completion_tokens": 7, **fields})
    (request,) = scripted.requests
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (7, 0.5, 0.9, 3)
    assert request.stop == ["END"]


def test_without_max_tokens_an_answer_may_take_half_of_the_context_window(
    client: TestClient, scripted: ScriptedService
) -> None:
    client.post(CHAT_PATH, json={**CHAT, "max_tokens": None})
    assert scripted.requests[0].max_tokens == 256


def test_no_text_in_a_stream_can_break_a_line(client: TestClient, scripted: ScriptedService) -> None:
    text = "a\u2028b\x85c\nd\r\n\x1ce 😀"

    def script(_: Any) -> Iterator[Any]:
        yield from tokens(text)
        yield last("stop")

    scripted.script = script
    body = client.post(CHAT_PATH, json={**CHAT, "stream": True}).text
    lines = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line and "[DONE]" not in line]
    assert "".join(line["choices"][0]["delta"].get("content", "") for line in lines) == text


# ---- What is refused

NO_EFFECT = [
    {"tools": []},
    {"tools": None, "response_format": None, "anything": None},
    {"tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"logprobs": False, "top_logprobs": 0},
    {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0},
    {"user": "u-1", "metadata": {"a": "b"}, "store": False},
    {"stream": None, "n": None, "temperature": None, "stop": None, "seed": None},
]
NOT_SUPPORTED = [
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}),
    ("logit_bias", {"1": 100}),
    ("presence_penalty", 0.1),
    ("audio", {"voice": "alloy"}),
    ("modalities", ["text", "audio"]),
    ("web_search_options", {}),
    ("store", True),
    ("top_k", 5),
    ("colour", "red"),
]


@pytest.mark.parametrize("fields", NO_EFFECT, ids=str)
def test_a_field_that_has_no_effect_is_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert client.post(CHAT_PATH, json={**CHAT, **fields}).status_code == 200


@pytest.mark.parametrize(("name", "value"), NOT_SUPPORTED)
def test_a_field_that_is_not_supported_is_refused_by_name(
    client: TestClient, scripted: ScriptedService, name: str, value: Any
) -> None:
    error = error_of(client.post(CHAT_PATH, json={**CHAT, name: value}), 400)
    assert (error["param"], error["code"], error["type"]) == (name, "unsupported_parameter", "invalid_request_error")
    assert name in error["message"]
    assert not scripted.requests


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": None}, "messages is missing"),
        ({"messages": "Hello"}, "list of messages"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "tools are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "JSON"),
        ({"model": None}, "model is missing"),
        ({"n": 0}, "n is wrong"),
        ({"n": 17}, "n is wrong"),
        ({"n": True}, "n is wrong"),
        ({"max_tokens": "3"}, "max_tokens is wrong"),
        ({"max_completion_tokens": 4}, "max_completion_tokens differ"),
        ({"temperature": 2.1}, "temperature is wrong"),
        ({"stop": ["a"] * 17}, "17 stop strings"),
        ({"logprobs": 0}, "logprobs is wrong"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is wrong"),
        ({"top_logprobs": 2}, "top_logprobs is 2, but log-probabilities are off. Set logprobs to true"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_it(client: TestClient, fields: dict[str, Any], words: str) -> None:
    content = json.dumps({**CHAT, **fields})
    assert words in error_of(client.post(CHAT_PATH, content=content, headers=JSON), 400)["message"]


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]], [], ["a", 1], {"a": 1}, ["a"] * 17], ids=str)
def test_a_prompt_must_be_text(client: TestClient, prompt: Any) -> None:
    error_of(client.post("/v1/completions", json={"model": "scripted", "prompt": prompt}), 400)


def test_a_model_that_the_service_does_not_run_is_a_404(client: TestClient) -> None:
    error = error_of(client.post(CHAT_PATH, json={**CHAT, "model": "gpt-5"}), 404)
    assert error["code"] == "model_not_found"
    assert "'scripted'" in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[]", JSON, 400),
        (b"", JSON, 400),
        (b"\xff", JSON, 400),
        (b'{"model": NaN}', JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b"{}", {}, 415),
        (b"{}", {"content-type": "text/plain"}, 415),
        (gzip.compress(b" " * 1000, mtime=0), {**JSON, "content-encoding": "gzip"}, 415),
        (b" " * (8 * 2**20 + 1), JSON, 413),
        (iter([b" " * 2**20] * 9), JSON, 413),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_body_that_is_not_small_plain_json_is_refused(
    client: TestClient, content: Any, headers: dict[str, str], status: int
) -> None:
    error_of(client.post(CHAT_PATH, content=content, headers=headers), status)


def test_an_unknown_path_or_method_is_an_error_in_openais_shape(client: TestClient) -> None:
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.put("/v1/models"), 405)


# ---- Failures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (InvalidRequest("The question is too long. Shorten it."), 400, None),
        (QueueFull("The queue is full. Ask again in 7 s."), 429, "rate_limit_exceeded"),
        (GenerationFailed("The model failed. Ask again."), 500, "generation_failed"),
    ],
)
def test_a_failure_before_the_first_token_has_a_status_of_its_own(
    client: TestClient, scripted: ScriptedService, failure: Exception, status: int, code: str, stream: bool
) -> None:
    scripted.script = lambda _: iter([failed(failure)])
    response = client.post(CHAT_PATH, json={**CHAT, "stream": stream})
    error = error_of(response, status)
    assert (error["message"], error["code"]) == (str(failure), code)
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
def test_a_failure_in_the_middle_of_a_stream_is_an_event_and_no_done(
    client: TestClient, scripted: ScriptedService, path: str
) -> None:
    scripted.script = scripted.fail
    question = {"prompt": "Hello"} if path == "/v1/completions" else {"messages": CHAT["messages"]}
    response = client.post(path, json={"model": "scripted", "stream": True, **question})
    *chunks, error = events_of(response.text)
    assert response.status_code == 200
    assert chunks
    assert error["error"]["message"] == "The question is refused. Ask another one."


def test_if_one_choice_fails_the_request_fails(client: TestClient, scripted: ScriptedService) -> None:
    def script(request: Any) -> Iterator[Any]:
        return scripted.refuse(request) if len(scripted.requests) == 2 else scripted.silence(request)

    scripted.script = script
    error_of(client.post(CHAT_PATH, json={**CHAT, "n": 3}), 400)


def test_without_a_service_the_gateway_lives_and_is_not_ready(scripted: ScriptedService, client: TestClient) -> None:
    assert client.get("/ready").status_code == 200
    scripted.stop()
    assert client.get("/health").status_code == 200
    assert error_of(client.get("/ready"), 503)["code"] == "service_unavailable"
    error_of(client.post(CHAT_PATH, json=CHAT), 503)
    error_of(client.get("/v1/models"), 503)
    assert f'service_up{{service="127.0.0.1:{scripted.port}"}} 0.0' in client.get("/metrics").text
    scripted.start()
    assert client.get("/ready").status_code == 200
    assert client.post(CHAT_PATH, json=CHAT).status_code == 200
    assert f'service_up{{service="127.0.0.1:{scripted.port}"}} 1.0' in client.get("/metrics").text


def test_an_unexpected_exception_is_logged_without_its_text(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret question")

    monkeypatch.setattr("helpers.gateway.chat.build_request", fail)
    with caplog.at_level(logging.INFO):
        response = client.post(CHAT_PATH, json=CHAT)
    assert "RuntimeError" in error_of(response, 500)["message"]
    assert response.headers["x-request-id"] in caplog.text
    assert "RuntimeError" in caplog.text
    assert "secret" not in response.text + caplog.text


# ---- Keys


def test_with_keys_only_the_state_of_the_gateway_is_open(scripted: ScriptedService) -> None:
    client = TestClient(create_app(f"127.0.0.1:{scripted.port}", keys=[KEY, f"ada {OTHER_KEY}"]))
    for header in (None, f"Bearer {KEY}x", f"Basic {KEY}", "Bearer ", "Bearer \xff"):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        for path in ("/v1/models", "/v1/models/scripted", "/metrics"):
            assert error_of(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        error_of(client.post(CHAT_PATH, json=CHAT, headers=headers), 401)
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    for key in (KEY, OTHER_KEY):
        response = client.post(CHAT_PATH, json=CHAT, headers={"authorization": f"Bearer {key}"})
        assert response.status_code == 200
    metrics = client.get("/metrics", headers={"authorization": f"bearer {KEY}"}).text
    assert 'gateway_prompt_tokens_total{key="ada"} 5.0' in metrics
    assert 'gateway_prompt_tokens_total{key="key-1"} 5.0' in metrics


def test_a_key_is_checked_before_the_body_is_read(scripted: ScriptedService) -> None:
    client = TestClient(create_app(f"127.0.0.1:{scripted.port}", keys=[KEY]))
    error_of(client.post(CHAT_PATH, content=b"{" * 9_000_000), 401)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\nada {KEY}  # hers\n")
    monkeypatch.setenv("HELPERS_API_KEYS", f"bob {OTHER_KEY}, {KEY[::-1]}")
    keys = Keys.load(file)
    assert [keys.name_of(key) for key in (KEY, OTHER_KEY, KEY[::-1], "else")] == ["ada", "bob", "key-3", None]
    assert KEY not in repr(vars(keys))


def test_keys_that_were_meant_to_exist_must_exist(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Keys.load()
    (tmp_path / "empty").write_text("# none yet\n")
    for file in (tmp_path / "empty", tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidRequest):
            Keys.load(file)
    monkeypatch.setenv("HELPERS_API_KEYS", "")
    with pytest.raises(InvalidRequest, match="HELPERS_API_KEYS holds no key"):
        Keys.load()


@pytest.mark.parametrize("line", ["too-short", f"a b {KEY}"])
def test_an_error_about_a_key_does_not_show_it(line: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        Keys([line])
    assert line.split()[-1] not in str(raised.value)


def test_a_page_of_another_origin_may_call_only_if_it_is_named(scripted: ScriptedService) -> None:
    address, headers = f"127.0.0.1:{scripted.port}", {"origin": "https://chat.example.org"}
    asks = {**headers, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    client = TestClient(create_app(address, cors=["https://chat.example.org"], keys=[KEY]))
    assert client.options(CHAT_PATH, headers=asks).headers["access-control-allow-origin"] == headers["origin"]
    refused = client.post(CHAT_PATH, json=CHAT, headers=headers)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == headers["origin"]
    client = TestClient(create_app(address))
    for response in (client.options(CHAT_PATH, headers=asks), client.get("/health", headers=headers)):
        assert "access-control-allow-origin" not in response.headers


# ---- Ids, log and metrics


def test_a_request_has_an_id_in_its_answer_and_in_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "helpers.gateway"):
        given = client.post(CHAT_PATH, json=CHAT, headers={"x-request-id": "trace-1"})
        made = client.get("/v1/nothing", headers={"x-request-id": "a\tb" * 40})
    assert given.headers["x-request-id"] == "trace-1"
    assert made.headers["x-request-id"].startswith("req-")
    first, second = caplog.messages
    assert first.startswith("POST /v1/chat/completions 200 id=trace-1 prompt_tokens=5 completion_tokens=3 ")
    assert second.startswith(f"GET other 404 id={made.headers['x-request-id']} ")


def test_no_text_of_a_request_or_an_answer_is_logged(
    client: TestClient, scripted: ScriptedService, caplog: pytest.LogCaptureFixture
) -> None:
    question = {"model": "scripted", "messages": [{"role": "user", "content": "My secret"}], "max_tokens": 2}
    with caplog.at_level(logging.DEBUG):
        for fields in ({}, {"stream": True}, {"n": 99}, {"My secret": 1}, {"model": "My secret"}):
            client.post(CHAT_PATH, json={**question, **fields})
        scripted.script = scripted.fail
        client.post(CHAT_PATH, json={**question, "stream": True})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("helpers")]
    assert len(ours) == 6
    assert not any(word in line for line in ours for word in ("secret", "Half", "1:0"))


def test_the_metrics_count_requests_tokens_and_failures(client: TestClient, scripted: ScriptedService) -> None:
    client.post(CHAT_PATH, json=CHAT)
    client.post(CHAT_PATH, json={**CHAT, "n": -1})
    client.post(CHAT_PATH, json={**CHAT, "n": 2})
    scripted.script = scripted.fail
    client.post(CHAT_PATH, json={**CHAT, "stream": True})
    scripted.script = lambda _: told_by_the_service(cached_tokens=next(cached), queue_seconds=4.0)
    cached = iter([4, 2, 3])
    usage = client.post(CHAT_PATH, json={**CHAT, "n": 3}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'gateway_requests_total{key="",method="POST",route="/v1/chat/completions",status="200"} 4.0',
        'gateway_requests_total{key="",method="POST",route="/v1/chat/completions",status="400"} 1.0',
        'gateway_stream_failures_total{code="invalid_request"} 1.0',
        'gateway_prompt_tokens_total{key=""} 20.0',
        'gateway_cached_prompt_tokens_total{key=""} 2.0',  # the answer that read the prompt for the others
        'gateway_completion_tokens_total{key=""} 14.0',
        "gateway_time_to_first_token_seconds_count 4.0",
        "gateway_queue_time_seconds_count 3.0",  # the other services do not tell
        "gateway_queue_time_seconds_sum 12.0",
        'gateway_queue_time_seconds_bucket{le="2.5"} 0.0',
        'gateway_queue_time_seconds_bucket{le="5.0"} 3.0',
        "gateway_inter_token_latency_seconds_count 7.0",
        f'service_requests_running{{service="127.0.0.1:{scripted.port}"}} 0.0',
    ):
        assert line in lines


def told_by_the_service(**fields: Any) -> Iterator[Any]:
    """Yield an answer of one token, whose first document carries `fields`."""
    first = ModelOutputDocument(token_id=1, generated_text="Hi", prompt_tokens=5, **fields)
    yield first
    yield last("stop").model_copy(update=fields)


def test_the_description_lists_schemas_and_errors(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(
        description["paths"]
    )
    chat = description["paths"][CHAT_PATH]["post"]
    assert {"200", "400", "401", "413", "429", "503"} <= set(chat["responses"])
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert description["components"]["schemas"]["ChatCompletionRequest"]["properties"]["messages"]["items"]
    assert client.get("/docs").status_code == 404  # that page would load scripts from another site
    operations = [one for path in description["paths"].values() for one in path.values()]
    assert not any("422" in operation["responses"] for operation in operations)
    assert description["components"]["schemas"]["ChatCompletionRequest"]["examples"]


def test_a_gateway_can_be_mounted_in_another_app(scripted: ScriptedService) -> None:
    app = FastAPI()
    app.mount("/llm", create_app(f"127.0.0.1:{scripted.port}", keys=[KEY]))
    client = TestClient(app)
    assert client.post(f"/llm{CHAT_PATH}", json=CHAT).status_code == 401
    response = client.post(f"/llm{CHAT_PATH}", json=CHAT, headers={"authorization": f"Bearer {KEY}"})
    assert response.json()["choices"][0]["message"]["content"] == "1:0 1:1 1:2 "


# ---- Clients that wait, and clients that leave


def test_a_silent_stream_is_kept_alive_by_comments(gateway: RunningGateway, scripted: ScriptedService) -> None:
    scripted.script = scripted.silence
    with httpx.stream("POST", f"{gateway.root}{CHAT_PATH}", json={**CHAT, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", ""] * 2
        scripted.resume.set()
        rest = "\n".join(lines)
    assert events_of(rest)[-1] == "[DONE]"


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}], ids=str)
@pytest.mark.parametrize("script", ["silence", "half"])
def test_if_the_client_leaves_the_service_is_told(
    gateway: RunningGateway, scripted: ScriptedService, script: str, fields: dict[str, Any]
) -> None:
    scripted.script = getattr(scripted, script)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(60, read=1)) as client:
        path = f"{gateway.root}{CHAT_PATH}"
        with client.stream("POST", path, json={**CHAT, **fields, "max_tokens": 10**6}) as response:
            for line in response.iter_lines():
                if "an " in line or not fields["stream"]:
                    raise httpx.ReadTimeout("the client leaves")
                if line.startswith(": ping") and script == "silence":
                    raise httpx.ReadTimeout("the client leaves")
    (record,) = gateway.wait_for_records(1)
    assert record.status == 499
    scripted.resume.set()  # the service's threads end, because their connections are closed


# ---- Connections


@pytest.mark.parametrize("begin", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx-slow: "])
def test_a_connection_whose_headers_never_end_is_closed(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(HttpProtocol, "SECONDS_FOR_HEADERS", 0.2)
    with running_gateway(scripted.port) as gateway, connect(gateway) as connection:
        connection.sendall(begin)
        assert connection.recv(1000) == b""


def test_a_long_answer_is_not_cut_by_the_time_for_headers(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpProtocol, "SECONDS_FOR_HEADERS", 0.05)
    scripted.script = scripted.half
    with (
        running_gateway(scripted.port, keep_alive=0.02) as gateway,
        httpx.stream("POST", f"{gateway.root}{CHAT_PATH}", json={**CHAT, "stream": True}, timeout=60) as response,
    ):
        lines = response.iter_lines()
        comments = (line for line in lines if line.startswith(":"))
        for _ in range(10):
            next(comments)
        scripted.resume.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("seconds", [0, -1.5])
def test_a_time_between_comments_that_is_not_positive_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidRequest, match=f"keep_alive is {seconds}. "):
        create_app(keep_alive=seconds)


def test_headers_that_are_too_long_are_refused(gateway: RunningGateway) -> None:
    with connect(gateway) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\nx-long: " + b"a" * 100_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_does_not_arrive_in_time_is_refused(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.gateway.guard.SECONDS_FOR_BODY", 0.1)
    with connect(gateway) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_before_its_body_is_complete_has_left(gateway: RunningGateway) -> None:
    with connect(gateway) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
    (record,) = gateway.wait_for_records(1)
    assert record.status == 499


def test_a_client_that_reads_nothing_has_left(
    scripted: ScriptedService, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.gateway.sse.SECONDS_TO_READ", 0.2)
    scripted.script = lambda _: tokens(*["long " * 10_000] * 1000)  # fills the buffers of both sockets
    body = json.dumps({**CHAT, "stream": True}).encode()
    with connect(gateway) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        (record,) = gateway.wait_for_records(1)
    assert record.status == 499


def test_idle_connections_do_not_hold_up_others(gateway: RunningGateway) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(gateway)).sendall(b"GET /health HTTP/1.1\r\n")
        assert httpx.post(f"{gateway.root}{CHAT_PATH}", json=CHAT, timeout=60).status_code == 200


def connect(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=60)
