"""The messages that the client writes and reads are those of Jina and DocArray."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jina.serve.helper import get_default_grpc_options

from helpers import wire
from helpers._jina import BaseDoc, SingleDocumentRequest
from helpers.schemas import ChatDocument, CountDocument, ModelDocument, ModelOutputDocument, PromptDocument

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.none() | st.integers(-(2**31), 2**31 - 1)
SAMPLING = {
    "max_tokens": st.integers(1, 99),
    "temperature": st.floats(0, 2),
    "seed": NUMBER,
    "stop": st.lists(TEXT),
    "logprobs": NUMBER,
}
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})
DOCUMENTS = st.one_of(
    st.builds(PromptDocument, prompt=TEXT, **SAMPLING),
    st.builds(ChatDocument, messages=st.lists(MESSAGE), **SAMPLING),
    st.builds(
        ModelOutputDocument,
        token_id=st.integers(-1, 99),
        generated_text=TEXT,
        error=st.none() | TEXT,
        queue_seconds=st.none() | st.floats(0),
        cached_tokens=NUMBER,
        text_offset=NUMBER,
        logprobs=st.none() | st.lists(st.floats(max_value=0)),
        logprob_ids=st.none() | st.lists(st.integers(0, 2**31 - 1)),
        logprob_tokens=st.none() | st.lists(st.binary(max_size=9).map(bytes.hex)),
    ),
    st.builds(CountDocument, prompt_tokens=st.integers(0, 99), context_length=st.integers(0, 99)),
)


def as_jina_reads(request: Any, document_type: type[BaseDoc]) -> tuple[str, BaseDoc]:
    """Return the endpoint and the document of a request."""
    received = SingleDocumentRequest(request.SerializeToString())
    received.document_cls = document_type
    return received.proto.header.exec_endpoint, received.data.doc


@given(document=DOCUMENTS)
def test_jina_reads_the_document_that_the_client_writes(document: BaseDoc) -> None:
    assert as_jina_reads(wire.write_request("/chat", document), type(document)) == ("/chat", document)


@given(document=DOCUMENTS)
def test_the_client_reads_the_document_that_jina_writes(document: BaseDoc) -> None:
    sent = SingleDocumentRequest()
    sent.document_cls = type(document)
    sent.data.doc = document
    received = type(wire.write_request("/", document)).FromString(sent.proto.SerializeToString())
    assert type(document)(**wire.read_fields(received)) == document


def test_a_reply_with_another_kind_of_field_is_read_without_it() -> None:
    class Newer(ModelDocument):
        picture: bytes

    numbers = dict.fromkeys(("context_length", "steps", "running", "waiting"), 1)
    sent = SingleDocumentRequest()
    sent.data.doc = Newer(model="m", precision="fp32", device="cpu", picture=b"\xff", **numbers)
    received = type(wire.write_request("/", Newer.model_construct())).FromString(sent.proto.SerializeToString())
    assert ModelDocument(**wire.read_fields(received)).model == "m"


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError) as refused:
        wire.write_request("/stream", PromptDocument(max_tokens=1, prompt="", stop=["a\ud800"]))
    assert refused.value.start == 1


def test_the_options_of_a_channel_are_those_of_jinas_client() -> None:
    known = {name: value for name, value in get_default_grpc_options() if not name.startswith("grpc.http1.")}
    assert known == wire._CHANNEL_OPTIONS


@pytest.mark.main
@pytest.mark.parametrize("first", ["helpers.wire", "jina", "docarray"])
def test_a_program_may_import_jina_and_docarray_too(first: str) -> None:
    program = (
        f"import {first}\n"
        "from helpers import wire\n"
        "from docarray import BaseDoc\n"
        "from jina import Client\n"
        "from jina.proto import jina_pb2\n"
        "class Document(BaseDoc):\n"
        "    text: str\n"
        "document = Document(text='Hello')\n"
        "request = wire.write_request('/', document)\n"
        "read = jina_pb2.SingleDocumentRequestProto.FromString(request.SerializeToString())\n"
        "assert Document.from_protobuf(read.document) == document\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
