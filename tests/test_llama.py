"""`helpers.llama` against transformers' own models: tiny ones of every kind in the family, and the bundled one."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greedy import generated_answer, packed_answer
from helpers import prompts
from helpers.errors import ModelUnavailable
from helpers.options import SamplingParams

ROOT = Path(__file__).parents[1]
VOCABULARY = 200
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # wide, so that every layer matters
    "eos_token_id": None,
}
ROPE = {"rope_theta": 1000.0, "original_max_position_embeddings": 32}  # a prompt is longer than that
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "tied embeddings": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "one KV head": ("Llama", {"num_key_value_heads": 1}),
    "all KV heads": ("Llama", {"num_key_value_heads": 4}),
    "rope llama3": (
        "Llama",
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "rope yarn": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}),
    "rope linear": ("Llama", {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 4.0}}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
}


def random_model(kind: str, **options: Any) -> Any:
    """Return a tiny model of transformers. All its weights are random, those of norms and biases too."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, changes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **changes, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def lean(folder: Path, precision: str = "fp32") -> Any:
    """Return the `Llama` of the files in a folder."""
    from helpers.llama import Llama
    from helpers.llama_graphs import LlamaGraphs

    config = json.loads((folder / "config.json").read_text())
    return Llama(LlamaGraphs(config, sorted(map(str, folder.glob("*.safetensors"))), precision))


@pytest.fixture(scope="module")
def saved(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Return a random model of a kind, and the folder that it is saved in."""

    @functools.cache
    def saved(kind: str) -> tuple[Any, Path]:
        model, folder = random_model(kind), tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return model, folder

    return saved


def random_ids(n: int, seed: int) -> list[int]:
    import torch

    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(logits: Any, expected: Any, *, error: float = 1e-4) -> None:
    """Assert that rows of logits, (rows, vocabulary), differ by at most `error` of their norm."""
    assert logits.shape == expected.shape
    assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max() <= error


def logits_of_every_token(model: Any, ids: list[int]) -> Any:
    """Return the logits of a `Llama` after each token of a sequence, (tokens, vocabulary)."""
    import torch

    from helpers.kv_cache import KVCache
    from helpers.packed import Chunk

    with torch.inference_mode():
        return model.logits_of(model.hidden_states(torch.tensor(ids), [Chunk(KVCache(len(ids)), len(ids))]))


# --- fp32: the same as transformers ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_transformers(torch: Any, saved: Any, kind: str) -> None:
    model, folder = saved(kind)
    ids = random_ids(60, seed=1)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert_close(logits_of_every_token(lean(folder), ids), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_ids_are_those_of_generate(saved: Any, kind: str) -> None:
    model, folder = saved(kind)
    prompt = random_ids(10, seed=2)
    answer = packed_answer(lean(folder), prompt, 50)
    assert answer == generated_answer(model, prompt, 50)
    assert len(set(answer)) > 3


OPTIONAL = (
    "head_dim",
    "hidden_act",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("left_out", OPTIONAL)
def test_what_config_json_leaves_out_has_transformers_default(
    torch: Any, tmp_path: Path, kind: str, left_out: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from helpers.model_files import is_llama_family

    random_model(kind, num_attention_heads=32, hidden_size=512, num_hidden_layers=1).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    written.pop(left_out, None)
    file.write_text(json.dumps(written))
    if not is_llama_family(written):  # such as Mistral, which then has a sliding window
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    model.save_pretrained(tmp_path)
    file.write_text(json.dumps(written))
    ids = random_ids(40, seed=1)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert_close(logits_of_every_token(lean(tmp_path), ids), expected)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_the_rotation_may_be_written_as_older_versions_of_transformers_do(
    torch: Any, tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    random_model("Llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    del written["rope_parameters"]
    file.write_text(json.dumps({**written, "rope_theta": 500.0, "rope_scaling": scaling}))
    ids = random_ids(60, seed=1)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(torch.tensor([ids])).logits[0]
    assert_close(logits_of_every_token(lean(tmp_path), ids), expected)


def read_side_by_side(model: Any) -> Any:
    """Return the logits of all steps in which sequences are read side by side, (rows, vocabulary).

    In a step, some read a chunk of their prompts, and others decode: they read one token. Two begin later.
    """
    import torch

    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    sequences = [(random_ids(length, seed=length), begin) for length, begin in ((50, 0), (9, 0), (33, 2), (1, 3))]
    caches = [KVCache(len(ids) + 8) for ids, _ in sequences]
    rows = []
    for step in range(12):
        batch = []
        for cache, (ids, begin) in zip(caches, sequences, strict=True):
            answer = random_ids(8, seed=len(ids) + 1)
            chunk = ids[cache.length : cache.length + 7] or answer[cache.length - len(ids) :][:1]
            if step >= begin and chunk:
                batch.append((cache, chunk))
        logits, most_likely = forward_packed(model, batch)
        assert most_likely == logits.argmax(dim=-1).tolist()
        rows.append(logits.clone())
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_side_by_side_get_the_logits_of_the_other_way_to_run_the_model(saved: Any, kind: str) -> None:
    from helpers.packed_attention import TransformersModel

    _, folder = saved(kind)
    other = TransformersModel(random_model(kind))
    other.prepare()
    assert_close(read_side_by_side(lean(folder)), read_side_by_side(other))


def test_a_step_that_fails_leaves_every_kv_cache_as_long_as_before(
    torch: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    model, cache, undisturbed, prompt = lean(saved("Llama")[1]), KVCache(20), KVCache(20), list(range(10))
    for each in (cache, undisturbed):
        forward_packed(model, [(each, prompt[:6])])
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits_of", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward_packed(model, [(cache, prompt[6:])])
    assert cache.length == 6
    logits = [forward_packed(model, [(each, prompt[6:])])[0] for each in (cache, undisturbed)]
    assert torch.equal(*logits)


def test_what_a_kv_cache_holds_may_move_between_two_tokens(torch: Any, saved: Any) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    model, stays, moves = lean(saved("Llama")[1]), KVCache(100), KVCache(12)
    for cache in (stays, moves):
        forward_packed(model, [(cache, list(range(10)))])
    for token in range(30):
        if moves.length == moves.capacity:
            moves = moves.move_prefix(moves.length, capacity=moves.capacity + 3)
        logits = [forward_packed(model, [(cache, [token])])[0] for cache in (stays, moves)]
        assert torch.equal(*logits), token


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_sequences_that_come_and_go_get_the_logits_that_each_gets_alone(torch: Any, saved: Any, precision: str) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    def read(model: Any, *batch: tuple[KVCache, list[int]]) -> Any:
        return forward_packed(model, batch)[0]

    folder, chance = saved("Llama")[1], random.Random(4)
    in_company, alone = lean(folder, precision), lean(folder, precision)
    running: list[tuple[KVCache, KVCache]] = []  # of each sequence, with one model and with the other
    ended: list[tuple[KVCache, KVCache]] = []
    sizes = set()
    for step in range(60):
        for _ in range(chance.choice([0, 0, 1, 2, 6]) if step < 40 else 0):
            running.append((KVCache(80), KVCache(80)))
            for model, cache in zip((in_company, alone), running[-1], strict=True):
                read(model, (cache, random_ids(step % 9 + 1, seed=step)))
        chance.shuffle(running)
        for _ in range(min(len(running), chance.choice([0, 1, 2, 3]))):
            ended.append(running.pop())
        if running:
            sizes.add(len(running))
            ids = [[token] for token in random_ids(len(running), seed=100 + step)]
            some, others = ([*zip(caches, ids, strict=True)] for caches in zip(*running, strict=True))
            assert torch.equal(read(in_company, *some), torch.cat([read(alone, one) for one in others])), step
    assert {1, 3, 4, 8} <= sizes and max(sizes) > 16
    for pair in ended:  # the prefix cache would keep them
        for layer in range(pair[0].num_layers):
            assert torch.equal(*(cache.reserve(layer, heads=0, size=0)[:, :, : cache.length] for cache in pair))


def test_a_sequence_that_is_gone_leaves_no_memory(torch: Any, saved: Any) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    model = lean(saved("Llama")[1])
    for count in (1, 5):
        caches = [KVCache(20) for _ in range(count)]
        forward_packed(model, [(cache, [1]) for cache in caches])
        memory = [weakref.ref(cache) for cache in caches]
        del caches
        assert [reference() for reference in memory] == [None] * count


def test_without_memory_for_a_kv_cache_nothing_is_written_into_another(
    torch: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    model, new = lean(saved("Llama")[1]), KVCache(20)
    expected = forward_packed(model, [(KVCache(20), [7])])[0]
    old = [KVCache(20) for _ in range(6)]
    forward_packed(model, [(cache, [1]) for cache in old])
    before = [old[5].reserve(layer, heads=0, size=0).clone() for layer in range(old[5].num_layers)]
    reserve = KVCache.reserve

    def fail(cache: Any, layer: int, **options: Any) -> Any:
        if cache is new and layer == 1:
            raise RuntimeError("out of memory")
        return reserve(cache, layer, **options)

    batch = [*((cache, [2]) for cache in old[:5]), (new, [7])]  # the last one takes the place of an old one
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "reserve", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            forward_packed(model, batch)
    assert torch.equal(forward_packed(model, batch)[0][5:], expected)
    for layer, stored in enumerate(before):
        assert torch.equal(old[5].reserve(layer, heads=0, size=0)[:, :, :1], stored[:, :, :1])


def test_tokens_for_which_a_kv_cache_has_no_room_are_refused(saved: Any) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    model, cache = lean(saved("Llama")[1]), KVCache(12)
    forward_packed(model, [(cache, list(range(10)))])
    with pytest.raises(IndexError, match=r"^10 and 3 tokens do not fit into a KV cache for 12\.$"):
        forward_packed(model, [(cache, [1, 2, 3])])
    assert cache.length == 10


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_prompt_has_the_same_logits_in_whatever_chunks_it_is_read(torch: Any, saved: Any, precision: str) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed
    from helpers.prefill import BLOCK

    model, ids = lean(saved("Llama")[1], precision), random_ids(3 * BLOCK + 5, seed=1)

    def read(*ends: int) -> Any:
        cache, others = KVCache(len(ids)), KVCache(200)
        for begin, end in itertools.pairwise((0, *ends)):
            batch = [(others, [1, 2, 3]), (cache, ids[begin:end])] if begin else [(cache, ids[begin:end])]
            logits, _ = forward_packed(model, batch)
        return logits[-1]

    expected = read(len(ids))
    for ends in ([BLOCK], [BLOCK, 2 * BLOCK, 3 * BLOCK], [2 * BLOCK]):
        assert torch.equal(read(*ends, len(ids)), expected), ends


def test_the_trial_says_how_much_memory_a_token_takes(torch: Any, saved: Any) -> None:
    trial = lean(saved("Llama")[1]).prepare()
    layers, heads, size, keys_and_values, bytes_per_number = 3, 2, 16, 2, 4
    assert trial.bytes_per_token == {torch.device("cpu"): layers * heads * size * keys_and_values * bytes_per_number}


# --- Files ----------------------------------------------------------------------------------------


def test_weights_in_several_files_are_read(copy: Path, tiny: Any, tiny_reference: Any) -> None:
    from helpers import models

    (copy / "model.safetensors").unlink()
    tiny_reference.save_pretrained(copy, max_shard_size="3MB")
    assert len(list(copy.glob("*.safetensors"))) > 2 and (copy / "model.safetensors.index.json").exists()
    ids = random_ids(20, seed=1)
    loaded = models.load(str(copy), "fp32")
    assert (logits_of_every_token(loaded.model, ids) == logits_of_every_token(tiny.model, ids)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_in_16_bit_are_computed_in_fp32(torch: Any, saved: Any, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    random_model("Qwen2").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(60, seed=1)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert_close(logits_of_every_token(lean(tmp_path), ids), expected)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Save the weights in `folder` again after `change`, which gets them by name."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["tied embeddings", "biases", "Qwen2", "Qwen3"])
def test_a_missing_tensor_is_refused_with_its_name(saved: Any, tmp_path: Path, kind: str) -> None:
    """transformers refuses it too, see `helpers.models`."""
    from safetensors import safe_open

    folder = Path(shutil.copytree(saved(kind)[1], tmp_path / "copy"))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if "layers.0" not in name]  # noqa: SIM118
    for name in names:
        change_weights(folder, lambda weights, name=name: weights.pop(name))
        with pytest.raises(
            ModelUnavailable,
            match=rf"^The model has no weights for 1 of its tensors, such as {name}\. Download it again, or name one",
        ):
            lean(folder)
        shutil.copy(saved(kind)[1] / "model.safetensors", folder)


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight"),
        ("intermediate_size", 64, "model.layers.0.mlp.gate_proj.weight"),
        ("vocab_size", VOCABULARY + 1, "model.embed_tokens.weight"),
        ("hidden_size", 32, "model.embed_tokens.weight"),
    ],
)
def test_a_shape_that_the_configuration_does_not_give_is_refused(
    saved: Any, tmp_path: Path, key: str, value: int, tensor: str
) -> None:
    folder = Path(shutil.copytree(saved("Llama")[1], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value, "head_dim": 16}))
    with pytest.raises(ModelUnavailable, match=rf"^The model's tensor {tensor} has the shape \("):
        lean(folder)


def test_a_head_in_the_file_wins_over_tied_embeddings(torch: Any, saved: Any, tmp_path: Path) -> None:
    """As in transformers 5."""
    folder = Path(shutil.copytree(saved("tied embeddings")[1], tmp_path / "copy"))
    ids = [3, 1, 4, 1, 5]
    before = logits_of_every_token(lean(folder), ids)
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": -weights["model.embed_tokens.weight"]}))
    assert_close(logits_of_every_token(lean(folder), ids), -before)
    change_weights(folder, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert logits_of_every_token(lean(folder), ids).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_of_nan_or_infinity_are_refused(
    saved: Any, tmp_path: Path, precision: str, name: str, value: float
) -> None:
    folder = Path(shutil.copytree(saved("Llama")[1], tmp_path / "copy"))
    change_weights(folder, lambda weights: weights[name][slice(None) if "embed" in name else 1].fill_(value))
    with pytest.raises(ModelUnavailable, match=rf"^The model's tensor {name} contains NaN or infinity\. Download"):
        lean(folder, precision)


def test_a_hidden_state_that_is_not_finite_makes_its_own_logits_nan(torch: Any, saved: Any) -> None:
    model = lean(saved("Llama")[1], "int8")
    hidden = torch.randn(3, 64)
    expected = model.logits_of(hidden.clone())
    hidden[1, 5] = math.inf
    logits = model.logits_of(hidden)
    assert logits[1].isnan().all() and torch.equal(logits[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
def test_weights_of_another_type_are_refused(torch: Any, saved: Any, tmp_path: Path, kind: str) -> None:
    folder, name = Path(shutil.copytree(saved("Llama")[1], tmp_path / "copy")), "model.layers.1.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: weights[name].to(getattr(torch, kind))}))
    with pytest.raises(
        ModelUnavailable, match=rf"^The model's tensor {name} is stored as (F8_E4M3|I8)\. Choose a model in"
    ):
        lean(folder)


def test_weights_may_begin_at_any_byte(torch: Any, saved: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("Llama")[1], tmp_path / "copy"))
    content, ids = (folder / "model.safetensors").read_bytes(), random_ids(20, seed=1)
    end = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(
        (end - 8 + 1).to_bytes(8, "little") + content[8:end] + b" " + content[end:]
    )
    assert torch.equal(*(logits_of_every_token(lean(one), ids) for one in (folder, saved("Llama")[1])))


def test_weights_so_large_that_int8_overflows_are_refused(saved: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved("Llama")[1], tmp_path / "copy"))
    change_weights(folder, lambda weights: weights["model.layers.1.mlp.down_proj.weight"][1].fill_(3e38))
    with pytest.raises(ModelUnavailable, match=r"^Llama computes logits that are NaN or infinite, in int8\. Serve it"):
        lean(folder, "int8").prepare()


def test_the_default_type_of_torch_does_not_matter(torch: Any, saved: Any) -> None:
    """transformers changes it while it loads a model, in all threads."""
    folder, ids = saved("Llama")[1], random_ids(20, seed=1)
    expected = logits_of_every_token(lean(folder), ids)
    torch.set_default_dtype(torch.float16)
    try:
        logits = logits_of_every_token(lean(folder), ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits, expected)


THREADS = """
import json
import sys
import threading
from pathlib import Path
import torch
from helpers.llama import Llama
from helpers.llama_graphs import LlamaGraphs

folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
model = Llama(LlamaGraphs(config, [str(folder / "model.safetensors")], "fp32"))
counts = []

def count():
    counts.append(torch.get_num_threads())

def serve():
    model.prepare()
    count()

for function in (serve, count):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
count()
print(counts)
"""


@pytest.mark.main
def test_only_the_thread_of_the_model_uses_one_thread_of_torch(saved: Any) -> None:
    command = [sys.executable, "-c", THREADS, str(saved("Llama")[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[1, 2, 2]"


# --- Which models go this way ---------------------------------------------------------------------


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_the_family_is_recognised(saved: Any, kind: str) -> None:
    from helpers.model_files import is_llama_family

    _, folder = saved(kind)
    assert is_llama_family(json.loads((folder / "config.json").read_text()))


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma2": ("Gemma2", {"head_dim": 8}),
    "Mistral with a sliding window": ("Mistral", {"sliding_window": 16}),
    "Mistral as published": ("Mistral", {}),
    "Qwen2 with sliding windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "dynamic rope": ("Llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}),
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "narrow heads": ("Llama", {"head_dim": 8}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_go_through_transformers(copy: Path, tiny: Any, kind: str) -> None:
    import transformers

    from helpers import models
    from helpers.model_files import is_llama_family
    from helpers.packed_attention import TransformersModel

    name, options = OTHERS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZE, "vocab_size": len(tiny.tokenizer), **options})
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(copy)
    assert not is_llama_family(json.loads((copy / "config.json").read_text()))
    loaded = models.load(str(copy), "fp32")
    assert type(loaded.model) is TransformersModel
    assert loaded.model.prepare().num_layers == 3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_family_is_loaded_as_llama(tiny_folder: Path, precision: str) -> None:
    from helpers import models
    from helpers.llama import Llama

    assert type(models.load(str(tiny_folder), precision).model) is Llama


def test_weights_that_are_not_in_safetensors_go_through_transformers(
    torch: Any, copy: Path, tiny_reference: Any
) -> None:
    from helpers import models
    from helpers.packed_attention import TransformersModel

    (copy / "model.safetensors").unlink()
    torch.save(tiny_reference.state_dict(), copy / "pytorch_model.bin")
    assert type(models.load(str(copy), "fp32").model) is TransformersModel


PUBLISHED = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"model_type": "mistral"},  # of version 0.1, with the window of 4096 tokens that is its default
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096},
        {"model_type": "phi3"},
        {"head_dim": 40},
        {"num_key_value_heads": 5},
    ],
    ids=str,
)
def test_a_published_configuration_that_needs_transformers_is_recognised(change: dict[str, Any]) -> None:
    from helpers.model_files import is_llama_family

    assert not is_llama_family(PUBLISHED | change)


@pytest.mark.parametrize("left_out", sorted(PUBLISHED))
def test_a_configuration_that_leaves_a_size_out_needs_transformers(left_out: str) -> None:
    from helpers.model_files import is_llama_family

    assert not is_llama_family({key: value for key, value in PUBLISHED.items() if key != left_out})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 8},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "num_key_value_heads": 8},
        {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128},
    ],
    ids=str,
)
def test_a_published_configuration_of_the_family_is_recognised(change: dict[str, Any]) -> None:
    from helpers.model_files import is_llama_family

    assert is_llama_family(PUBLISHED | change)


# --- int8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_close_to_fp32(saved: Any, kind: str) -> None:
    _, folder = saved(kind)
    ids = random_ids(60, seed=1)
    logits, expected = (logits_of_every_token(lean(folder, precision), ids) for precision in ("int8", "fp32"))
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < errors.median() < 0.2  # random weights spread an error more than trained ones


QUESTIONS = ["Name a river.", "Why is the sky blue?", "Count to five.", "Write a line of Python that adds two numbers."]
SUBJECTS = ["a token", "the moon", "a bridge", "rain", "a violin", "the number seven", "salt", "a library", "Rome"]


def different_questions(n: int) -> Iterator[str]:
    """Yield n questions of different lengths."""
    for k in range(n):
        subject = SUBJECTS[k % len(SUBJECTS)]
        yield f"{QUESTIONS[k % len(QUESTIONS)]} Think of {subject} {k} times. {'Be brief. ' * (k % 5)}"


@pytest.mark.parametrize(("questions", "tokens"), [(8, 12), pytest.param(200, 40, marks=pytest.mark.long)])
def test_greedy_answers_at_int8_are_the_same_alone_and_among_seven_others(
    bundled: Any, questions: int, tokens: int
) -> None:
    """All prompts begin with the same system prompt, so in company they share the prefill budget and a prefix."""
    from helpers.engine import Engine

    params = SamplingParams(max_tokens=tokens)
    asked = [
        prompts.token_ids(
            [{"role": "system", "content": prompts.SYSTEM_PROMPT}, {"role": "user", "content": text}], bundled.tokenizer
        )
        for text in different_questions(questions)
    ]

    def answers(at_once: int) -> list[list[int]]:
        engine = Engine(bundled.model, eos_token_ids=bundled.eos_token_ids, context_length=bundled.context_length)
        try:
            found = []
            for begin in range(0, questions, at_once):
                streams = [engine.submit(ids, params) for ids in asked[begin : begin + at_once]]
                found += [list(stream) for stream in streams]
            return found
        finally:
            engine.close()

    alone, in_company = answers(1), answers(8)
    assert [n for n in range(questions) if alone[n] != in_company[n]] == []


@pytest.mark.long
def test_int8_predicts_a_text_nearly_as_well_as_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality = importlib.import_module("quality")
    for path in quality.TEXTS:
        found = quality.compare(path.read_text(encoding="utf-8"))
        assert found.ratio <= 1.015 and found.agreement >= 0.92, f"{path.name}: {found}"


LOAD = """
import json
import sys
from pathlib import Path
import numpy
from helpers.graphs import Graph
from helpers.llama_graphs import LlamaGraphs

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
graph = Graph("int8")
graph.session(graph.linear(graph.input("rows", "rows", 8), numpy.ones((8, 8), numpy.float32)))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
graphs = LlamaGraphs(config, [str(folder / "model.safetensors")], sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.main
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="This system does not show the peak of memory.")
def test_loading_at_int8_never_needs_the_weights_in_fp32_too(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20, "num_attention_heads": 8}
    config = LlamaConfig(**size, vocab_size=1000)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    weights = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parameters = sum(tensor.numel() for tensor in weights.values())
    command = [sys.executable, "-c", LOAD, str(tmp_path), "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    print(f"{peak / parameters:.2f} bytes for each parameter")
    assert peak < (4 + 1) * parameters
