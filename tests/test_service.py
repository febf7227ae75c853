"""A real service over gRPC: the answers, the refusals, and the cost of a client that leaves."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

import helpers
from connections import connections_to
from eventually import generation_stops, until, until_idle
from greedy import generated_answer, packed_answer
from helpers import prompts
from helpers.answer import Answer
from helpers.errors import InvalidRequest, QueueFull
from wire import ENDLESS, SLOW, call_by_wire

# --- What a client gets ---------------------------------------------------------------------------


def test_the_articles_question_is_answered_through_the_whole_chain(service: Any, bundled: Any) -> None:
    dialog = [
        {"role": "system", "content": prompts.SYSTEM_PROMPT},
        {"role": "user", "content": prompts.QUESTION},
    ]
    answer = service.ask(dialog, max_tokens=20)
    prompt_ids = prompts.token_ids(dialog, bundled.tokenizer)
    bundled.model.prepare()
    expected = packed_answer(bundled.model, prompt_ids, 20)
    assert str(answer) == bundled.tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", len(prompt_ids))
    assert (answer.completion_tokens, answer.dropped_turns) == (20, 0)
    assert 0 < answer.time_to_first_token < answer.seconds
    assert answer.tokens_per_second > 0


def test_an_answer_that_the_model_ends_says_stop(service: Any) -> None:
    answer = service.ask("What is the capital of France? Answer in one short sentence.", max_tokens=200)
    assert answer.finish_reason == "stop"
    assert "Paris" in answer.text
    assert answer.completion_tokens < 200


def test_info_describes_the_model(service: Any) -> None:
    info = service.info()
    assert (info.model, info.precision, info.device) == ("smollm2", "int8", "cpu")
    assert (info.context_length, info.running, info.waiting) == (8192, 0, 0)


def test_a_stream_is_one_document_per_token_and_a_last_one(tiny_service: Any, tiny: Any) -> None:
    request = {"prompt": {"text": SLOW}, "max_tokens": {"integer": 100}}
    *documents, last = call_by_wire(tiny_service.port, "/stream", request)
    ids = [document.token_id for document in documents]
    assert len(ids) == 100
    assert all(document.finish_reason is None for document in documents)
    text = "".join(document.generated_text for document in [*documents, last])
    prompt_ids = prompts.token_ids(SLOW, tiny.tokenizer)
    assert tiny.tokenizer.decode(prompt_ids) + text == tiny.tokenizer.decode(prompt_ids + ids)
    assert (last.token_id, last.finish_reason, last.completion_tokens) == (-1, "length", 100)
    assert last.prompt_tokens == len(prompt_ids)


def test_log_probabilities_and_the_cost_of_the_prompt_reach_the_client(tiny_service: Any, tiny: Any) -> None:
    question = "Is this " + "a very " * 30 + "long question?"
    first = tiny_service.ask(question, max_tokens=12, logprobs=3)
    second = tiny_service.ask(question, max_tokens=12)
    assert (second.text, second.logprobs) == (first.text, [])
    assert first.cached_tokens < second.cached_tokens == (second.prompt_tokens - 1) // 32 * 32
    assert first.queue_seconds > 0
    tokens = [token.token_id for token in first.logprobs]
    assert len(tokens) == 12
    assert tiny.tokenizer.decode(tokens) == first.text
    for token in first.logprobs:
        assert token.top[0].token_id == token.token_id
        assert 0 > token.logprob == token.top[0].logprob > token.top[1].logprob > token.top[2].logprob


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
    assert tiny_service.ask(dialog[1:], system="Be brief.", max_tokens=20).text == by_messages.text


def test_sampling_options_reach_the_model(tiny_service: Any) -> None:
    def text(**options: Any) -> str:
        return tiny_service.ask(prompt=SLOW, max_tokens=40, **options).text

    sample = text(temperature=1.0, seed=3)
    assert text(temperature=1.0, seed=3) == sample != text()
    assert text(temperature=1.0, seed=3, top_p=1e-6) == text()


def test_a_stop_string_ends_the_answer_before_it(tiny_service: Any) -> None:
    whole = tiny_service.ask(prompt=SLOW, max_tokens=40).text
    stop = whole[20:23]
    stopped = tiny_service.ask(prompt=SLOW, max_tokens=40, stop=[stop])
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens < 40


def test_clients_side_by_side_each_get_their_own_answer(tiny_service: Any) -> None:
    questions = [f"Question {n}" for n in range(8)]
    alone = [tiny_service.ask(question, max_tokens=20).text for question in questions]
    assert len(set(alone)) == 8

    async def all_at_once() -> list[str]:
        asked = (helpers.aask(question, max_tokens=20, port=tiny_service.port) for question in questions)
        return [answer.text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(all_at_once()) == alone
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda question: tiny_service.ask(question, max_tokens=20).text, questions)) == alone


def test_a_dialog_longer_than_the_window_loses_its_oldest_turns_and_says_so(tiny_service: Any) -> None:
    turn = [{"role": "user", "content": "many words " * 10}, {"role": "assistant", "content": "so many " * 10}]
    answer = tiny_service.ask([*turn * 30, {"role": "user", "content": "And?"}], max_tokens=20)
    assert answer.finish_reason == "length"
    assert 20 <= answer.dropped_turns < 30
    assert answer.prompt_tokens + 20 <= 512


@pytest.mark.xdist_group("port-12345")
def test_the_articles_own_client_gets_the_whole_answer(
    script: Any, tiny: Any, tiny_reference: Any, tiny_folder: Path
) -> None:
    """The test uses the article's two classes, client code and port, as printed."""
    from test_prompts import ARTICLE_PROMPT

    with helpers.serve(str(tiny_folder), "fp32") as service:
        assert service.port == 12345
        client = script(str(Path(__file__).with_name("article_client.py")))
        assert client.process.wait(600) == 0
        printed = client.log.read_bytes().decode()  # bytes, to keep carriage returns
    expected = generated_answer(tiny_reference, prompts.token_ids(ARTICLE_PROMPT, tiny.tokenizer), 100)
    assert printed.endswith(tiny.tokenizer.decode(expected, skip_special_tokens=True))


# --- What is refused ------------------------------------------------------------------------------

GOOD = {"prompt": {"text": "Hello"}, "max_tokens": {"integer": 5}}


@pytest.mark.parametrize(
    ("endpoint", "changed", "sentence"),
    [
        ("/stream", {"max_tokens": {"integer": 0}}, "InvalidRequest: max_tokens is 0"),
        ("/stream", {"max_tokens": {"integer": -3}}, "InvalidRequest: max_tokens is -3"),
        ("/stream", {"max_tokens": {"integer": 2**31 - 1}}, "InvalidRequest: .*512"),
        ("/stream", {"max_tokens": {"text": "many"}}, "InvalidRequest: .*max_tokens: Input should be a valid integer"),
        ("/stream", {"max_tokens": {"float": 1.5}}, "InvalidRequest: .*max_tokens"),
        ("/stream", {"prompt": {"integer": 5}}, "InvalidRequest: .*prompt: Input should be a valid string"),
        ("/stream", {"prompt": {}}, "InvalidRequest: .*prompt"),
        ("/stream", {"prompt": {"text": ""}}, "InvalidRequest: The prompt is empty"),
        ("/stream", {"prompt": {"text": "word " * 600}}, "InvalidRequest: The prompt has [0-9]+ tokens"),
        ("/stream", {"prompt": {"text": "word " * 1_600_000}}, "InvalidRequest: The request has 8,000,000 characters"),
        ("/stream", {"temperature": {"float": 5}}, "InvalidRequest: temperature is 5"),
        ("/stream", {"logprobs": {"integer": 21}}, "InvalidRequest: logprobs is 21"),
        ("/stream", {"logprobs": {"boolean": True}}, "InvalidRequest: logprobs is True. Give a number"),
        ("/chat", {}, "InvalidRequest: .*messages: Field required"),
        ("/chat", {"messages": {"text": "Hello"}}, "InvalidRequest: .*messages"),
        ("/nowhere", {}, "InvalidRequest: .*/stream, /chat, /count or /info"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_service_refuses_a_wrong_request_in_the_last_document(
    tiny_service: Any, endpoint: str, changed: dict[str, Any], sentence: str
) -> None:
    steps = tiny_service.info().steps
    (last,) = call_by_wire(tiny_service.port, endpoint, {**GOOD, **changed})
    assert last.finish_reason == "error"
    assert re.match(sentence, last.error), last.error
    assert tiny_service.info().steps == steps


@pytest.mark.parametrize(
    ("question", "options", "sentence"),
    [
        ("word " * 600, {}, "The last question takes [0-9]+ tokens"),
        ("x" * 8_000_000, {}, "8,000,000 characters"),
        ("half a \ud83d pair", {}, "Unicode"),
        ("Hello", {"max_tokens": 0}, "max_tokens is 0"),
        ("Hello", {"max_tokens": 10**6}, "window of 512"),
        ("Hello", {"max_tokens": 10**12}, "max_tokens"),
        ("Hello", {"max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
        ("Hello", {"stop": 5}, "stop: Input should be a valid list"),
        ("Hello", {"top_p": 2}, "top_p is 2"),
        ("Hello", {"seed": -1}, "seed is -1"),
        ("Hello", {"prompt": "Hello"}, "prompt="),
        ([{"role": "user"}], {}, "Message 1 "),
        ([{"role": "user", "content": 5}], {}, r"Message 1 \(user\) has a content of type int"),
        ([{"role": "robot", "content": "Hello"}], {}, "unknown role 'robot'"),
        ([{"role": "assistant", "content": "Hello"}], {}, "Message 1 \\(assistant\\)"),
        ([], {}, "empty"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_question_raises_in_the_caller(
    tiny_service: Any, question: Any, options: dict[str, Any], sentence: str
) -> None:
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
            list(call(broken, timeout=600))
    assert refused.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert tiny_service.ask("Hello", max_tokens=3).completion_tokens == 3


# --- Clients that leave ---------------------------------------------------------------------------


def leave_after_a_piece(service: Any) -> None:
    next(iter(service.stream(prompt=SLOW, max_tokens=ENDLESS)))


def stop_from_another_thread(service: Any) -> None:
    answer = service.stream(prompt=SLOW, max_tokens=ENDLESS)
    client = threading.Thread(target=list, args=(answer,))
    client.start()
    until(lambda: answer.text, "the first piece arrives")
    answer.stop()
    client.join()


def leave_in_an_event_loop(service: Any) -> None:
    async def leave() -> None:
        async with aclosing(aiter(service.stream(prompt=SLOW, max_tokens=ENDLESS))) as pieces:
            await anext(pieces)

    asyncio.run(leave())


@pytest.mark.parametrize("leave", [leave_after_a_piece, stop_from_another_thread, leave_in_an_event_loop])
def test_when_a_client_leaves_its_sequence_is_cancelled(endless_service: Any, leave: Any) -> None:
    """The engine takes no step after the one under way (`test_engine`). The wire takes the time of some steps."""
    with generation_stops(endless_service):
        leave(endless_service)
    assert endless_service.ask(prompt=SLOW, max_tokens=3).completion_tokens == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda service: service.info(),
        lambda service: service.ask("Hello", max_tokens=5),
        leave_after_a_piece,
        stop_from_another_thread,
        leave_in_an_event_loop,
        lambda service: pytest.raises(InvalidRequest, service.ask, " "),
    ],
    ids=["info", "complete", "leave", "stop", "leave async", "refused"],
)
def test_no_client_leaves_a_connection_behind(endless_service: Any, use: Any) -> None:
    use(endless_service)
    until(lambda: not connections_to(endless_service.port), "the connection is closed")


def test_a_client_that_pings_often_stays_connected(tiny_service: Any) -> None:
    """By default a gRPC server closes the connection one second after the third ping."""
    import grpc

    ready, closed = threading.Event(), threading.Event()

    def note(state: Any) -> None:
        if state is grpc.ChannelConnectivity.READY:
            ready.set()
        elif ready.is_set():
            closed.set()

    pinging = {
        "grpc.keepalive_time_ms": 50,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    with grpc.insecure_channel(f"127.0.0.1:{tiny_service.port}", options=[*pinging.items()]) as channel:
        channel.subscribe(note, try_to_connect=True)
        assert ready.wait(300)
        assert not closed.wait(5)


# --- Many clients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_many_requests_cancelled_at_once_leave_nothing(endless_service: Any, clients: int) -> None:
    worker = psutil.Process(endless_service.pid)
    expected = endless_service.ask(prompt=SLOW, max_tokens=20).text

    async def all_cancelled() -> None:
        async def read() -> None:
            async for _ in endless_service.stream(prompt=SLOW, max_tokens=ENDLESS):
                pass

        tasks = [asyncio.create_task(read()) for _ in range(clients)]
        while not (any(task.done() for task in tasks) and (await asyncio.to_thread(endless_service.info)).waiting):
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        results = Counter(map(type, ends))
        assert set(results) == {asyncio.CancelledError, QueueFull}, Counter(map(str, ends))
        assert results[asyncio.CancelledError] > 64

    threads = worker.num_threads()
    asyncio.run(all_cancelled())
    until_idle(endless_service)
    assert endless_service.ask(prompt=SLOW, max_tokens=20).text == expected
    until(lambda: len(worker.net_connections()) < 10, "the connections are closed")
    assert worker.num_threads() <= threads + 40  # asyncio's pool for tokenising, which is bounded


def test_200_clients_get_their_own_complete_answer_or_are_told_that_the_queue_is_full(endless_service: Any) -> None:
    """32 other answers run until the queue of 64 is full."""
    prompts = [f"{n} times a word" for n in range(200)]
    alone = {prompt: endless_service.ask(prompt=prompt, max_tokens=100) for prompt in prompts[::20]}
    others = [endless_service.stream(prompt=SLOW, max_tokens=ENDLESS // 3) for _ in range(32)]
    running = [iter(other) for other in others]
    for pieces in running:
        next(pieces)

    def read(prompt: str) -> Answer | QueueFull:
        try:
            return endless_service.ask(prompt=prompt, max_tokens=100)
        except QueueFull as error:
            return error

    with ThreadPoolExecutor(200) as clients:
        asked = {prompt: clients.submit(read, prompt) for prompt in prompts}
        until(lambda: sum(one.done() for one in asked.values()) == 200 - 64, "the others are refused")
        for other in others:
            other.stop()
    results = {prompt: one.result() for prompt, one in asked.items()}
    answers = {prompt: result for prompt, result in results.items() if isinstance(result, Answer)}
    assert len(answers) == 64
    assert all(answer.finish_reason == "length" and answer.completion_tokens == 100 for answer in answers.values())
    assert len({answer.text for answer in answers.values()}) == len(answers)
    assert all(answers[prompt].text == answer.text for prompt, answer in alone.items() if prompt in answers)
    until_idle(endless_service)


def test_clients_that_do_not_read_hold_up_no_other_and_lose_nothing(tiny_service: Any) -> None:
    """There are more clients than can run at once. Each answer is generated to its end, and waits for its client."""
    whole = tiny_service.ask(prompt=SLOW, max_tokens=200).text
    answers = [tiny_service.stream(prompt=SLOW, max_tokens=200) for _ in range(40)]
    unread = [(next(pieces), pieces) for pieces in map(iter, answers)]
    assert tiny_service.ask(prompt=SLOW, max_tokens=20).completion_tokens == 20
    until_idle(tiny_service)
    assert [first + "".join(rest) for first, rest in unread] == [whole] * 40


@pytest.fixture(scope="module")
def small_service(endless_folder: Path) -> Iterator[Any]:
    """A service that runs one sequence, lets one request wait, and has a KV cache of 160,000 tokens."""
    limits = {"max_num_seqs": 1, "max_queue_size": 1, "cache_memory": 160_000 * 512}
    with helpers.serve(str(endless_folder), port=0, **limits) as service:
        yield service


@pytest.mark.main
def test_the_limits_of_the_service_are_those_that_were_asked_for(small_service: Any) -> None:
    assert small_service.info().context_length == 160_000
    with pytest.raises(InvalidRequest, match="160000 tokens"):
        small_service.ask(prompt=SLOW, max_tokens=159_999)
    first, second = small_service.stream(prompt=SLOW, max_tokens=ENDLESS), small_service.stream(prompt=SLOW)
    pieces = iter(first)
    next(pieces)
    waiting = threading.Thread(target=list, args=(second,))
    waiting.start()
    until(lambda: small_service.info().waiting == 1, "the second request waits")
    with pytest.raises(QueueFull, match=r"\d+ s"):
        small_service.ask(prompt=SLOW, max_tokens=10)
    first.stop()
    waiting.join()
    assert second.finish_reason == "length"
    assert small_service.ask(prompt=SLOW, max_tokens=10).completion_tokens == 10
