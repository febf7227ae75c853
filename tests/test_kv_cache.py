"""KV caches, the prefix cache, and how much memory they may take."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import hardware

GB = 2**30


def cache_of(length: int, *, capacity: int | None = None, layers: int = 2) -> Any:
    """Return a KV cache whose entries are the numbers from 0 on, at 2 * 4 * 4 bytes a layer."""
    import torch

    from helpers.kv_cache import KVCache

    cache = KVCache(capacity or length)
    for layer in range(layers):
        cache.append(layer, torch.arange(2.0 * length * 4).reshape(1, 2, length, 4))
    cache.length = length
    return cache


def contents(cache: Any) -> list[Any]:
    """Return the keys and values of each layer, (heads, length, size)."""
    import torch

    nothing = torch.empty(1, 2, 0, 4)
    return [cache.append(layer, nothing)[0] for layer in range(cache.num_layers)]


# --- One sequence ---------------------------------------------------------------------------------


def test_appending_returns_all_and_keeps_what_was_there(torch: Any) -> None:
    cache = cache_of(3, capacity=10)
    new = torch.full((1, 2, 4, 4), 7.0)
    stored = cache.append(0, new)
    assert stored.shape == (1, 2, 7, 4)
    assert torch.equal(stored[:, :, :3], torch.arange(24.0).reshape(1, 2, 3, 4))
    assert torch.equal(stored[:, :, 3:], new)
    assert cache.length == 3  # until every layer has stored its own


def test_appending_never_moves_what_is_stored(torch: Any) -> None:
    cache = cache_of(3, capacity=10)
    assert contents(cache)[0].data_ptr() == cache.append(0, torch.zeros(1, 2, 4, 4)).data_ptr()


@pytest.mark.parametrize("capacity", [5, 50])
def test_a_moved_prefix_is_the_same_and_leaves_nothing_behind(torch: Any, capacity: int) -> None:
    cache = cache_of(8, capacity=20)
    expected = [layer[:, :5].clone() for layer in contents(cache)]
    moved = cache.move_prefix(5, capacity=capacity)
    assert (moved.capacity, moved.length, moved.num_layers) == (capacity, 5, 2)
    assert all(map(torch.equal, contents(moved), expected))
    assert sum(moved.bytes_per_token.values()) == 2 * 2 * 4 * 4
    assert (cache.length, cache.num_layers) == (0, 0)


def test_a_copied_prefix_is_independent_of_its_source(torch: Any) -> None:
    cache = cache_of(8)
    copy = cache.copy_prefix(5, capacity=12)
    assert (copy.length, copy.capacity, copy.num_layers) == (5, 12, 2)
    expected = [layer[:, :5].clone() for layer in contents(cache)]
    for layer in contents(cache):
        layer.zero_()
    assert all(map(torch.equal, contents(copy), expected))


# --- Many sequences -------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_prefix_is_found(start: list[int], some: list[int], others: list[int]) -> None:
    from helpers.kv_cache import common_prefix_length

    some, others = [*start, *some], [*start, *others]
    expected = next((n for n, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), None)
    if expected is None:
        expected = min(len(some), len(others))
    assert common_prefix_length(some, others) == common_prefix_length(others, some) == expected


def prefix_cache_of(*prompts: list[int]) -> Any:
    """Return a prefix cache with these prompts, in this order."""
    from helpers.kv_cache import PrefixCache

    prefix_cache = PrefixCache()
    for prompt in prompts:
        prefix_cache.add(prompt, cache_of(len(prompt)))
    return prefix_cache


def test_the_longest_prefix_is_found(torch: Any) -> None:
    prefix_cache = prefix_cache_of([1, 2, 9], [1, 2, 3, 4, 9, 9], [5, 6])
    match = prefix_cache.lookup([1, 2, 3, 4, 5])
    assert match.length == 4
    assert [ids for ids, cache in prefix_cache if cache is match.cache] == [[1, 2, 3, 4, 9, 9]]


def test_without_a_common_prefix_nothing_is_found(torch: Any) -> None:
    assert prefix_cache_of().lookup([1, 2]).length == 0
    assert prefix_cache_of([2, 1]).lookup([1, 2]).length == 0


def test_a_longer_cache_takes_the_place_of_its_prefix(torch: Any) -> None:
    prefix_cache = prefix_cache_of([1, 2], [5, 6], [1, 2, 3])
    assert [ids for ids, _ in prefix_cache] == [[5, 6], [1, 2, 3]]


def test_the_least_recently_used_is_evicted_first(torch: Any) -> None:
    prefix_cache = prefix_cache_of([1] * 30, [2] * 30, [3] * 30)
    prefix_cache.touch(prefix_cache.lookup([1]).cache)
    assert prefix_cache.evict(max_capacity=60)
    assert [ids[0] for ids, _ in prefix_cache] == [3, 1]
    assert not prefix_cache.evict(max_capacity=60)
    assert prefix_cache.evict(max_capacity=-5)
    assert prefix_cache.capacity == 0


def test_a_removed_cache_is_no_longer_found(torch: Any) -> None:
    prefix_cache = prefix_cache_of([1, 2], [5, 6])
    cache = prefix_cache.lookup([1, 2]).cache
    assert prefix_cache.remove(cache)
    assert cache not in prefix_cache
    assert not prefix_cache.remove(cache)
    assert [ids for ids, _ in prefix_cache] == [[5, 6]]


def test_the_number_of_entries_is_limited(torch: Any) -> None:
    from helpers.kv_cache import PrefixCache

    chance = random.Random(0)
    prompts = [[n, *chance.choices(range(1000), k=5)] for n in range(PrefixCache.MAX_ENTRIES + 44)]
    assert [ids for ids, _ in prefix_cache_of(*prompts)] == prompts[44:]


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "context_length", "expected"),
    [
        (100 * GB, 512, 2 * GB // 64),  # 2 GiB
        (100 * GB, 100 * 2**20, 100 * 2**20),  # a full context, which takes more
        (3 * GB, 512, 3 * GB // 2 // 64),  # half of what is free
    ],
)
def test_the_capacity_in_ram_leaves_memory_for_other_programs(
    torch: Any, monkeypatch: pytest.MonkeyPatch, free: int, context_length: int, expected: int
) -> None:
    from helpers.kv_cache import cache_capacity

    monkeypatch.setattr(hardware, "ram", lambda: (200 * GB, free))
    assert cache_capacity(cache_of(1), context_length=context_length) == expected
