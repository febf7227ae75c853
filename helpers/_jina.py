"""Import jina without changing the program around it. The other modules import Jina's names from here.

Importing jina 3.34 prints warnings, replaces `warnings.formatwarning` and the handler of Ctrl-C, raises the limit of
open files, makes folders in the home folder, and on a Mac makes fork the start method of every later process. This
module prevents or undoes all of that. `prepare_service` changes Jina and the environment in a process of a service.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .addresses import host_to_ask, join

_ENOUGH_FILES = 4096
"""Jina raises the limit of open files to this number. It does nothing if the limit is at least as high."""
_NO_PROXY = "no_grpc_proxy"


@contextmanager
def _unchanged_program() -> Iterator[None]:
    """Undo what importing jina changes in the program."""
    environment = dict(os.environ)
    formatwarning = warnings.formatwarning
    start_method = multiprocessing.get_start_method(allow_none=True)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings(), _no_folders(), _no_limit_of_files():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            if name.startswith("OBJC_"):
                del os.environ[name]
        warnings.formatwarning = formatwarning
        if multiprocessing.get_start_method(allow_none=True) != start_method:
            multiprocessing.set_start_method(start_method, force=True)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and on_interrupt is not None:  # only the main thread may set a handler; None: one in C
            signal.signal(signal.SIGINT, on_interrupt)


@contextmanager
def _no_folders() -> Iterator[None]:
    """Let `Path.mkdir` do nothing for Jina: a client needs none of its folders, and the home may not be writable."""
    mkdir = Path.mkdir

    def mkdir_unless_jina_asks(path: Path, *arguments: Any, **options: Any) -> None:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] not in ("jina", "hubble"):
            mkdir(path, *arguments, **options)

    Path.mkdir = mkdir_unless_jina_asks  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Path.mkdir = mkdir  # type: ignore[method-assign]


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
    from docarray.typing import ID
    from google.protobuf.empty_pb2 import Empty
    from grpc import RpcError
    from jina import Deployment, Executor, requests
    from jina.excepts import RuntimeFailToStart
    from jina.orchestrate import deployments
    from jina.orchestrate.pods import BasePod
    from jina.proto.jina_pb2 import StatusProto
    from jina.proto.jina_pb2_grpc import JinaGatewayDryRunRPCStub
    from jina.serve import executors
    from jina.serve.networking.utils import get_grpc_channel
    from jina.serve.runtimes import asyncio as runtimes
    from jina.types.request.data import SingleDocumentRequest

__all__ = [
    "ID",
    "BaseDoc",
    "Deployment",
    "Empty",
    "Executor",
    "JinaGatewayDryRunRPCStub",
    "QuietDoc",
    "RpcError",
    "RuntimeFailToStart",
    "SingleDocumentRequest",
    "StatusProto",
    "open_channel",
    "prepare_service",
    "requests",
    "stream_documents",
    "use_no_proxy_for",
]


class QuietDoc(BaseDoc):
    """A `BaseDoc` whose subclasses are defined without pydantic's warning about DocArray's own field."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return handler(source)


def open_channel(address: str, options: dict[str, Any] | None = None) -> Any:
    """Return a gRPC channel.

    gRPC's own log is off, because every failure reaches the caller as an exception. Its handlers of forks are off,
    because they sometimes crash a program that forks after a call (5 of 48 programs with 20 forks, grpcio 1.68).
    """
    with _lock_of_environment:
        missing = _GRPC_OPTIONS.keys() - os.environ.keys()
        os.environ.update({name: _GRPC_OPTIONS[name] for name in missing})
        try:
            return get_grpc_channel(address, options=options)
        finally:
            for name in missing:
                del os.environ[name]


_GRPC_OPTIONS = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}
"""gRPC reads these environment variables when the first channel opens."""
_lock_of_environment = threading.Lock()


def stream_documents(channel: Any, request: Any) -> Any:
    """Send a `SingleDocumentRequest`, and return the stream of protobuf messages that reply to it.

    Jina's own stub would count bytes in an environment variable, and changing the environment is not thread-safe.
    """
    message = request.proto
    call = channel.unary_stream(
        "/jina.JinaSingleDocumentRequestRPC/stream_doc",
        request_serializer=type(message).SerializeToString,
        response_deserializer=type(message).FromString,
    )
    return call(message)


@functools.cache
def prepare_service() -> None:
    """Prepare a process of a service: its environment, and fixes of Jina. Call it before an Executor is defined.

    Jina's telemetry, its log and gRPC's log are off unless the environment turns them on. When
    Jina checks whether the service is ready, it must not use a proxy, and it would always ask 127.0.0.1. Jina does not
    know IPv6 addresses. It also makes an Executor wait until all others with the same class name, in any process, have
    loaded their models.
    """
    # with PYTHONWARNINGS=error, Jina does not start
    warnings.filters[:] = [one for one in warnings.filters if one[0] != "error"]  # type: ignore[index]
    os.environ.setdefault("JINA_OPTOUT_TELEMETRY", "1")
    os.environ.setdefault("JINA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    use_no_proxy_for("127.0.0.1", "localhost", "::1")
    executors.avoid_concurrent_lock_cls = lambda cls: lambda init: init
    is_port_free, parse_host_scheme = runtimes.is_port_free, deployments.parse_host_scheme
    runtimes.is_port_free = lambda host, port: "[" in host or is_port_free(host, port)
    deployments.parse_host_scheme = lambda host: (host, *[None] * 3) if "[" in host else parse_host_scheme(host)
    BasePod._get_control_address = lambda pod: join(host_to_ask(pod.args.host), pod.args.port[0])


def use_no_proxy_for(*hosts: str) -> None:
    """Let gRPC in this process connect directly to `hosts`, and to those that the user's ``no_proxy`` names."""
    named = os.environ.get(_NO_PROXY) or os.environ.get("no_proxy")
    os.environ[_NO_PROXY] = ",".join([*([named] if named else []), *hosts])
