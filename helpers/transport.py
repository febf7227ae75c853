"""One call to a service over gRPC: a document is sent, and documents come back.

This module knows Jina's protocol, but not the meaning of the documents. Every failure of the transport becomes a
`ServiceUnavailable`.
"""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Generic, TypeVar

from docarray import BaseDoc

from ._jina import (
    Client,
    Empty,
    JinaGatewayDryRunRPCStub,
    JinaSingleDocumentRequestRPCStub,
    RpcError,
    SingleDocumentRequest,
    StatusProto,
    get_grpc_channel,
    init_grpc_aio,
)
from .errors import ServiceUnavailable
from .options import check_port

Doc = TypeVar("Doc", bound=BaseDoc)


class Call(Generic[Doc]):
    """One request to an endpoint of a service. It is sent when its reply is read.

    `reply_type` is the class of the documents that come back. The constructor raises `InvalidRequest` if `port` is
    not a port. Reading raises `ServiceUnavailable` if no service answers, or if it goes away.
    """

    def __init__(self, endpoint: str, request: BaseDoc, reply_type: type[Doc], host: str, port: int) -> None:
        check_port(port)
        self.endpoint, self.request, self.reply_type = endpoint, request, reply_type
        self.host, self.port = host, port
        self._channel: Any = None
        self._cancelled = False

    def cancel(self) -> None:
        """Cancel the request, from any thread: `documents` ends or raises at once. Nothing is sent after that.

        `documents_async` does not notice: close its iterator instead.
        """
        self._cancelled = True
        if self._channel is not None:
            self._channel.close()

    def document(self) -> Doc:
        """Return the reply of an endpoint that replies with one document."""
        for document in self.documents():
            return document
        raise ServiceUnavailable(
            f"The program at {self.host}:{self.port} has no endpoint {self.endpoint}. Check the port."
        )

    def documents(self) -> Generator[Doc, None, None]:
        """Send the request and yield the documents as they arrive.

        Use plain gRPC. In a notebook, Jina's client would start a second event loop, and grpc.aio then prints
        `BlockingIOError` at random (grpc/grpc#25364).
        """
        message = SingleDocumentRequest()
        message.header.exec_endpoint = self.endpoint
        message.document_cls = type(self.request)
        message.data.doc = self.request
        with self._as_service_unavailable(), _open_channel(f"{self.host}:{self.port}") as self._channel:
            if self._cancelled:
                return
            replies = JinaSingleDocumentRequestRPCStub(self._channel).stream_doc(message)
            try:
                for reply in replies:
                    yield self.reply_type.from_protobuf(reply.document)
            finally:
                self._channel.close()
                with suppress(RpcError):  # gRPC keeps the connection until the end of the stream has been read
                    for _ in replies:
                        pass

    async def documents_async(self) -> AsyncGenerator[Doc, None]:
        """Send the request and yield the documents as they arrive, in an event loop."""
        if self._cancelled:
            return
        _keep_grpc_running()
        client = Client(host=self.host, port=self.port, protocol="grpc", asyncio=True, proxy=True)
        stream = client.stream_doc(on=self.endpoint, inputs=self.request, return_type=self.reply_type)
        with self._as_service_unavailable():
            async with aclosing(stream) as documents:
                async for document in documents:
                    yield document

    @contextmanager
    def _as_service_unavailable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = error.details() if hasattr(error, "details") else str(error)
            raise ServiceUnavailable(
                f"The service at {self.host}:{self.port} does not answer, or went away "
                f"({' '.join(str(reason).split())[:300]}). Start it with "
                f"`python -m helpers serve --port {self.port}` if it does not run, and ask again."
            ) from error


@contextmanager
def _open_channel(address: str) -> Iterator[Any]:
    # gRPC's global pool shares the wait after a refused connection, so a new channel would wait too
    options = {"grpc.use_local_subchannel_pool": 1}
    if threading.current_thread() is not threading.main_thread():
        # this thread then reads by itself, which saves a thread switch per document. Not the main thread: gRPC would
        # never close a connection whose read Ctrl-C has interrupted
        options["SingleThreadedUnaryStream"] = 1
    with get_grpc_channel(address, options=options) as channel:
        _open_channels.add(channel)
        yield channel


_open_channels: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _close_channels() -> None:
    """Close the open channels. A channel that is open when Python ends would hang the program."""
    for channel in list(_open_channels):
        channel.close()


def is_ready(host: str, port: int) -> bool:
    """Return whether a service behind Jina's gateway answers: the gateway and the executor behind it."""
    try:
        with get_grpc_channel(f"{host}:{port}") as channel:
            return bool(JinaGatewayDryRunRPCStub(channel).dry_run(Empty(), timeout=2).code == StatusProto.SUCCESS)
    except RpcError:
        return False


@functools.cache
def _keep_grpc_running() -> None:
    """Keep grpc.aio running from its first use to the end of the program.

    Otherwise it shuts down with its last channel, in the event loop's thread, and waits for a thread that may wait
    for that loop: many streams cancelled at once then hang the program (seen with grpcio 1.68).
    """
    init_grpc_aio()
