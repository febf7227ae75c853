"""Call a service as a gRPC client of any language does: with the JSON form of the protobuf messages."""

from __future__ import annotations

import json
from typing import Any

SLOW = "[INST] Tell me everything. [/INST]"
"""A prompt that the tiny model, which never ends an answer, continues up to `max_tokens`."""

ENDLESS = 150_000
"""The `max_tokens` of an answer that takes a minute or more. Only the model in `endless_folder` has room for it."""


def call_by_wire(port: int, endpoint: str, fields: dict[str, Any]) -> list[Any]:
    """Send the document `fields` to `endpoint`, and return the `ModelOutputDocument`s of the stream."""
    from google.protobuf import json_format

    from helpers._jina import SingleDocumentRequest
    from helpers.schemas import ModelOutputDocument
    from helpers.wire import open_channel, read_fields, stream

    message = SingleDocumentRequest()
    message.header.exec_endpoint = endpoint
    json_format.Parse(json.dumps({"data": fields}), message.proto.document)
    with open_channel(f"127.0.0.1:{port}", {"grpc.enable_http_proxy": 0}) as channel:
        return [ModelOutputDocument(**read_fields(reply)) for reply in stream(channel, message.proto)]
