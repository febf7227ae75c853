"""One call over gRPC, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from eventually import until
from helpers._jina import JinaSingleDocumentRequestRPCStub, RpcError, SingleDocumentRequest, get_grpc_channel
from helpers.errors import ServiceUnavailable
from helpers.schemas import ChatDocument, ModelDocument, ModelOutputDocument
from helpers.transport import Call, is_ready
from scripted_service import ScriptedService

HELLO = ChatDocument(messages=[{"role": "user", "content": "Hello"}], max_tokens=3)


@pytest.fixture
def scripted() -> Iterator[ScriptedService]:
    with ScriptedService() as service:
        yield service


def call_to(service: ScriptedService, request: ChatDocument = HELLO) -> Call[ModelOutputDocument]:
    return Call("/chat", request, ModelOutputDocument, "127.0.0.1", service.port)


def connections(port: int) -> list[Any]:
    return [one for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port == port]


async def documents_of(call: Call[ModelOutputDocument]) -> list[ModelOutputDocument]:
    return [document async for document in call.documents_async()]


def test_the_documents_arrive_in_order_with_and_without_an_event_loop(scripted: ScriptedService) -> None:
    for documents in (list(call_to(scripted).documents()), asyncio.run(documents_of(call_to(scripted)))):
        assert [document.token_id for document in documents] == [0, 1, 2, -1]
        assert documents[-1].finish_reason == "length"


def test_another_thread_reads_the_same_documents(scripted: ScriptedService) -> None:
    documents: list[ModelOutputDocument] = []
    reading = threading.Thread(target=lambda: documents.extend(call_to(scripted).documents()))
    reading.start()
    reading.join()
    assert [document.token_id for document in documents] == [0, 1, 2, -1]


def test_a_program_without_the_endpoint_is_named(scripted: ScriptedService) -> None:
    call = Call("/nowhere", HELLO, ModelDocument, "127.0.0.1", scripted.port)
    with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{scripted.port} has no endpoint /nowhere"):
        call.document()


def test_a_cancelled_call_sends_nothing(scripted: ScriptedService) -> None:
    call = call_to(scripted)
    call.cancel()
    assert list(call.documents()) == []
    assert asyncio.run(documents_of(call)) == []
    assert scripted.requests == []


def test_cancelling_ends_a_call_without_a_reply(scripted: ScriptedService) -> None:
    scripted.script = scripted.silence
    call = call_to(scripted)
    failures = []

    def read() -> None:
        try:
            list(call.documents())
        except ServiceUnavailable as error:
            failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: scripted.requests, "the request arrives")
    call.cancel()
    reading.join(300)
    assert len(failures) == 1
    until(lambda: not connections(scripted.port), "the connection is closed")


def test_leaving_the_documents_closes_the_connection(scripted: ScriptedService) -> None:
    long = ChatDocument(messages=HELLO.messages, max_tokens=10_000)

    def leave_in_this_thread() -> None:
        next(call_to(scripted, long).documents())

    def leave_in_another_thread() -> None:
        leaving = threading.Thread(target=leave_in_this_thread)
        leaving.start()
        leaving.join()

    async def leave() -> None:
        documents = call_to(scripted, long).documents_async()
        await anext(documents)
        await documents.aclose()

    for leave_this_way in (leave_in_this_thread, leave_in_another_thread, lambda: asyncio.run(leave())):
        leave_this_way()
        until(lambda: not connections(scripted.port), "the connection is closed")


def test_a_service_that_stops_in_the_middle_is_unavailable(scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    documents = call_to(scripted).documents()
    next(documents)
    scripted.stop()
    with pytest.raises(ServiceUnavailable, match="went away"):
        list(documents)


def test_a_service_that_is_back_is_reached_at_once(scripted: ScriptedService) -> None:
    """Another channel of the program still waits before it tries again, and gRPC would share its connection."""
    scripted.stop()
    with get_grpc_channel(f"127.0.0.1:{scripted.port}") as other:
        with pytest.raises(RpcError):
            list(JinaSingleDocumentRequestRPCStub(other).stream_doc(SingleDocumentRequest()))
        with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{scripted.port} does not answer"):
            list(call_to(scripted).documents())
        scripted.start()
        assert len(list(call_to(scripted).documents())) == 4


def test_a_port_without_a_gateway_of_jina_is_not_ready(scripted: ScriptedService) -> None:
    assert not is_ready("127.0.0.1", scripted.port)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert not is_ready("127.0.0.1", unused.getsockname()[1])


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program that uses the client, in a process of its own."""
    command = [sys.executable, "-u", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_a_client_needs_no_torch() -> None:
    done = run(
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import helpers.conversation, helpers.prompts, helpers.service, helpers.chat\n"
        "print(helpers.stream('Hello').finish_reason)"
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_importing_the_client_leaves_the_program_as_it_was() -> None:
    """Jina's import changes the program's Ctrl-C handler, its warnings, and the start method of processes."""
    done = run(
        "import multiprocessing, signal, warnings\n"
        "handler = lambda *_: None\n"
        "signal.signal(signal.SIGINT, handler)\n"
        "format = warnings.formatwarning\n"
        "import helpers.client\n"
        "assert signal.getsignal(signal.SIGINT) is handler\n"
        "assert warnings.formatwarning is format\n"
        "assert ('always', None, DeprecationWarning, None, 0) not in warnings.filters\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_proxy_is_kept_and_not_used_for_this_machine(scripted: ScriptedService) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = run(
            "import asyncio, helpers, subprocess\n"
            f"print(helpers.ask('Hello', max_tokens=3, port={scripted.port}).completion_tokens)\n"
            f"print(asyncio.run(helpers.aask('Hello', max_tokens=3, port={scripted.port})).completion_tokens)\n"
            "subprocess.run('echo $http_proxy', shell=True)",
            http_proxy=proxy,
        )
    assert (done.stdout, done.stderr) == (f"3\n3\n{proxy}\n", "")


def test_a_program_that_leaves_an_answer_unread_still_ends(scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    done = run(f"import helpers; pieces = iter(helpers.stream('Hello', port={scripted.port})); print(next(pieces))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Half \n", "")
