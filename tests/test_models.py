"""Loading, for real: the embedded model at every precision, local folders, and what does not load."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_stub import HubStub, Repo

import helpers

from helpers import models, prompts
from helpers.errors import InvalidRequest, ModelUnavailable

TOKEN = "hf_" + "notarealtoken" * 3
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def answer(chat_model: models.ChatModel, n: int = 12) -> str:
    import torch

    ids = torch.tensor([prompts.token_ids(QUESTION, chat_model.tokenizer)])
    out = chat_model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
    )
    return chat_model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_embedded_model_answers(embedded: Any) -> None:
    assert "Paris" in answer(embedded)
    assert (embedded.name, embedded.precision, embedded.device) == ("smollm2", "fp32", "cpu")
    assert embedded.context_length == 8192
    assert embedded.eos_token_ids == {embedded.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("bf16", "torch.bfloat16"), ("int8", "torch.int8"), ("nf4", "torch.uint8")],
)
def test_every_precision_really_runs_on_the_cpu(embedded: Any, precision: str, weights: str) -> None:
    chat_model = models.load("smollm2", precision)
    layer = chat_model.model.model.layers[0].mlp.down_proj.weight
    assert str(layer.dtype) == weights
    assert chat_model.precision == precision
    assert "Paris" in answer(chat_model)


def test_the_embedded_model_is_converted_once(embedded: Any) -> None:
    folder = models.embedded_folder()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.embedded_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def _convert(cache: str, start: Any, results: Any) -> None:
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    start.wait()
    results.put(str(models.embedded_folder()))


def test_two_programs_may_convert_at_once_and_a_killed_one_leaves_nothing(embedded: Any, tmp_path: Path) -> None:
    unfinished = tmp_path / "streaming-llama2" / "unfinished-of-a-killed-one"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    programs = [
        context.Process(target=_convert, args=(str(tmp_path), start, results)) for _ in range(2)
    ]
    for program in programs:
        program.start()
    folders = {results.get(timeout=300) for _ in programs}
    for program in programs:
        program.join()
    assert len(folders) == 1
    left = sorted(path.name for path in unfinished.parent.iterdir() if path.is_dir())
    assert left == [Path(folders.pop()).name]
    shutil.rmtree(tmp_path / "streaming-llama2")


def test_a_local_folder_is_loaded(tiny: Any, tiny_folder: Path) -> None:
    assert tiny.name == str(tiny_folder)
    assert tiny.context_length == 512
    assert tiny.eos_token_ids == {2}


def test_damaged_weights_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailable, match="damaged did not load in fp32.*--model smollm2"):
        models.load(str(folder), "fp32")


def test_a_folder_without_a_tokenizer_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-tokenizer"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnavailable, match="did not load"):
        models.load(str(folder), "fp32")


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="fp32, bf16, int8, nf4"):
        models.load("smollm2", "fp8")


def load_from_hub(stub: HubStub, model: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**stub.environment(home=home), "HF_TOKEN": TOKEN}
    return subprocess.run(
        [sys.executable, "-c", "import sys; from helpers import models; models.load(sys.argv[1])", model],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )


def test_a_model_of_the_hub_is_downloaded_and_served(
    tiny_folder: Path, tmp_path: Path, tiny_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubStub({TOKEN: "alice"}, {"someone/tiny": Repo(folder=tiny_folder)}) as stub:
        for name, value in {**stub.environment(home=tmp_path), "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        with helpers.serve("someone/tiny", port=0) as service:
            assert service.info().model == "someone/tiny"
            assert service.ask("Hello", max_tokens=9).text == tiny_service.ask("Hello", max_tokens=9).text
            log = service.log.read_text()
    assert "model.safetensors: 100%" in log  # the progress that whoever waits is shown
    assert TOKEN not in log


@pytest.mark.parametrize(
    ("state", "sentence"),
    [("pending", "awaits its authors' review"), ("never asked", "has not asked for"), ("missing", "no model")],
)
def test_what_may_not_be_had_is_refused_before_any_file(
    tiny_folder: Path, tmp_path: Path, state: Any, sentence: str
) -> None:
    with HubStub({TOKEN: "alice"}, {"someone/tiny": Repo(state, folder=tiny_folder)}) as stub:
        done = load_from_hub(stub, "someone/tiny", tmp_path)
        asked = [request.path for request in stub.requests]
    assert sentence in done.stderr.splitlines()[-1]
    assert "ModelUnavailable" in done.stderr.splitlines()[-1]
    assert not any("safetensors" in path for path in asked)
    assert TOKEN not in done.stdout + done.stderr


def test_what_does_not_fit_is_refused_before_any_file(tiny_folder: Path, tmp_path: Path) -> None:
    huge = Repo(folder=tiny_folder, parameters={"BF16": 10**12})
    with HubStub({TOKEN: "alice"}, {"someone/huge": huge}) as stub:
        done = load_from_hub(stub, "someone/huge", tmp_path)
        asked = [request.path for request in stub.requests]
    assert "someone/huge at nf4 needs 980.5 GB, and this machine has" in done.stderr.splitlines()[-1]
    assert not any("/resolve/" in path for path in asked)
