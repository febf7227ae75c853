"""A real service through its real door: what a reader gets, what goes wrong, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TESTS, wire

import helpers
import helpers.service
from helpers import prompts
from helpers.client import Answer, _Wire
from helpers.errors import GenerationFailed, InvalidRequest, ModelUnavailable, ServiceBusy, ServiceUnavailable
from helpers.processes import port_to_listen_on
from helpers.schemas import ModelOutputDocument, PromptDocument

SLOW = "[INST] Tell me everything. [/INST]"
"""A prompt that the tiny model, which knows no end, answers until it may not any more."""


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def until(condition: Any, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.02)


# --- What a reader gets ---------------------------------------------------------------------------


def test_the_articles_question_is_answered_through_the_whole_chain(service: Any, embedded: Any) -> None:
    import torch

    dialog = [
        {"role": "system", "content": prompts.SYSTEM_PROMPT},
        {"role": "user", "content": prompts.QUESTION},
    ]
    answer = service.ask(dialog, max_tokens=20)
    ids = torch.tensor([prompts.token_ids(dialog, embedded.tokenizer)])
    expected = embedded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )[0, ids.shape[1] :]
    assert str(answer) == embedded.tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", ids.shape[1])
    assert (answer.completion_tokens, answer.dropped_turns) == (20, 0)
    assert 0 < answer.time_to_first_token < answer.seconds
    assert answer.tokens_per_second > 0


def test_an_answer_that_ends_by_itself_says_stop(service: Any) -> None:
    answer = service.ask("What is the capital of France? Answer in one short sentence.", max_tokens=200)
    assert answer.finish_reason == "stop"
    assert "Paris" in answer.text
    assert answer.completion_tokens < 200


def test_info_tells_the_model(service: Any) -> None:
    info = service.info()
    assert (info.model, info.precision, info.device) == ("smollm2", "fp32", "cpu")
    assert (info.context_length, info.live, info.waiting) == (8192, 0, 0)


def test_one_document_per_token_and_one_last(tiny_service: Any, tiny: Any) -> None:
    *documents, last = wire(
        tiny_service.port, "/stream", {"prompt": {"text": SLOW}, "max_tokens": {"integer": 100}}
    )
    ids = [document.token_id for document in documents]
    assert len(ids) == 100
    assert all(document.finish_reason is None for document in documents)
    text = "".join(document.generated_text for document in [*documents, last])
    assert text == tiny.tokenizer.decode(ids, skip_special_tokens=True)
    assert (last.token_id, last.finish_reason, last.completion_tokens) == (-1, "length", 100)
    assert last.prompt_tokens == len(prompts.token_ids(SLOW, tiny.tokenizer))


def test_a_dialog_and_its_llama2_text_are_the_same_prompt(tiny_service: Any) -> None:
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Who are you?"},
    ]
    by_messages = tiny_service.ask(dialog, max_tokens=20)
    by_text = tiny_service.ask(prompt=prompts.llama2_prompt(dialog), max_tokens=20)
    assert by_messages.text == by_text.text
    assert by_messages.prompt_tokens == by_text.prompt_tokens
    again = tiny_service.ask(dialog[1:], system="Be brief.", max_tokens=20)
    assert again.text == by_messages.text


def test_sampling_and_stop_strings_travel(tiny_service: Any) -> None:
    def ask(**options: Any) -> helpers.Answer:
        return tiny_service.ask(prompt=SLOW, max_tokens=40, **options)

    greedy = ask()
    assert ask(temperature=1.0, seed=3).text == ask(temperature=1.0, seed=3).text != greedy.text
    assert ask(temperature=1.0, seed=3, top_p=1e-6).text == greedy.text
    stop = greedy.text[20:23]
    stopped = ask(stop=[stop])
    assert stopped.text == greedy.text[: greedy.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens < 40


def test_readers_side_by_side_each_get_their_own_answer(tiny_service: Any) -> None:
    questions = [f"Question {n}" for n in range(8)]
    alone = [tiny_service.ask(question, max_tokens=20).text for question in questions]
    assert len(set(alone)) == 8

    async def all_at_once() -> list[str]:
        asked = (helpers.aask(q, max_tokens=20, port=tiny_service.port) for q in questions)
        return [answer.text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(all_at_once()) == alone
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda q: tiny_service.ask(q, max_tokens=20).text, questions)) == alone


def test_a_dialog_that_outgrows_the_window_loses_its_oldest_turns_and_says_so(tiny_service: Any) -> None:
    turn = [{"role": "user", "content": "many words " * 10}, {"role": "assistant", "content": "so many " * 10}]
    answer = tiny_service.ask([*turn * 30, {"role": "user", "content": "And?"}], max_tokens=20)
    assert answer.finish_reason == "length"
    assert 20 <= answer.dropped_turns < 30
    assert answer.prompt_tokens + 20 <= 512


def test_the_articles_own_client_gets_the_whole_answer(script: Any, tiny: Any, tiny_folder: Path) -> None:
    """Its two classes and its client code as printed, on its port."""
    import torch
    from test_prompts import ARTICLE_PROMPT

    with helpers.serve(str(tiny_folder)) as service:
        assert service.port == 12345
        client = script(str(TESTS / "article_client.py"))
        assert client.process.wait(120) == 0
        printed = client.log.read_bytes().decode()  # as it is, carriage returns too
    ids = torch.tensor([prompts.token_ids(ARTICLE_PROMPT, tiny.tokenizer)])
    answer = tiny.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False
    )[0, ids.shape[1] :]
    assert len(answer) == 100
    assert printed.endswith(tiny.tokenizer.decode(answer, skip_special_tokens=True))


# --- What is refused ------------------------------------------------------------------------------

GOOD = {"prompt": {"text": "Hello"}, "max_tokens": {"integer": 5}}


@pytest.mark.parametrize(
    ("endpoint", "changed", "sentence"),
    [
        ("/stream", {"max_tokens": {"integer": 0}}, "InvalidRequest: max_tokens is 0"),
        ("/stream", {"max_tokens": {"integer": -3}}, "InvalidRequest: max_tokens is -3"),
        ("/stream", {"max_tokens": {"integer": 2**31 - 1}}, "InvalidRequest: .*more than the 512 tokens"),
        ("/stream", {"max_tokens": {"text": "many"}}, "InvalidRequest: .*max_tokens: Input should be a valid integer"),
        ("/stream", {"max_tokens": {"float": 1.5}}, "InvalidRequest: .*max_tokens"),
        ("/stream", {"prompt": {"integer": 5}}, "InvalidRequest: .*prompt: Input should be a valid string"),
        ("/stream", {"prompt": {}}, "InvalidRequest: .*prompt"),
        ("/stream", {"prompt": {"text": ""}}, "InvalidRequest: The prompt is empty"),
        ("/stream", {"prompt": {"text": "word " * 600}}, "InvalidRequest: The prompt has [0-9]+ tokens"),
        ("/stream", {"prompt": {"text": "word " * 1_600_000}}, "InvalidRequest: The request has 8,000,000 characters"),
        ("/stream", {"temperature": {"float": 5}}, "InvalidRequest: temperature is 5"),
        ("/chat", {}, "InvalidRequest: .*messages: Field required"),
        ("/chat", {"messages": {"text": "Hello"}}, "InvalidRequest: .*messages"),
        ("/nowhere", {}, "InvalidRequest: This service has no such endpoint: use /stream, /chat, /count or /info"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_on_the_wire(tiny_service: Any, endpoint: str, changed: dict, sentence: str) -> None:
    steps = tiny_service.info().steps
    (last,) = wire(tiny_service.port, endpoint, {**GOOD, **changed})
    assert last.finish_reason == "error"
    assert re.match(sentence, last.error), last.error
    assert tiny_service.info().steps == steps


@pytest.mark.parametrize(
    ("question", "options", "sentence"),
    [
        ("word " * 600, {}, "The last question takes [0-9]+ tokens"),
        ("x" * 8_000_000, {}, "8,000,000 characters"),
        ("half a \ud83d pair", {}, "no valid Unicode"),
        ("Hello", {"max_tokens": 0}, "max_tokens is 0"),
        ("Hello", {"max_tokens": 10**6}, "more than the model's window"),
        ("Hello", {"max_tokens": 10**12}, "max_tokens"),
        ("Hello", {"max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
        ("Hello", {"stop": "one string"}, "stop: Input should be a valid list"),
        ("Hello", {"top_p": 2}, "top_p is 2"),
        ("Hello", {"seed": -1}, "seed is -1"),
        ("Hello", {"prompt": "Hello"}, "either messages"),
        ([{"role": "user"}], {}, "Message 1 is not a dict"),
        ([{"role": "user", "content": 5}], {}, r"messages\.0\.content: Input should be a valid string"),
        ([{"role": "robot", "content": "Hello"}], {}, "unknown role 'robot'"),
        ([{"role": "assistant", "content": "Hello"}], {}, "the user begins"),
        ([], {}, "empty"),
        ("a <<SYS>> of mine", {}, "prompt injection"),
        ("an </s> of mine", {}, "prompt injection"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals_to_a_caller(tiny_service: Any, question: Any, options: dict, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        tiny_service.ask(question, **{"max_tokens": 5, **options})


def test_a_prompt_that_is_not_utf8_is_refused_and_the_service_goes_on(tiny_service: Any) -> None:
    import grpc

    from helpers._jina import SingleDocumentRequest

    request = SingleDocumentRequest()
    request.header.exec_endpoint = "/stream"
    message = request.proto
    message.document.data["prompt"].text = "Gr@@e"
    message.document.data["max_tokens"].integer = 5
    broken = message.SerializeToString().replace(b"Gr@@e", b"Gr\xfc\xdfe")
    with grpc.insecure_channel(f"127.0.0.1:{tiny_service.port}") as channel:
        call = channel.unary_stream("/jina.JinaSingleDocumentRequestRPC/stream_doc")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(broken, timeout=60))
    assert refused.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert tiny_service.ask("Hello", max_tokens=3).completion_tokens == 3


# --- Readers who leave ----------------------------------------------------------------------------


def test_when_the_reader_leaves_generation_stops_within_a_step(tiny_service: Any) -> None:
    before = tiny_service.info().steps
    answer = tiny_service.stream(prompt=SLOW, max_tokens=450)
    for _ in answer:
        if answer.completion_tokens >= 5:
            break
    assert answer.finish_reason == "cancelled"
    until(lambda: tiny_service.info().live == 0, "the generation ends")
    # the tiny model is quicker than the wire: what it did while the tokens and the farewell travelled counts too
    assert tiny_service.info().steps - before < 450
    assert tiny_service.ask(prompt=SLOW, max_tokens=3).completion_tokens == 3


def test_a_reader_of_the_real_model_who_leaves_costs_one_step_more(service: Any) -> None:
    before = service.info().steps
    answer = service.stream("Tell me a long story.", max_tokens=400)
    for _ in answer:
        if answer.completion_tokens == 5:
            break
    until(lambda: service.info().live == 0, "the generation ends")
    assert service.info().steps - before <= 5 + 2  # one under way when the fifth arrived, one when the reader left


def test_an_async_reader_who_leaves_costs_one_step_more(service: Any) -> None:
    before = service.info().steps

    async def leave() -> None:
        answer = service.stream("Tell me a long story.", max_tokens=400)
        async with aclosing(answer.__aiter__()) as pieces:
            async for _ in pieces:
                if answer.completion_tokens == 5:
                    break

    asyncio.run(leave())
    until(lambda: service.info().live == 0, "the generation ends")
    assert service.info().steps - before <= 5 + 2


def test_no_reader_leaves_a_connection_behind(tiny_service: Any) -> None:
    def connections() -> int:
        others = [connection.raddr for connection in psutil.Process().net_connections("tcp") if connection.raddr]
        return sum(address.port == tiny_service.port for address in others)

    def stop_from_elsewhere() -> None:
        answer = tiny_service.stream("Hello", max_tokens=400)
        reader = threading.Thread(target=list, args=(answer,))
        reader.start()
        until(lambda: answer.text, "a word")
        answer.stop()
        reader.join()

    async def leave() -> None:
        async with aclosing(aiter(tiny_service.stream("Hello", max_tokens=400))) as pieces:
            await anext(pieces)

    for leave_in_its_way in (
        tiny_service.info,
        lambda: tiny_service.ask("Hello", max_tokens=5),
        lambda: next(iter(tiny_service.stream("Hello", max_tokens=400))),
        stop_from_elsewhere,
        lambda: asyncio.run(leave()),
        lambda: pytest.raises(InvalidRequest, tiny_service.ask, "What is [INST]?"),
    ):
        leave_in_its_way()
        until(lambda: connections() == 0, "the connection is closed")


def test_a_client_that_pings_often_is_not_cut_off(tiny_service: Any) -> None:
    """gRPC's own server does it, a second after the third ping."""
    import grpc

    ready, cut_off = threading.Event(), threading.Event()

    def note(state: Any) -> None:
        if state is grpc.ChannelConnectivity.READY:
            ready.set()
        elif ready.is_set():
            cut_off.set()

    pinging = {
        "grpc.keepalive_time_ms": 50,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    with grpc.insecure_channel(f"127.0.0.1:{tiny_service.port}", options=[*pinging.items()]) as channel:
        channel.subscribe(note, try_to_connect=True)
        assert ready.wait(60)
        assert not cut_off.wait(5)


def test_two_thousand_requests_cancelled_at_once(tiny_service: Any) -> None:
    (worker,) = psutil.Process(tiny_service.pid).children()
    expected = tiny_service.ask(prompt=SLOW, max_tokens=20).text

    async def all_cancelled() -> None:
        async def read() -> None:
            async for _ in tiny_service.stream(prompt=SLOW, max_tokens=450):
                pass

        readers = [asyncio.create_task(read()) for _ in range(2000)]
        while not (any(reader.done() for reader in readers) and (await asyncio.to_thread(tiny_service.info)).waiting):
            await asyncio.sleep(0.05)
        for reader in readers:
            reader.cancel()
        done = await asyncio.gather(*readers, return_exceptions=True)
        ends = Counter(type(result) for result in done)
        assert set(ends) <= {asyncio.CancelledError, ServiceBusy, type(None)}
        assert ends[ServiceBusy] > 0
        assert ends[asyncio.CancelledError] > 64

    threads = worker.num_threads()
    asyncio.run(all_cancelled())
    until(lambda: tiny_service.info().waiting == tiny_service.info().live == 0, "the line is empty")
    assert tiny_service.ask(prompt=SLOW, max_tokens=20).text == expected
    until(lambda: len(worker.net_connections()) < 10, "the connections are closed")
    assert worker.num_threads() <= threads + 40  # asyncio's pool for tokenising, which is bounded


def test_200_readers_get_their_own_whole_answer_or_are_told_that_it_is_busy(tiny_service: Any) -> None:
    prompts = [f"{n} times a word" for n in range(200)]
    alone = {prompt: tiny_service.ask(prompt=prompt, max_tokens=100) for prompt in prompts[::20]}

    def read(prompt: str) -> Answer | ServiceBusy:
        try:
            return tiny_service.ask(prompt=prompt, max_tokens=100)
        except ServiceBusy as busy:
            return busy

    with ThreadPoolExecutor(200) as readers:
        results = dict(zip(prompts, readers.map(read, prompts)))
    answers = {prompt: result for prompt, result in results.items() if isinstance(result, Answer)}
    assert 32 + 64 <= len(answers) < 200
    assert all(answer.finish_reason == "length" and answer.completion_tokens == 100 for answer in answers.values())
    assert len({answer.text for answer in answers.values()}) == len(answers)
    assert all(answers[prompt].text == answer.text for prompt, answer in alone.items() if prompt in answers)
    assert {str(b)[:21] for b in results.values() if isinstance(b, ServiceBusy)} == {"The service is busy: "}
    info = tiny_service.info()
    assert (info.live, info.waiting) == (0, 0)


def test_the_limits_are_those_that_were_asked_for(tiny_folder: Path) -> None:
    with helpers.serve(str(tiny_folder), port=0, max_live=1, max_waiting=1, cache_memory=400 * 512) as service:
        assert service.info().context_length == 400
        with pytest.raises(InvalidRequest, match="more than the 400 tokens"):
            service.ask(prompt=SLOW, max_tokens=399)
        first, second = (iter(service.stream(prompt=SLOW, max_tokens=350)) for _ in range(2))
        next(first)
        waiting = threading.Thread(target=list, args=(second,))
        waiting.start()
        until(lambda: service.info().waiting == 1, "the second stands in line")
        with pytest.raises(ServiceBusy, match=r"answers 1 readers, and 1 more.* Try again in \d+ s"):
            service.ask(prompt=SLOW, max_tokens=10)
        list(first)
        waiting.join()
        assert service.ask(prompt=SLOW, max_tokens=10).completion_tokens == 10


def test_limits_that_let_nobody_in_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="max_live is 0"):
        helpers.serve(str(tiny_folder), port=0, max_live=0)


def test_readers_who_do_not_read_hold_up_nobody_and_lose_nothing(tiny_service: Any) -> None:
    """More of them than are answered at once: each answer is made to its end, and waits on its way."""
    whole = tiny_service.ask(prompt=SLOW, max_tokens=450).text
    answers = [tiny_service.stream(prompt=SLOW, max_tokens=450) for _ in range(40)]
    unread = [(next(pieces), pieces) for pieces in map(iter, answers)]
    assert tiny_service.ask(prompt=SLOW, max_tokens=20).completion_tokens == 20
    until(lambda: tiny_service.info().live == 0, "nobody is being answered any more")
    assert [first + "".join(rest) for first, rest in unread] == [whole] * 40


# --- Failures in the middle -----------------------------------------------------------------------


@pytest.mark.parametrize("gateway", [False, True], ids=["no gateway", "Jina's gateway"])
def test_a_model_that_breaks_in_the_middle(script: Any, tiny_folder: Path, gateway: bool) -> None:
    """It is told as it happened, once, with what came before; behind Jina's gateway too."""
    port = port_to_listen_on("127.0.0.1", 0)
    options = [str(tiny_folder), "--port", str(port), "--break-at", "4", *(["--gateway"] * gateway)]
    running = script(str(TESTS / "article_service.py"), *options)
    running.wait_for("Ready")
    before = helpers.info(port=port).steps
    answer = helpers.stream(prompt=SLOW, max_tokens=20, port=port)
    with pytest.raises(GenerationFailed, match=r"after 3 tokens \(RuntimeError: out of memory\)"):
        list(answer)
    assert (answer.completion_tokens, answer.finish_reason) == (3, "error")
    assert helpers.info(port=port).steps == before + 4
    for changed, sentence in [
        ({"max_tokens": {"integer": 0}}, "max_tokens is 0"),
        ({"max_tokens": {"text": "many"}}, "valid integer"),
        ({"prompt": {"text": "word " * 600}}, "The prompt has"),
    ]:
        (last,) = wire(port, "/stream", {**GOOD, **changed})
        assert sentence in last.error
    (last,) = wire(port, "/nowhere", GOOD)
    assert "no such endpoint" in last.error
    assert helpers.info(port=port).steps == before + 4
    assert helpers.ask(prompt=SLOW, max_tokens=3, port=port).completion_tokens == 3


def test_no_failure_behind_jinas_gateway_is_a_short_answer(script: Any, tiny_folder: Path) -> None:
    """An endpoint that raises, as the article's does, ends there as if all were well: no last document tells."""
    port = port_to_listen_on("127.0.0.1", 0)
    running = script(str(TESTS / "article_service.py"), str(tiny_folder), "--port", str(port), "--gateway")
    running.wait_for("Ready")
    request = PromptDocument(prompt="Hello", max_tokens=5)
    raising = Answer(_Wire("/raising", request, ModelOutputDocument, "127.0.0.1", port))
    with pytest.raises(ServiceUnavailable, match="broke off after [0-9]+ tokens"):
        list(raising)
    assert raising.finish_reason == "error"

    executor = max(psutil.Process(running.process.pid).children(), key=lambda child: child.num_threads())
    answer = helpers.stream(prompt=SLOW, max_tokens=450, port=port)
    with pytest.raises(ServiceUnavailable):
        for _ in answer:
            if answer.completion_tokens == 5:
                executor.kill()
    assert answer.finish_reason == "error"


@pytest.mark.parametrize("victim", ["service", "executor"])
def test_a_service_killed_in_the_middle_is_a_failure_and_leaves_nothing(tiny_folder: Path, victim: str) -> None:
    service = helpers.serve(str(tiny_folder), port=0)
    family = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
    answer = service.stream(prompt=SLOW, max_tokens=450)
    with pytest.raises(ServiceUnavailable, match="went away|broke off"):
        for _ in answer:
            if answer.completion_tokens == 5:
                family[0 if victim == "service" else 1].kill()
    assert answer.finish_reason == "error"
    if victim == "service":
        assert psutil.wait_procs(family, timeout=30)[1] == []
    service.stop()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert is_free(service.port)
    with pytest.raises(ServiceUnavailable, match="helpers serve --port"):
        service.ask("Are you there?")


def test_a_model_that_is_killed_while_it_loads_is_told(script: Any, embedded: Any) -> None:
    """As when memory runs out: Jina itself would wait for it for ever."""
    starting = script("-m", "helpers", "serve", "--model", "smollm2", "--port", "0")
    starting.wait_for("Loading weights")
    (executor,) = psutil.Process(starting.process.pid).children()
    executor.kill()
    assert starting.process.wait(30) == 1
    assert "ServiceUnavailable: The model's process has died" in starting.log.read_text()


def test_a_service_that_is_stopped_in_the_middle_says_so(tiny_folder: Path) -> None:
    service = helpers.serve(str(tiny_folder), port=0)
    answer = service.stream(prompt=SLOW, max_tokens=450)
    with pytest.raises(ServiceUnavailable):
        for _ in answer:
            service.stop()
    assert answer.completion_tokens < 450


COUNTING = """
import sys

from docarray import BaseDoc
from jina import Deployment, Executor, requests


class Number(BaseDoc):
    n: int


class Counting(Executor):
    @requests(on="/count")
    async def count(self, doc: Number, **kwargs) -> Number:
        for n in range(doc.n):
            yield Number(n=n)


if __name__ == "__main__":
    with Deployment(uses=Counting, port=int(sys.argv[1]), protocol="grpc") as dep:
        dep.block()
"""


@pytest.fixture
def counting(tmp_path: Path) -> tuple[str, int]:
    """A script with an `Executor` as one writes it after the article, and a port for it."""
    file = tmp_path / "counting.py"
    file.write_text(COUNTING)
    return str(file), port_to_listen_on("127.0.0.1", 0)


def test_a_script_of_ones_own_is_served_and_leaves_nothing(counting: tuple[str, int]) -> None:
    from docarray import BaseDoc

    from helpers._jina import Client

    class Number(BaseDoc):
        n: int

    async def count() -> list[int]:
        client = Client(port=port, protocol="grpc", asyncio=True)
        return [doc.n async for doc in client.stream_doc(on="/count", inputs=Number(n=3), return_type=Number)]

    script, port = counting
    assert not helpers.client.is_ready(port=port)
    service = helpers.service.serve_script(script, str(port), port=port)
    family = psutil.Process(service.pid).children(recursive=True)
    assert len(family) >= 2  # Jina's gateway, and the executor
    assert asyncio.run(count()) == [0, 1, 2]
    service.stop()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert is_free(port) and not helpers.client.is_ready(port=port)
    assert not service.log.parent.exists()


def test_a_script_that_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package")
    with pytest.raises(ServiceUnavailable, match="before it was ready(.|\n)*No module named 'no_such_package'"):
        helpers.service.serve_script(tmp_path / "broken.py", port=port_to_listen_on("127.0.0.1", 0))


def test_a_killed_parent_takes_its_script_along(script: Any, counting: tuple[str, int]) -> None:
    file, port = counting
    parent = script(
        "-c",
        "import signal, sys\n"
        "from helpers.service import serve_script\n"
        f"service = serve_script({file!r}, '{port}', port={port})\n"
        "print('LOG', service.log, flush=True)\n"
        "signal.pause()",
    )
    log = parent.wait_for("LOG").split()[1]
    family = psutil.Process(parent.process.pid).children(recursive=True)
    parent.process.kill()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), "all of them end")
    assert is_free(port)
    assert not Path(log).parent.exists()


def test_a_killed_parent_takes_its_service_along(script: Any, tiny_folder: Path) -> None:
    parent = script(
        "-c",
        "import helpers, signal, sys\n"
        "service = helpers.serve(sys.argv[1], port=0)\n"
        "print('PORT', service.port, service.log, flush=True)\n"
        "signal.pause()",
        str(tiny_folder),
    )
    _, port, log = parent.wait_for("PORT").split()
    family = psutil.Process(parent.process.pid).children(recursive=True)
    assert len(family) >= 2
    assert helpers.ask(prompt="Hello", max_tokens=2, port=int(port)).completion_tokens == 2
    parent.process.kill()
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert is_free(int(port))
    assert not Path(log).parent.exists()


def test_a_parent_killed_while_its_service_starts_takes_it_along(script: Any, tiny_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    parent = script("-c", f"import helpers, sys; helpers.serve(sys.argv[1], port={port})", str(tiny_folder))
    until(lambda: psutil.Process(parent.process.pid).children(), "the service starts")
    family = psutil.Process(parent.process.pid).children(recursive=True)
    parent.process.kill()
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert is_free(port)


# --- Starting and stopping ------------------------------------------------------------------------


def test_a_taken_port_names_its_holder() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ServiceUnavailable, match=rf"Port {port} is taken by process {os.getpid()} .*port: 0"):
            helpers.serve(port=port)


def test_the_port_of_another_service_is_not_shared(tiny_service: Any, tiny_folder: Path) -> None:
    with pytest.raises(ServiceUnavailable, match="is taken by process"):
        helpers.serve(str(tiny_folder), port=tiny_service.port)


@pytest.mark.parametrize("port", [-1, 65536, 10**6])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(InvalidRequest, match="is no port"):
        helpers.serve(port=port)
    with pytest.raises(InvalidRequest, match="is no port"):
        helpers.ask("Hello", port=port)


@pytest.mark.parametrize("port", [0, 12345])
@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str, port: int) -> None:
    with pytest.raises(ServiceUnavailable, match=f"cannot listen on {host}"):
        helpers.serve(host=host, port=port)


def family() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder for temporary files that is this test's alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("model", "precision", "error", "sentence"),
    [
        ("/no/such/folder", "auto", ModelUnavailable, "There is no folder /no/such/folder"),
        ("smollm2", "fp8", InvalidRequest, "fp32, bf16, int8, nf4"),
        ("nobody/no-such-model", "auto", ModelUnavailable, "--model smollm2"),
    ],
)
def test_a_service_that_cannot_start_says_why_and_leaves_nothing(
    torch: Any, model: str, precision: str, error: type, sentence: str, monkeypatch: Any, temporary: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port_to_listen_on('127.0.0.1', 0)}")  # no network
    before = family()
    with pytest.raises(error, match=sentence):
        helpers.serve(model, precision, port=0)
    assert family() == before
    assert list(temporary.iterdir()) == []


def test_twenty_starts_and_stops_leave_nothing(tiny_folder: Path, temporary: Path) -> None:
    """Two side by side, ten times: no process, thread, port, file handle or temporary file is left."""

    def state() -> tuple[Any, ...]:
        return family(), threading.active_count(), list(temporary.iterdir())

    with helpers.serve(str(tiny_folder), port=0) as service:
        service.ask("Hello", max_tokens=1)  # what is imported once is imported now
    before, files, ports = state(), psutil.Process().num_fds(), []

    def start_ask_stop(_: int) -> None:
        with helpers.serve(str(tiny_folder), port=0) as service:
            ports.append(service.port)
            assert service.ask("Hello", max_tokens=2).completion_tokens == 2

    with ThreadPoolExecutor(2) as side_by_side:
        list(side_by_side.map(start_ask_stop, range(20)))
    assert state() == before
    assert psutil.Process().num_fds() <= files + 3
    assert len(ports) == 20
    assert all(map(is_free, ports))


@pytest.mark.parametrize("stdin", ["closed", "/dev/null"])
def test_the_foreground_service_needs_no_stdin_and_stops_on_sigterm(
    script: Any, tiny_folder: Path, stdin: str
) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    command = ["-m", "helpers", "serve", "--model", str(tiny_folder), "--port", str(port)]
    if stdin == "closed":
        shell = f"exec {sys.executable} {' '.join(command)} <&-"
        running = script("-c", f"import os; os.execvp('sh', ['sh', '-c', {shell!r}])")
    else:
        running = script(*command)
    assert f"127.0.0.1:{port}" in running.wait_for("Ready")
    assert helpers.ask("Hello", max_tokens=2, port=port).completion_tokens == 2
    family = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(30) == 0
    assert psutil.wait_procs(family[1:], timeout=30)[1] == []
    assert is_free(port)
    assert "Traceback" not in running.log.read_text()


def test_ctrl_c_stops_the_foreground_service(script: Any, tiny_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    running = script(
        "-m", "helpers", "serve", "--model", str(tiny_folder), "--port", str(port), start_new_session=True
    )
    running.wait_for("Ready")
    family = psutil.Process(running.process.pid).children(recursive=True)
    os.killpg(running.process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
    assert running.process.wait(30) == 0
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert is_free(port)
    assert "Traceback" not in running.log.read_text()


def test_the_token_is_handed_over_by_environment_only(tiny_folder: Path, monkeypatch: Any) -> None:
    secret = "hf_" + "notarealtoken" * 3
    monkeypatch.setenv("HF_TOKEN", secret)
    with helpers.serve(str(tiny_folder), port=0) as service:
        family = [psutil.Process(service.pid), *psutil.Process(service.pid).children()]
        assert all(process.environ()["HF_TOKEN"] == secret for process in family)
        assert not any(secret in " ".join(process.cmdline()) for process in family)
        service.ask("Hello", max_tokens=1)
        assert secret not in service.log.read_text()
        assert secret not in repr(service)
