"""Import jina without changing the program around it. The other modules import Jina's names from here.

Importing jina 3.34 prints warnings, replaces `warnings.formatwarning` and the handler of Ctrl-C, and on a Mac makes
fork the start method of every later process. This module undoes all of that. Jina's telemetry, its log and gRPC's log
are off unless the environment turns them on, because every failure reaches the caller as an exception. The
environment keeps its proxy (Jina would remove it for later child processes), but not for this machine itself.
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

_formatwarning = warnings.formatwarning
_start_method = multiprocessing.get_start_method(allow_none=True)
_on_interrupt = signal.getsignal(signal.SIGINT)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from google.protobuf.empty_pb2 import Empty
    from grpc import RpcError
    from grpc.aio import init_grpc_aio
    from jina import Client, Deployment, Executor, requests
    from jina.excepts import RuntimeFailToStart
    from jina.proto.jina_pb2 import StatusProto
    from jina.proto.jina_pb2_grpc import JinaGatewayDryRunRPCStub, JinaSingleDocumentRequestRPCStub
    from jina.serve.networking.utils import get_grpc_channel
    from jina.types.request.data import SingleDocumentRequest
warnings.formatwarning = _formatwarning
if multiprocessing.get_start_method(allow_none=True) != _start_method:
    multiprocessing.set_start_method(_start_method, force=True)
if threading.current_thread() is threading.main_thread():  # only the main thread may set a handler
    signal.signal(signal.SIGINT, _on_interrupt)

__all__ = [
    "Client",
    "Deployment",
    "Empty",
    "Executor",
    "JinaGatewayDryRunRPCStub",
    "JinaSingleDocumentRequestRPCStub",
    "RpcError",
    "RuntimeFailToStart",
    "SingleDocumentRequest",
    "StatusProto",
    "get_grpc_channel",
    "init_grpc_aio",
    "requests",
]
