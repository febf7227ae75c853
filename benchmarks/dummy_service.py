"""A service without a model: it answers at once, with as many tokens as a request asks for.

    python benchmarks/dummy_service.py PORT

`load.py` puts it behind the gateway, to measure what the gateway itself takes. All replies are ready before the first
request, so that it takes little time of the cores that the gateway runs on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from pydantic import BaseModel

from helpers.fields import ModelFields, NoFields, OutputFields
from helpers.wire import read_fields, write_request

HOST = "127.0.0.1"
METHOD = "/jina.JinaSingleDocumentRequestRPC/stream_doc"


def _message(document: BaseModel) -> bytes:
    """Return the reply that sends `document`. On the wire, a reply has the form of a request."""
    return bytes(write_request("", document).SerializeToString())


INFO = _message(
    ModelFields(model="dummy", precision="fp32", device="cpu", context_length=4096, steps=0, running=0, waiting=0)
)
REQUEST = type(write_request("", NoFields()))
FIRST = _message(OutputFields(token_id=1, generated_text=" word", prompt_tokens=5))
TOKEN = _message(OutputFields(token_id=1, generated_text=" word"))


class _Handler(grpc.GenericRpcHandler):
    def service(self, call: grpc.HandlerCallDetails) -> Any:
        if call.method != METHOD:
            return None
        return grpc.unary_stream_rpc_method_handler(_answer)  # without serializers, messages are bytes


def _answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    message = REQUEST.FromString(request)
    if message.header.exec_endpoint == "/info":
        yield INFO
        return
    tokens = int(read_fields(message)["max_tokens"])
    yield FIRST
    for _ in range(tokens - 1):
        yield TOKEN
    yield _message(
        OutputFields(
            token_id=-1, generated_text="", finish_reason="length", prompt_tokens=5, completion_tokens=tokens,
            dropped_turns=0,
        )
    )  # fmt: skip


def main() -> None:
    """Serve until the process is ended."""
    server = grpc.server(ThreadPoolExecutor(64), handlers=[_Handler()])
    add_HealthServicer_to_server(HealthServicer(), server)
    server.add_insecure_port(f"{HOST}:{int(sys.argv[1])}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
