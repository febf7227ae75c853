"""One run of the model for many sequences: models of several kinds, and those that must be refused."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.errors import ModelUnavailable

SIZE = dict(
    vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.5,  # wide, so that each layer has its say
)


def tiny(kind: str, **options: Any) -> Any:
    """A model of this kind that knows nothing."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 16}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 16}),  # also softcap, which no kernel does
        ("Phi3", {"pad_token_id": 0}),
        ("GPTNeoX", {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_sequence_gets_what_it_gets_alone(torch: Any, kind: str, options: dict[str, Any], dtype: str) -> None:
    """In pieces, beside others, and beyond the width of a sliding window."""
    from helpers.kv_cache import KeyValues, prepare, run

    model = tiny(kind, **options).to(getattr(torch, dtype))
    texts = [torch.randint(0, 200, (n,)).tolist() for n in (50, 20, 33)]
    with torch.inference_mode():
        alone = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
    prepare(model)
    pasts = [KeyValues(50) for _ in texts]
    for begin in range(0, 50, 7):
        feeds = [(past, text[begin : begin + 7]) for past, text in zip(pasts, texts) if begin < len(text)]
        for (past, _), logits in zip(feeds, run(model, feeds)[0]):
            text = texts[pasts.index(past)]
            if past.length == len(text):
                torch.testing.assert_close(logits, alone[texts.index(text)], atol=1e-4 if dtype == "float32" else 0.1, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("Mamba", {"num_key_value_heads": None}, "no positions"),
        ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, "keep two texts apart"),
    ],
)
def test_a_model_that_mixes_its_readers_is_refused(torch: Any, kind: str, options: dict[str, Any], reason: str) -> None:
    from helpers.kv_cache import prepare

    with pytest.raises(ModelUnavailable, match=rf"{kind}ForCausalLM cannot be served here .*{reason}.*another kind"):
        prepare(tiny(kind, **options))


def test_common_beginning(torch: Any) -> None:
    from helpers.kv_cache import common_beginning

    for some, others, same in (
        ([], [], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3, 9], [1, 2, 3, 4], 3),
        ([9, 2, 3], [1, 2, 3], 0),
        ([1, 9, 3, 4, 5], [1, 2, 3, 4, 5], 1),
    ):
        assert common_beginning(some, others) == common_beginning(others, some) == same


def test_a_window_that_would_change_all_positions_is_not_used(torch: Any) -> None:
    from transformers import Phi3Config

    from helpers.models import _context_length

    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    config = Phi3Config(
        **SIZE, rope_scaling=rope, max_position_embeddings=4096, original_max_position_embeddings=512, pad_token_id=0
    )
    assert _context_length(config) == 512
    assert _context_length(Phi3Config(**SIZE, max_position_embeddings=4096, pad_token_id=0)) == 4096
