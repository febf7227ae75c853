"""One forward pass for many sequences: models of several kinds, and those that must be refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import ModelUnavailable

SIZE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,  # wide, so that every layer matters
}
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Gemma2": {"head_dim": 8, "sliding_window": 16},  # with logit soft-capping, which no kernel does
    "Phi3": {"pad_token_id": 0},
    "GPTNeoX": {},
}


def random_model(kind: str, **options: Any) -> Any:
    """Return a tiny model of this kind with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_sequence_gets_the_same_logits_as_alone(torch: Any, kind: str, dtype: str) -> None:
    """Read in chunks, beside others, and beyond the width of a sliding window."""
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed
    from helpers.packed_attention import TransformersModel

    model = random_model(kind, **ARCHITECTURES[kind]).to(getattr(torch, dtype))
    prompts = [torch.randint(0, 200, (n,)).tolist() for n in (50, 20, 33)]
    with torch.inference_mode():
        alone = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    packed = TransformersModel(model)
    packed.prepare()
    caches = [KVCache(50) for _ in prompts]
    in_company: dict[int, Any] = {}
    for begin in range(0, 50, 7):
        reading = [n for n, prompt in enumerate(prompts) if begin < len(prompt)]
        logits, most_likely = forward_packed(packed, [(caches[n], prompts[n][begin : begin + 7]) for n in reading])
        assert most_likely == logits.argmax(dim=-1).tolist()
        in_company.update(zip(reading, logits, strict=True))
    assert [cache.length for cache in caches] == [50, 20, 33]
    tolerance = {"atol": 1e-4 if dtype == "float32" else 0.1, "rtol": 0}
    torch.testing.assert_close(torch.stack([in_company[n] for n in range(3)]), torch.stack(alone), **tolerance)


def test_a_step_that_fails_leaves_every_kv_cache_as_long_as_before(torch: Any) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed
    from helpers.packed_attention import TransformersModel

    model = TransformersModel(random_model("Llama"))
    model.prepare()
    cache, prompt = KVCache(20), list(range(10))
    forward_packed(model, [(cache, prompt[:6])])
    hook = model.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward_packed(model, [(cache, prompt[6:])])
    hook.remove()
    assert cache.length == 6
    undisturbed = KVCache(20)
    forward_packed(model, [(undisturbed, prompt[:6])])
    logits = [forward_packed(model, [(read, prompt[6:])])[0] for read in (cache, undisturbed)]
    assert torch.equal(*logits)


def test_the_trial_says_how_much_memory_a_token_takes(torch: Any) -> None:
    from helpers.packed_attention import TransformersModel

    trial = TransformersModel(random_model("Llama")).prepare()
    layers, heads, size, keys_and_values, bytes_per_number = 2, 2, 8, 2, 4
    assert trial.bytes_per_token == {torch.device("cpu"): layers * heads * size * keys_and_values * bytes_per_number}


def test_preparing_twice_changes_nothing(torch: Any) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed
    from helpers.packed_attention import TransformersModel

    model, logits = random_model("Llama"), []
    for _ in range(2):
        packed = TransformersModel(model)
        packed.prepare()
        logits.append(forward_packed(packed, [(KVCache(3), [1, 2, 3])])[0])
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("Mamba", {"num_key_value_heads": None}, "no position_ids"),
        (
            "FalconH1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
            "keep two prompts apart",
        ),
    ],
)
def test_a_model_that_mixes_its_prompts_is_refused(torch: Any, kind: str, options: dict[str, Any], reason: str) -> None:
    from helpers.packed_attention import TransformersModel

    with pytest.raises(ModelUnavailable, match=rf"{kind}ForCausalLM cannot be served here .*{reason}.*another kind"):
        TransformersModel(random_model(kind, **options)).prepare()


@pytest.mark.parametrize("factor", [float("nan"), 1e38], ids=["nan", "infinite"])
def test_a_model_that_computes_nan_or_infinity_is_refused(torch: Any, factor: float) -> None:
    from helpers.packed_attention import TransformersModel

    model = random_model("Llama")
    model.model.norm.weight.data *= factor
    with pytest.raises(
        ModelUnavailable,
        match=r"^LlamaForCausalLM computes logits that are NaN or infinite, in torch\.float32\. Serve it with",
    ):
        TransformersModel(model).prepare()


def test_a_model_may_exclude_tokens_from_generation(torch: Any) -> None:
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed
    from helpers.packed_attention import TransformersModel

    model, wanted = random_model("Llama"), 7
    bias = torch.full((200,), -torch.inf).index_fill(0, torch.tensor(wanted), 0)
    model.lm_head.bias = torch.nn.Parameter(bias)
    packed = TransformersModel(model)
    packed.prepare()
    assert forward_packed(packed, [(KVCache(3), [1, 2, 3])])[1] == [wanted]


def test_a_context_whose_positions_would_change_is_not_used(tiny_folder: Path, tmp_path: Path) -> None:
    """Beyond its original context, Phi 3 rotates all keys in another way, so those in the KV cache would be wrong."""
    from helpers import models

    folder = tmp_path / "phi3"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    factors = [1.0] * 4
    random_model(
        "Phi3",
        rope_scaling={"rope_type": "longrope", "short_factor": factors, "long_factor": factors},
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        pad_token_id=0,
    ).save_pretrained(folder)
    assert models.load(str(folder), "fp32").context_length == 512
