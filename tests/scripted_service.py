"""A service in the test's own process: a real gRPC server, and answers that the test writes. It starts at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from helpers._jina import SingleDocumentRequest
from helpers.conversation import Conversation
from helpers.errors import InvalidRequest, to_wire
from helpers.schemas import ChatDocument, CountDocument, ModelDocument, ModelOutputDocument, PromptDocument

REFUSED = InvalidRequest("The question is refused. Ask another one.")
Script = Callable[[Any], Iterator[ModelOutputDocument]]


class ScriptedService:
    """A service on a free `port` of `host`. `requests` holds all requests, and ``script(request)`` yields the answer.
    `running` is the number of requests that have neither been answered nor cancelled.

    The default script never ends by itself: answer 2 with ``max_tokens=3`` is ``"2:0 2:1 2:2 "``.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.requests: list[Any] = []
        self.running, self._lock = 0, threading.Lock()
        self.script: Script = self.count_up
        self.token_counts = CountDocument(prompt_tokens=30, context_length=512)
        self.resume = threading.Event()
        self.model = "scripted"
        self.port = 0
        self.start()

    def __enter__(self) -> ScriptedService:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start, on the same port as before."""
        from jina.proto.jina_pb2_grpc import add_JinaSingleDocumentRequestRPCServicer_to_server

        self.resume.clear()
        self._health = HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(128), options=[("grpc.so_reuseport", 0)])
        add_HealthServicer_to_server(self._health, self._server)
        add_JinaSingleDocumentRequestRPCServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"{self.host}:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Stop, and break off whatever is being answered."""
        stopping = self._server.stop(grace=None)
        self.resume.set()
        stopping.wait()

    def report_health(self, serving: bool) -> None:
        """Say by gRPC's health protocol whether this service serves. At first, it does."""
        self._health.set("", HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    def conversation(self, system: str | None = None, **options: Any) -> Conversation:
        return Conversation(system, port=self.port, **options)

    def count_up(self, request: Any) -> Iterator[ModelOutputDocument]:
        number = len(self.requests)
        for n in range(request.max_tokens):
            yield token(n, f"{number}:{n} ")
        yield last("length")

    def silence(self, request: Any) -> Iterator[ModelOutputDocument]:
        """Yield nothing until the test sets `resume`."""
        self.resume.wait()
        yield from self.count_up(request)

    def half(self, request: Any) -> Iterator[ModelOutputDocument]:
        """Yield two tokens, and the rest when the test sets `resume`."""
        yield from tokens("Half ", "an ")
        self.resume.wait()
        yield from self.count_up(request)

    def fail(self, request: Any) -> Iterator[ModelOutputDocument]:
        """Fail after two tokens."""
        yield from tokens("Half ", "an ")
        yield failed(REFUSED)

    def refuse(self, request: Any) -> Iterator[ModelOutputDocument]:
        """Refuse every request."""
        yield failed(REFUSED)

    def stream_doc(self, message: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Answer a request to Jina's endpoint for streams. gRPC calls this."""
        self._count(1)
        if not context.add_callback(lambda: self._count(-1)):
            self._count(-1)
        for document in self._reply(message, context):
            reply = SingleDocumentRequest()
            reply.document_cls = type(document)
            reply.data.doc = document
            yield reply

    def _count(self, change: int) -> None:
        with self._lock:
            self.running += change

    def _reply(self, message: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        endpoint = message.header.exec_endpoint
        if endpoint == "/info":
            loads = {"context_length": 512, "steps": 0, "running": 0, "waiting": 0}
            yield ModelDocument(model=self.model, precision="fp32", device="cpu", **loads)
            return
        if endpoint not in ("/chat", "/stream", "/count"):
            return
        document_type = PromptDocument if endpoint == "/stream" else ChatDocument
        request = document_type.from_protobuf(message.proto.document)
        if endpoint == "/count":
            yield self.token_counts
            return
        self.requests.append(request)
        for document in self.script(request):
            if not context.is_active():
                return
            yield document


def token(number: int, piece: str) -> ModelOutputDocument:
    """Return the document for the token `number`. The first tells a prompt of 5 tokens."""
    return ModelOutputDocument(token_id=number, generated_text=piece, prompt_tokens=None if number else 5)


def tokens(*pieces: str) -> Iterator[ModelOutputDocument]:
    """Yield a document for each token."""
    yield from map(token, range(len(pieces)), pieces)


def last(finish_reason: str, dropped_turns: int = 0) -> ModelOutputDocument:
    """Return the last document of a complete answer."""
    return ModelOutputDocument(
        token_id=-1, generated_text="", finish_reason=finish_reason, prompt_tokens=5, dropped_turns=dropped_turns
    )


def failed(error: Exception) -> ModelOutputDocument:
    """Return the last document of an answer that failed."""
    return ModelOutputDocument(token_id=-1, generated_text="", finish_reason="error", error=to_wire(error))
