"""The messages that cross the wire, and the gRPC calls that carry them, without Jina and DocArray.

Both packages declare these messages, and the service uses theirs. But importing them takes seconds, because DocArray
imports torch. So this module declares the part that a client needs. The declaration is its own, so a program may import
Jina and DocArray too, before or after this module.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from pydantic import BaseModel

_FIELDS: dict[str, dict[str, tuple[int, Any]]] = {
    "Request": {"header": (1, "Header"), "document": (4, "Document")},
    "Header": {"exec_endpoint": (3, "string")},
    "Document": {"data": (1, ["Entry"])},
    "Entry": {"key": (1, "string"), "value": (2, "Node")},
    "Node": {
        "text": (1, "string"),
        "integer": (2, "int32"),
        "float": (3, "double"),
        "boolean": (4, "bool"),
        "list": (9, "List"),
        "dict": (12, "Document"),
    },
    "List": {"data": (1, ["Node"])},
    "Status": {"code": (1, "int32")},
}
"""Message → field → number and type, in a list if the field is repeated.

From ``jina.proto``: SingleDocumentRequestProto, HeaderProto, StatusProto. From ``docarray.proto``: DocProto and
DictOfAnyProto, which look the same on the wire, their map as a list of entries; NodeProto, ListOfAnyProto.
"""


def _declare(messages: dict[str, dict[str, tuple[int, Any]]]) -> dict[str, Any]:
    """Return the class of each message."""
    # proto2 tells an empty field from a missing one
    file = descriptor_pb2.FileDescriptorProto(name="helpers.proto", package="helpers", syntax="proto2")
    for message_name, fields in messages.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind) in fields.items():
            kind, label = (kind[0], "REPEATED") if isinstance(kind, list) else (kind, "OPTIONAL")
            field = message.field.add(name=name, number=number)
            field.label = descriptor_pb2.FieldDescriptorProto.Label.Value(f"LABEL_{label}")
            if kind in messages:
                field.type_name = f".helpers.{kind}"
            field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(
                "TYPE_MESSAGE" if kind in messages else f"TYPE_{kind.upper()}"
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"helpers.{name}")) for name in messages}


_MESSAGES = _declare(_FIELDS)
_Request, _Node, _Status = (_MESSAGES[name] for name in ("Request", "Node", "Status"))


def write_request(endpoint: str, document: BaseModel) -> Any:
    """Return the message that sends `document`, whose fields are texts, numbers, and lists and dicts of them.

    Raise `UnicodeEncodeError` for a text that is not valid Unicode.
    """
    request = _Request()
    request.header.exec_endpoint = endpoint
    _write_entries(request.document, document)
    return request


def read_fields(reply: Any) -> dict[str, Any]:
    """Return the fields of the document in a reply."""
    return _read_entries(reply.document)


def _write_entries(message: Any, items: Any) -> None:
    for key, value in items.items() if isinstance(items, dict) else items:
        entry = message.data.add(key=key)
        entry.value.SetInParent()
        _write(entry.value, value)


def _write(node: Any, value: Any) -> None:
    """Write `value` into `node`, which stays empty for None."""
    if isinstance(value, list):
        node.list.SetInParent()
        for one in value:
            _write(node.list.data.add(), one)
    elif isinstance(value, dict):
        node.dict.SetInParent()
        _write_entries(node.dict, value)
    elif value is not None:
        name = next(name for kind, name in _SCALARS.items() if isinstance(value, kind))
        setattr(node, name, value)


_SCALARS = {str: "text", bool: "boolean", int: "integer", float: "float"}


def _read_entries(message: Any) -> dict[str, Any]:
    return {entry.key: _read(entry.value) for entry in message.data}


def _read(node: Any) -> Any:
    for field, value in node.ListFields():
        if field.name == "list":
            return [_read(one) for one in value.data]
        return _read_entries(value) if field.name == "dict" else value
    return None


def stream(channel: grpc.Channel, request: Any) -> Any:
    """Send a request, and return the stream of its replies."""
    call = channel.unary_stream(
        "/jina.JinaSingleDocumentRequestRPC/stream_doc",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=_Request.FromString,  # a reply has the form of a request
    )
    return call(request)


def dry_run(channel: grpc.Channel, seconds: float) -> bool:
    """Return whether Jina's gateway and the executor behind it answer. Raise `grpc.RpcError` if there is none."""
    call = channel.unary_unary(
        "/jina.JinaGatewayDryRunRPC/dry_run",
        request_serializer=lambda _: b"",
        response_deserializer=_Status.FromString,
    )
    return bool(call(None, timeout=seconds).code == 0)


def status(channel: grpc.Channel, seconds: float) -> None:
    """Ask an executor, or a gateway, for its status. Raise `grpc.RpcError` if neither is there."""
    call = channel.unary_unary("/jina.JinaInfoRPC/_status")
    call(b"", timeout=seconds)


def open_channel(address: str, options: dict[str, Any] | None = None) -> grpc.Channel:
    """Return a gRPC channel, with the options of Jina's client and `options`.

    gRPC's own log is off, because every failure reaches the caller as an exception. Its handlers of forks are off,
    because they sometimes crash a program that forks after a call (5 of 48 programs with 20 forks, grpcio 1.68).
    """
    with _lock_of_environment:
        missing = _GRPC_VARIABLES.keys() - os.environ.keys()
        os.environ.update({name: _GRPC_VARIABLES[name] for name in missing})
        try:
            return grpc.insecure_channel(address, options=[*{**_CHANNEL_OPTIONS, **(options or {})}.items()])
        finally:
            for name in missing:
                del os.environ[name]


_CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 9999,
    "grpc.keepalive_timeout_ms": 4999,
    "grpc.keepalive_permit_without_calls": 1,
}
_GRPC_VARIABLES = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}
"""gRPC reads these environment variables when the first channel opens."""
_lock_of_environment = threading.Lock()
