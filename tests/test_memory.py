"""`helpers.memory`: the estimate of what a model needs."""

from __future__ import annotations

import pytest

from fake_machine import GB
from helpers.catalog import KNOWN_PARAMETERS, LLAMA2
from helpers.errors import InvalidRequest
from helpers.memory import PRECISIONS, fits, format_gb, memory_needed, require_precision

SIZE = KNOWN_PARAMETERS[LLAMA2]


def test_memory_is_the_weights_one_full_context_and_half_a_gb() -> None:
    kv_cache = 4096 * 2 * 32 * 4096 * 2  # tokens, keys and values, layers, width, bytes
    assert memory_needed(SIZE, "bf16") == pytest.approx(SIZE * 2 + kv_cache + 0.5e9, rel=0.01)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_int8_on_a_cpu_the_kv_cache_is_in_32_bit(device: str) -> None:
    kv_cache = 4096 * 2 * 32 * 4096 * (4 if device == "cpu" else 2)
    weights = SIZE * PRECISIONS["int8"]
    assert memory_needed(SIZE, "int8", device) == pytest.approx(weights + kv_cache + 0.5e9, rel=0.01)
    assert memory_needed(SIZE, "fp32", device) == memory_needed(SIZE, "fp32")
    assert fits(SIZE, "int8", device, free=16 * GB)


def test_the_precisions_are_listed_from_the_largest_to_the_smallest() -> None:
    sizes = [memory_needed(SIZE, precision) for precision in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)


def test_the_articles_model_fits_a_t4_at_int8_only() -> None:
    assert fits(SIZE, "int8", free=15 * GB)
    assert not fits(SIZE, "bf16", free=15 * GB)


@pytest.mark.parametrize("check", [require_precision, lambda precision: memory_needed(1, precision)])
def test_an_unknown_precision_is_refused_with_the_known_ones(check: object) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^'fp16' is not a precision\. Choose one of: auto, fp32, bf16, int8, nf4"
    ):
        check("fp16")  # type: ignore[operator]


def test_sizes_are_shown_in_units_of_a_billion_bytes() -> None:
    assert format_gb(13_476_831_232) == "13.5 GB"
