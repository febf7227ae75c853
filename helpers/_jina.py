"""Jina, imported so that it leaves the program as it was; `executor`, `client` and `service` take it from here.

Importing jina 3.34 warns about pkg_resources, replaces `warnings.formatwarning` and the handler of Ctrl-C,
and on a Mac makes fork the start method of every later process. All of that is undone. Jina's telemetry,
its log and gRPC's are off unless the environment says otherwise: what goes wrong reaches the caller as an
exception. A proxy that the environment names is kept (Jina would take it away from later child processes), but
not for this machine itself.
"""

import multiprocessing
import os
import signal
import threading
import warnings

os.environ.setdefault("JINA_OPTOUT_TELEMETRY", "1")
os.environ.setdefault("JINA_LOG_LEVEL", "CRITICAL")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("no_grpc_proxy", "127.0.0.1,localhost")

_format = warnings.formatwarning
_start_method = multiprocessing.get_start_method(allow_none=True)
_on_interrupt = signal.getsignal(signal.SIGINT)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from google.protobuf.empty_pb2 import Empty  # noqa: F401
    from grpc import RpcError  # noqa: F401
    from grpc.aio import init_grpc_aio  # noqa: F401
    from jina import Client, Deployment, Executor, requests  # noqa: F401
    from jina.excepts import RuntimeFailToStart  # noqa: F401
    from jina.proto.jina_pb2 import StatusProto  # noqa: F401
    from jina.proto.jina_pb2_grpc import (  # noqa: F401
        JinaGatewayDryRunRPCStub,
        JinaSingleDocumentRequestRPCStub,
    )
    from jina.serve.networking.utils import get_grpc_channel  # noqa: F401
    from jina.types.request.data import SingleDocumentRequest  # noqa: F401
warnings.formatwarning = _format
if multiprocessing.get_start_method(allow_none=True) != _start_method:
    multiprocessing.set_start_method(_start_method, force=True)
if threading.current_thread() is threading.main_thread():  # nobody else may set a handler
    signal.signal(signal.SIGINT, _on_interrupt)
