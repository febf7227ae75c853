"""`helpers.models`: the bundled model at every precision, local folders, models of the Hub, and what does not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import helpers
from helpers import models, prompts
from helpers.errors import InvalidRequest, ModelUnavailable
from hub_stub import TOKEN, HubStub, Repo, model_folder

ROOT = Path(__file__).parent.parent
LONG = pytest.mark.long
QUESTION: list[prompts.Message] = [{"role": "user", "content": "What is the capital of France?"}]


def answer(chat_model: models.ChatModel) -> str:
    """Return the first words of the model's answer to `QUESTION`, as transformers generates them."""
    import torch

    ids = torch.tensor([prompts.token_ids(QUESTION, chat_model.tokenizer)])
    out = chat_model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return chat_model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# --- The bundled model ----------------------------------------------------------------------------


def test_the_bundled_model_answers(bundled: Any) -> None:
    assert "Paris" in answer(bundled)
    assert (bundled.name, bundled.precision, bundled.device) == ("smollm2", "fp32", "cpu")
    assert bundled.context_length == 8192
    assert bundled.eos_token_ids == {bundled.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("precision", ["int8", pytest.param("bf16", marks=LONG), pytest.param("nf4", marks=LONG)])
@pytest.mark.main  # it takes seconds
@pytest.mark.usefixtures("bundled")
def test_the_bundled_model_answers_at_every_precision(precision: str) -> None:
    assert "Paris" in answer(models.load("smollm2", precision))


# --- Local folders --------------------------------------------------------------------------------


def test_a_local_folder_is_loaded(tiny: Any, tiny_folder: Path) -> None:
    assert tiny.name == str(tiny_folder)
    assert tiny.context_length == 512
    assert tiny.eos_token_ids == {2}


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("fp32", "torch.float32"), ("bf16", "torch.bfloat16"), ("int8", "torch.int8"), ("nf4", "torch.uint8")],
)
def test_the_weights_have_the_precision_that_was_asked_for(tiny_folder: Path, precision: str, weights: str) -> None:
    chat_model = models.load(str(tiny_folder), precision)
    assert chat_model.precision == precision
    assert str(chat_model.model.model.layers[0].mlp.down_proj.weight.dtype) == weights
    assert len(answer(chat_model)) > 0


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_damaged_weights_are_reported(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailable, match=r"copy did not load at fp32 \(.*\)\. Try another .*--model smollm2"):
        models.load(str(copy), "fp32")


def test_a_missing_tokenizer_is_reported(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnavailable, match="copy did not load"):
        models.load(str(copy), "fp32")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="fp32, bf16, int8, nf4"):
        models.load("smollm2", "fp8")


# --- Models of the Hub ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with HubStub({TOKEN: "alice"}) as stub:
        stub.connect(monkeypatch, home=tmp_path / "home", HF_TOKEN=TOKEN)
        yield stub


def test_a_model_of_the_hub_is_downloaded_and_served(
    tiny_folder: Path, tmp_path: Path, tiny_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubStub({TOKEN: "alice"}, {"someone/tiny": Repo("granted", folder=tiny_folder)}) as stub:
        for name, value in stub.environment(home=tmp_path, HF_TOKEN=TOKEN).items():
            monkeypatch.setenv(name, value)
        with helpers.serve("someone/tiny", port=0) as service:
            assert service.info().model == "someone/tiny"
            assert service.ask("Hello", max_tokens=9).text == tiny_service.ask("Hello", max_tokens=9).text
            log = service.log.read_text()
    assert "model.safetensors: 100%" in log  # the progress that a waiting user sees
    assert TOKEN not in log


@pytest.mark.parametrize(
    ("state", "finding"),
    [
        ("pending", "alice asked for access to"),
        ("never asked", "alice has not asked for access"),
        ("missing", "the Hub has no model"),
    ],
)
def test_a_model_that_may_not_be_downloaded_is_refused_before_any_file(
    hub: HubStub, tmp_path: Path, state: Any, finding: str
) -> None:
    hub.repos = {"someone/tiny": Repo(state, folder=model_folder(tmp_path / "model"))}
    with pytest.raises(ModelUnavailable, match=finding) as error:
        models.load("someone/tiny")
    assert not [request for request in hub.requests if "safetensors" in request.path]
    assert error.value.__cause__ is None and TOKEN not in str(error.value)


def test_a_model_that_does_not_fit_is_refused_before_any_file(hub: HubStub, tmp_path: Path) -> None:
    hub.repos = {"someone/huge": Repo(folder=model_folder(tmp_path / "model"), parameters={"BF16": 10**12})}
    with pytest.raises(ModelUnavailable, match=r"someone/huge at nf4 needs 980\.5 GB, and "):
        models.load("someone/huge")
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_a_download_that_breaks_off_shows_neither_token_nor_address(hub: HubStub, tiny_folder: Path) -> None:
    """The address of a download may contain its key, and a traceback shows the cause."""
    hub.repos = {"someone/tiny": Repo("granted", folder=tiny_folder)}
    hub.faults = {"/cdn/": 403}
    with pytest.raises(ModelUnavailable, match="someone/tiny did not load at fp32") as error:
        models.load("someone/tiny", "fp32")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert "<address>" in str(error.value) and "/cdn/" not in str(error.value) and TOKEN not in str(error.value)


# --- The module -----------------------------------------------------------------------------------


def test_importing_the_module_imports_no_library_that_loads_models() -> None:
    heavy = {"torch", "transformers", "jina", "docarray", "filelock", "sentencepiece", "huggingface_hub.hf_api"}
    code = f"import sys, helpers.models; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
