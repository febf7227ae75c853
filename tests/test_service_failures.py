"""Failures in the middle of an answer: none of them looks like a short answer, and none leaves anything behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import helpers
from background_program import Program
from breaking_service import BREAK_AT
from helpers.answer import Answer
from helpers.errors import GenerationFailed, ServiceUnavailable
from helpers.processes import is_listening, port_to_listen_on
from helpers.schemas import ModelOutputDocument, PromptDocument
from helpers.service import Service
from helpers.transport import Call
from wire import ENDLESS, SLOW, call_by_wire

TESTS = Path(__file__).parent

pytestmark = pytest.mark.main


@pytest.fixture(scope="module", params=[False, True], ids=["no gateway", "Jina's gateway"])
def breaking(request: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a service whose model fails in the middle of long answers."""
    port = port_to_listen_on("127.0.0.1", 0)
    options = [str(tiny_folder), "--port", str(port), *(["--gateway"] * request.param)]
    log = tmp_path_factory.mktemp("breaking") / "service.log"
    program = Program(str(TESTS / "breaking_service.py"), *options, log=log)
    try:
        program.wait_for("Ready")
        yield port
    finally:
        program.kill()


def test_a_model_that_fails_is_reported_once_with_what_came_before(breaking: int) -> None:
    before = helpers.info(port=breaking).steps
    answer = helpers.stream(prompt=SLOW, max_tokens=100, port=breaking)
    with pytest.raises(GenerationFailed, match=rf"after {BREAK_AT - 1} tokens \(RuntimeError: out of memory\)"):
        list(answer)
    assert (answer.completion_tokens, answer.finish_reason) == (BREAK_AT - 1, "error")
    assert helpers.info(port=breaking).steps == before + BREAK_AT
    assert helpers.ask(prompt=SLOW, max_tokens=3, port=breaking).completion_tokens == 3


@pytest.mark.parametrize(
    ("endpoint", "changed", "sentence"),
    [
        ("/stream", {"max_tokens": {"integer": 0}}, "max_tokens is 0"),
        ("/stream", {"max_tokens": {"text": "many"}}, "valid integer"),
        ("/stream", {"prompt": {"text": "word " * 600}}, "The prompt has"),
        ("/nowhere", {}, "/stream, /chat, /count or /info"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_refusal_passes_through_jinas_gateway(breaking: int, endpoint: str, changed: dict, sentence: str) -> None:
    steps = helpers.info(port=breaking).steps
    request = {"prompt": {"text": "Hello"}, "max_tokens": {"integer": 5}, **changed}
    (last,) = call_by_wire(breaking, endpoint, request)
    assert sentence in last.error
    assert helpers.info(port=breaking).steps == steps


def test_log_probabilities_pass_through_jinas_gateway(breaking: int) -> None:
    answer = helpers.ask(prompt=SLOW, max_tokens=3, logprobs=2, port=breaking)
    assert [len(token.top) for token in answer.logprobs] == [2, 2, 2]
    assert "".join(token.text for token in answer.logprobs) == answer.text


def test_an_endpoint_that_raises_is_not_a_short_answer(breaking: int) -> None:
    """Behind Jina's gateway such a stream ends as if all were well, but without a last document."""
    request = PromptDocument(prompt="Hello", max_tokens=5)
    answer = Answer(Call("/raising", request, ModelOutputDocument, host="127.0.0.1", port=breaking))
    with pytest.raises(ServiceUnavailable):
        list(answer)
    assert answer.finish_reason == "error"


def test_an_executor_killed_behind_jinas_gateway_is_not_a_short_answer(script: Any, endless_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    options = [str(endless_folder), "--port", str(port), "--gateway", "--break-at", "0"]
    program = script(str(TESTS / "breaking_service.py"), *options)
    program.wait_for("Ready")
    executor = max(psutil.Process(program.process.pid).children(), key=lambda child: child.num_threads())
    answer = helpers.stream(prompt=SLOW, max_tokens=ENDLESS, port=port)
    with pytest.raises(ServiceUnavailable):
        for _ in answer:
            if answer.completion_tokens == 5:
                executor.kill()
    assert answer.finish_reason == "error"


def test_a_service_killed_in_the_middle_is_a_failure_and_leaves_nothing(endless_folder: Path) -> None:
    service = helpers.serve(str(endless_folder), port=0)
    process = psutil.Process(service.pid)
    answer = service.stream(prompt=SLOW, max_tokens=ENDLESS)
    with pytest.raises(ServiceUnavailable, match="went away|broke off"):
        for _ in answer:
            if answer.completion_tokens == 5:
                process.kill()
    assert answer.finish_reason == "error"
    service.stop()
    assert psutil.wait_procs([process], timeout=300)[1] == []
    assert not is_listening("127.0.0.1", service.port)
    with pytest.raises(ServiceUnavailable, match="helpers serve --port"):
        service.ask("Are you there?")


def test_a_service_stopped_in_the_middle_says_so(endless_folder: Path) -> None:
    service = helpers.serve(str(endless_folder), port=0)
    answer = service.stream(prompt=SLOW, max_tokens=ENDLESS)
    with pytest.raises(ServiceUnavailable):
        for _ in answer:
            service.stop()
    assert answer.completion_tokens < ENDLESS


def test_a_service_killed_while_it_loads_is_reported(bundled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens when memory runs out."""

    def kill(service: Service, _: str) -> None:
        os.kill(service.pid, signal.SIGKILL)
        service._process.wait()
        raise service._failure()

    monkeypatch.setattr(Service, "_wait_until_ready", kill)
    with pytest.raises(ServiceUnavailable, match="was killed, perhaps because memory ran out"):
        helpers.serve("smollm2", port=0)
