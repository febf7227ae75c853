"""Import jina without changing the program around it. The other modules import Jina's names from here.

Importing jina 3.34 prints warnings, replaces `warnings.formatwarning` and the handler of Ctrl-C, raises the limit of
open files, makes folders in the home folder, and on a Mac makes fork the start method of every later process. This
module prevents or undoes all of that. `prepare_service` changes Jina and the environment in a process of a service.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .processes import raise_no_warnings

_ENOUGH_FILES = 4096
"""Jina raises the limit of open files to this number. It does nothing if the limit is at least as high."""
_NO_PROXY = "no_grpc_proxy"


@contextmanager
def _unchanged_program() -> Iterator[None]:
    """Prevent or undo what importing jina changes in the program."""
    environment = dict(os.environ)
    formatwarning = warnings.formatwarning
    start_method = multiprocessing.get_start_method(allow_none=True)
    try:
        with (
            warnings.catch_warnings(),
            _not_for_jina(Path, "mkdir"),
            _not_for_jina(signal, "signal"),
            _no_limit_of_files(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            if name.startswith("OBJC_"):
                del os.environ[name]
        warnings.formatwarning = formatwarning
        if multiprocessing.get_start_method(allow_none=True) != start_method:
            multiprocessing.set_start_method(start_method, force=True)


@contextmanager
def _not_for_jina(owner: Any, name: str) -> Iterator[None]:
    """Let a function do nothing for Jina during the block.

    A client needs none of Jina's folders, and the home may not be writable. A Ctrl-C while Jina is imported must reach
    the program's own handler.
    """
    function = getattr(owner, name)

    def call_unless_jina_asks(*arguments: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] not in ("jina", "hubble"):
            return function(*arguments, **options)
        return None

    setattr(owner, name, call_unless_jina_asks)
    try:
        yield
    finally:
        setattr(owner, name, function)


@contextmanager
def _no_limit_of_files() -> Iterator[None]:
    """Make Jina believe that the limit of open files is high enough, because raising it may print to stdout."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    getrlimit = resource.getrlimit

    def high_limit(which: int) -> tuple[int, int]:
        soft, hard = getrlimit(which)
        return max(soft, _ENOUGH_FILES), hard

    resource.getrlimit = high_limit
    try:
        yield
    finally:
        resource.getrlimit = getrlimit


with _unchanged_program():
    from docarray import BaseDoc
    from docarray.base_doc.mixins.io import _type_to_protobuf
    from docarray.proto import DocProto
    from docarray.typing import ID
    from grpc_health.v1.health_pb2 import HealthCheckResponse
    from jina import Deployment, Executor, requests
    from jina.excepts import PortAlreadyUsed
    from jina.parsers import set_pod_parser
    from jina.serve import executors
    from jina.serve.runtimes import asyncio as runtimes
    from jina.serve.runtimes.worker.request_handling import WorkerRequestHandler
    from jina.types.request.data import SingleDocumentRequest

_SERVING, _NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING

__all__ = [
    "ID",
    "BaseDoc",
    "CannotListen",
    "Deployment",
    "Executor",
    "QuietDoc",
    "SingleDocumentRequest",
    "SparseDoc",
    "prepare_service",
    "requests",
    "serve_executor",
    "use_no_proxy_for",
]


class QuietDoc(BaseDoc):
    """A `BaseDoc` whose subclasses are defined without pydantic's warning about DocArray's own field."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return handler(source)


class SparseDoc(QuietDoc):
    """A `QuietDoc` whose message leaves out the fields that are None. Their default must be None too."""

    def to_protobuf(self) -> DocProto:
        """Return the message. Writing a field takes several µs, and most fields of a token's document are None."""
        return DocProto(data={name: _type_to_protobuf(value) for name, value in self if value is not None})


class CannotListen(Exception):
    """The executor's server cannot listen at its host and port."""


SECONDS_BETWEEN_LOOKS = 0.1
"""How often the health that gRPC reports is compared with what the executor says."""


_SECONDS_TO_CANCEL = 5
"""How long gRPC waits after the grace time for answers that the executor has cancelled."""


class _Watchers(defaultdict[str, asyncio.Condition]):
    """The conditions that gRPC's `HealthServicer.Watch` waits for, one for each service's name.

    grpcio-health-checking deletes the condition when one client leaves. All others would wait for it forever.
    """

    def __delitem__(self, name: str) -> None:
        pass


def serve_executor(
    executor: Any,
    *,
    host: str,
    port: int,
    stop: threading.Event,
    when_ready: Callable[[], object],
    has_room: Callable[[], bool] = lambda: True,
    grace: float = 0,
) -> None:
    """Serve an Executor over gRPC in this process, until `stop` is set. Raise `CannotListen`.

    gRPC's health protocol says that the service "" serves as long as `has_room` returns True, until `stop` is set.
    Then the server refuses new requests, and the running ones have `grace` seconds.

    Jina's Deployment would do the same in a fork of this process, after the model could have been loaded. It runs this
    handler and this runtime too, without a gateway: Jina's gateway hides errors and repeats requests.
    """

    class Handler(WorkerRequestHandler):
        def _load_executor(self, *_: Any, **__: Any) -> None:
            self._executor = executor

    class Runtime(runtimes.AsyncNewLoopRuntime):
        async def async_setup(self) -> None:
            await super().async_setup()
            self.server.health_servicer._server_watchers = _Watchers(asyncio.Condition)
            self._reporting = asyncio.ensure_future(self._report_health())

        async def _report_health(self) -> None:
            while True:
                await self.server.health_servicer.set("", _SERVING if has_room() else _NOT_SERVING)
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

        async def async_teardown(self) -> None:
            self._reporting.cancel()
            await self.server.health_servicer.enter_graceful_shutdown()
            stopping = asyncio.ensure_future(self.server.server.stop(grace + _SECONDS_TO_CANCEL))
            await asyncio.wait({stopping}, timeout=grace)
            await super().async_teardown()  # cancels what is still running
            await stopping

    args = set_pod_parser().parse_args([])
    args.host, args.port = host, [port]
    args.proxy = True  # a download may need the proxy of the environment
    args.grpc_server_options = {
        "grpc.so_reuseport": 0,  # two services must not share a port unnoticed
        # Jina's client pings every 10 s, and gRPC closes a connection after the third ping without data.
        # Jina means to allow the pings, but gRPC does not know the names of its options.
        "grpc.http2.max_ping_strikes": 0,
        # a client that knows the service by a name looks for new ones when its connection ends; running answers go on
        "grpc.max_connection_age_ms": 60_000,
    }
    runtimes.HANDLED_SIGNALS = ()  # this process sets `stop` when it must end
    try:
        runtime = Runtime(args, cancel_event=stop, req_handler_cls=Handler)
    except (PortAlreadyUsed, RuntimeError) as error:
        raise CannotListen(str(error)) from error
    with runtime:
        when_ready()
        runtime.run_forever()


@functools.cache
def prepare_service() -> None:
    """Prepare a process of a service: its environment, and fixes of Jina. Call it before an Executor is defined.

    Jina's telemetry, its log and gRPC's log are off unless the environment turns them on. When Jina checks whether the
    Deployment of a user's script is ready, it must not use a proxy. Jina does not know IPv6 addresses. It also makes an
    Executor wait until all others with the same class name, in any process, have loaded their models.
    """
    raise_no_warnings()
    os.environ.setdefault("JINA_OPTOUT_TELEMETRY", "1")
    os.environ.setdefault("JINA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    use_no_proxy_for("127.0.0.1", "localhost", "::1")
    executors.avoid_concurrent_lock_cls = lambda cls: lambda init: init
    is_port_free = runtimes.is_port_free
    runtimes.is_port_free = lambda host, port: "[" in host or is_port_free(host, port)


def use_no_proxy_for(*hosts: str) -> None:
    """Let gRPC in this process connect directly to `hosts`, and to those that the user's ``no_proxy`` names."""
    named = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
    os.environ[_NO_PROXY] = ",".join([*([named] if named else []), *hosts])
