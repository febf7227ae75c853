"""Jina, imported so that it stays quiet; `executor`, `client` and `service` take it from here.

Importing jina 3.34 warns about pkg_resources, replaces `warnings.formatwarning` and adds a filter that
shows every deprecation, for the whole program. The first two would spoil a notebook, so they are
undone. Its telemetry, its own log and gRPC's are off unless the environment says otherwise: what goes
wrong reaches the caller as an exception.
"""

import os
import warnings

os.environ.setdefault("JINA_OPTOUT_TELEMETRY", "1")
os.environ.setdefault("JINA_LOG_LEVEL", "CRITICAL")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_format = warnings.formatwarning
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from jina import Client, Deployment, Executor, requests  # noqa: F401
    from jina.excepts import RuntimeFailToStart  # noqa: F401
    from jina.proto.jina_pb2_grpc import JinaSingleDocumentRequestRPCStub  # noqa: F401
    from jina.serve.networking.utils import get_grpc_channel  # noqa: F401
    from jina.types.request.data import SingleDocumentRequest  # noqa: F401

    from grpc.aio import init_grpc_aio  # noqa: F401
warnings.formatwarning = _format
