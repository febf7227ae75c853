"""One call to a service over gRPC: a document is sent, and documents come back.

This module knows Jina's protocol, but not the meaning of the documents. Every failure of the transport becomes a
`ServiceUnavailable`.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import functools
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Generic, TypeVar

from grpc import ChannelConnectivity, RpcError, StatusCode
from pydantic import BaseModel

from .addresses import bypasses_proxy, host_to_ask, join
from .errors import HelpersError, InvalidRequest, ServiceUnavailable
from .options import check_port
from .wire import dry_run, open_channel, read_fields, status, write_request
from .wire import stream as stream_replies

Fields = TypeVar("Fields", bound=BaseModel)


class Call(Generic[Fields]):
    """One request to an endpoint of a service. It is sent when its reply is read.

    `request` and `reply_type` are of `helpers.fields` or `helpers.schemas`. The call opens a connection of its own,
    or uses those of `shared`, to any of its services. The constructor raises `InvalidRequest` if `host` is not a host
    or `port` not a port. Reading raises `ServiceUnavailable` if no service answers, or if it goes away.
    """

    def __init__(
        self,
        endpoint: str,
        request: BaseModel,
        reply_type: type[Fields],
        host: str,
        port: int,
        *,
        shared: SharedChannel | None = None,
    ) -> None:
        self.endpoint, self.request, self.reply_type = endpoint, request, reply_type
        self.host, self.port = host_to_ask(host), check_port(port)
        self._shared, self._is_sharing = shared, False
        self._channel: Any = None
        self._replies: Any = None
        self._cancelled = False

    def cancel(self) -> None:
        """Cancel the request, from any thread: reading ends or raises at once. Nothing is sent after that."""
        self._cancelled = True
        self._hang_up()

    def document(self) -> Fields:
        """Return the reply of an endpoint that replies with one document."""
        for document in self.documents():
            return document
        raise ServiceUnavailable(
            f"The program at {join(self.host, self.port)} has no endpoint {self.endpoint}. Check the port."
        )

    def documents(self) -> Generator[Fields, None, None]:
        """Send the request and yield the documents as they arrive.

        Ctrl-C interrupts the main thread anywhere, and in the middle of gRPC's own code it would leave a call that
        never ends. So there, another thread reads, unless the program is ending.
        """
        if _exiting or threading.current_thread() is not threading.main_thread():
            yield from self._documents()
            return
        arrived: queue.SimpleQueue[Fields | BaseException | None] = queue.SimpleQueue()
        reading = self._reading(arrived.put)
        try:
            reading.start()
            item = arrived.get()
            while item is not None and not isinstance(item, BaseException):
                yield item
                _check_process()
                item = arrived.get()
        except BaseException:
            self.cancel()
            raise
        finally:
            if reading.is_alive() and not _exiting:
                reading.join()
        if item is not None:
            raise item

    def _documents(self) -> Generator[Fields, None, None]:
        """Do what `documents` does, in this thread.

        Use plain gRPC, not grpc.aio, which prints `BlockingIOError` at random if a program has several event loops, as
        a notebook that uses Jina's client has (grpc/grpc#25364).
        """
        request = write_request(self.endpoint, self.request)
        with self._as_service_unavailable(), self._open() as self._channel:
            if self._cancelled:
                return
            replies = self._replies = stream_replies(self._channel, request)
            _in_use.add(replies)
            try:
                if self._cancelled:  # in the meantime, by another thread
                    return
                while (reply := _next(replies)) is not None:
                    yield self.reply_type(**read_fields(reply))
                    _check_process()
            finally:
                if self._hang_up():
                    with suppress(RpcError):  # gRPC keeps the connection until the end of the stream has been read
                        while _next(replies) is not None:
                            pass

    async def documents_async(self) -> AsyncGenerator[Fields, None]:
        """Send the request and yield the documents as they arrive, in an event loop. Another thread reads them.

        Raise `InvalidRequest` if no event loop of asyncio is running.
        """
        _end_thread_at_exit()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidRequest(
                "An `await` or `async for` of an answer needs asyncio's event loop, and none runs here. Use "
                "asyncio.run(...), or in trio `await trio.to_thread.run_sync(helpers.ask, question)`."
            ) from None
        arrived: asyncio.Queue[Fields | BaseException | None] = asyncio.Queue()

        def put(item: Fields | BaseException | None) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        try:
            self._reading(put).start()
            while (item := await arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
                _check_process()
        finally:
            self.cancel()

    def _reading(self, put: Callable[[Fields | BaseException | None], None]) -> threading.Thread:
        """Return a thread that sends the request and puts the documents, and at the end an error or None."""

        def read() -> None:
            try:
                for document in self._documents():
                    put(document)
            except BaseException as error:
                put(error)
            else:
                put(None)

        return threading.Thread(target=read, name="helpers-call", daemon=True)

    def _open(self) -> AbstractContextManager[Any]:
        if self._shared is None:
            return _open_channel(join(self.host, self.port), _proxy_options(self.host))
        self._is_sharing = not self._shared.is_failing
        # if no service serves, ask any that accepts a connection: it knows why
        return nullcontext(self._shared.open()) if self._is_sharing else self._shared.open_another()

    def _hang_up(self) -> bool:
        """End the request if this process sent it, and return whether it did."""
        if not self._is_sharing:
            return self._channel is not None and _close(self._channel)
        if self._replies is None or _process != os.getpid():
            return False
        self._replies.cancel()
        return True

    @contextmanager
    def _as_service_unavailable(self) -> Iterator[None]:
        try:
            yield
        except HelpersError:
            raise
        except Exception as error:
            _end_thread_at_exit()
            reason = error.details() if hasattr(error, "details") else str(error)
            raise ServiceUnavailable(
                f"The service at {join(self.host, self.port)} does not answer, or went away "
                f"({' '.join(str(reason).split())[:300]}). Start it with "
                f"`python -m helpers serve --port {self.port}` if it does not run, and ask again."
            ) from error


class SharedChannel:
    """Connections that many calls share, from any thread. They open with the first call, and again after `close`.

    `target` is an address in gRPC's form, which may stand for several services, and `options` are gRPC's.
    """

    def __init__(self, target: str, options: dict[str, Any]) -> None:
        self._target, self._options = target, options
        self._lock = threading.Lock()
        self._channel: Any = None
        self._state = [ChannelConnectivity.IDLE]

    @property
    def is_failing(self) -> bool:
        """Return whether gRPC has found no service that it may call. It keeps trying."""
        return self._state[0] == ChannelConnectivity.TRANSIENT_FAILURE

    def open(self) -> Any:
        """Return gRPC's channel. Raise `ServiceUnavailable` in a fork."""
        with self._lock:
            _prepare()
            if self._channel is None:
                # not SingleThreadedUnaryStream: a call that is cancelled would stay in the channel
                channel = open_channel(self._target, {**_OPTIONS, **self._options})
                _in_use.add(channel)
                # gRPC's thread that watches the state also reads the connections while no call does, so news of a
                # service's health arrive at once. It must not keep this object alive, but only the list
                channel.subscribe(functools.partial(self._state.__setitem__, 0), try_to_connect=True)
                self._channel = channel
            return self._channel

    def open_another(self) -> AbstractContextManager[Any]:
        """Open a connection to the first service that accepts one, and close it after the block."""
        return _open_channel(self._target, {**self._options, "grpc.service_config": "{}"})

    def close(self) -> None:
        """Close the connections. Calls that are running fail."""
        with self._lock:
            channel, self._channel = self._channel, None
            self._state = [ChannelConnectivity.IDLE]  # a new list: the old channel may still write into the old one
        if channel is not None:
            _close(channel)


_in_use: weakref.WeakSet[Any] = weakref.WeakSet()
"""The channels of this process, and their streams of replies."""
_process: int | None = None
"""The id of the process that has used gRPC."""
_waiting: set[int] = set()
"""The threads that wait for a reply."""
_exiting = False
_OPTIONS = {"grpc.use_local_subchannel_pool": 1}
"""gRPC's global pool shares the wait after a refused connection, so a new channel would wait too."""


@contextmanager
def _open_channel(target: str, options: dict[str, Any]) -> Iterator[Any]:
    """Open a connection, and close it after the block. Raise `ServiceUnavailable` in a fork."""
    _prepare()
    # the thread that asks then reads the replies too, which saves a thread switch per document
    channel = open_channel(target, {**_OPTIONS, "SingleThreadedUnaryStream": 1, **options})
    try:
        _in_use.add(channel)
        yield channel
    finally:
        _close(channel)


def _proxy_options(host: str) -> dict[str, Any]:
    return {"grpc.enable_http_proxy": 0} if bypasses_proxy(host) else {}


def _prepare() -> None:
    """Make gRPC ready for a channel of this process. Raise `ServiceUnavailable` in a fork."""
    global _process
    _end_thread_at_exit()
    _check_process()
    _process = os.getpid()
    _work_with_gevent()


def _work_with_gevent() -> None:
    """Let gRPC wait as gevent does, if gevent has patched the program. Otherwise gRPC would wait forever.

    Raise `ServiceUnavailable` in a thread of gevent's pool, where gRPC would still wait forever.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return
    if not sys.modules["gevent"].get_hub().main_hub:
        raise ServiceUnavailable(
            "gRPC does not work in a thread of gevent's pool. Ask in a greenlet of the main thread, such as "
            "gevent.spawn(helpers.ask, ...)."
        )
    _init_gevent()


@functools.cache
def _init_gevent() -> None:
    from grpc.experimental.gevent import init_gevent

    init_gevent()


def _close(channel: Any) -> bool:
    """Close a channel if this process opened it, and return whether it did."""
    if _process == os.getpid():
        channel.close()
        return True
    return False


def _check_process() -> None:
    """Raise `ServiceUnavailable` if this process is a fork of the process that has used gRPC."""
    if _process not in (None, os.getpid()):
        raise ServiceUnavailable(
            "This process is a fork of a program that had already asked a service, and gRPC does not work in such a "
            'fork. Start processes with multiprocessing.get_context("spawn").'
        )


def _next(replies: Any) -> Any:
    """Return the next reply, or None at the end."""
    thread = threading.get_ident()
    _waiting.add(thread)
    try:
        return next(replies, None)
    finally:
        _waiting.discard(thread)


def _end_thread_at_exit() -> None:
    """End this thread silently if the program is ending. Only a daemon thread still runs then."""
    if _exiting and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def _keep_forever() -> None:
    """Never free in a fork what belongs to its parent: gRPC would wait for threads that do not exist in the fork."""
    for one in list(_in_use):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_forever)


@atexit.register
def _close_channels() -> None:
    """Close the open channels, and wait up to a second until no thread is inside gRPC.

    A channel that is open when Python ends would hang the program. Python would end such a thread in the middle of
    gRPC's C++ code, which aborts the program.
    """
    global _exiting
    _exiting = True
    for one in list(_in_use):
        if hasattr(one, "unary_stream"):
            _close(one)
    end = time.monotonic() + 1
    while _waiting and _process == os.getpid() and time.monotonic() < end:
        time.sleep(0.01)


def is_ready(host: str, port: int) -> bool:
    """Return whether a service of Jina answers: an executor, or a gateway and the executor behind it."""
    try:
        host = host_to_ask(host)
        with _open_channel(join(host, port), _proxy_options(host)) as channel:
            try:
                return dry_run(channel, seconds=2)
            except RpcError as error:
                if error.code() != StatusCode.UNIMPLEMENTED:
                    return False
            status(channel, seconds=2)  # without a gateway, the executor listens when it is ready
            return True
    except RpcError:
        return False
