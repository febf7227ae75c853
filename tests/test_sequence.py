"""The stream of one answer, as a client reads it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from helpers.errors import GenerationFailed
from helpers.sequence import Sequence, TokenStream


def read_async(stream: TokenStream) -> list[int]:
    async def read() -> list[int]:
        return [token_id async for token_id in stream]

    return asyncio.run(read())


@pytest.fixture(params=[list, read_async], ids=["for", "async for"])
def read(request: pytest.FixtureRequest) -> Any:
    """Read a stream in one of the two ways."""
    return request.param


def put_all(stream: TokenStream, ids: list[int]) -> None:
    for token_id in ids:
        stream.put(token_id)
    stream.end("length")


def test_what_came_before_the_client_reads_is_read(read: Any) -> None:
    stream = TokenStream()
    put_all(stream, [1, 2, 3])
    assert read(stream) == [1, 2, 3]
    assert stream.finish_reason == "length"


def test_what_comes_while_the_client_reads_is_read(read: Any) -> None:
    stream = TokenStream()
    engine = threading.Thread(target=put_all, args=(stream, list(range(5000))))
    engine.start()
    assert read(stream) == list(range(5000))
    engine.join()


def test_an_error_is_raised_after_the_tokens_before_it(read: Any) -> None:
    stream = TokenStream()
    stream.put(1)
    stream.end("error", GenerationFailed("The model failed."))
    received = []

    def receive() -> None:
        for token_id in stream:
            received.append(token_id)

    async def receive_async() -> None:
        async for token_id in stream:
            received.append(token_id)

    with pytest.raises(GenerationFailed, match="The model failed"):
        receive() if read is list else asyncio.run(receive_async())
    assert received == [1]
    assert stream.finish_reason == "error"


def test_the_first_end_counts() -> None:
    stream = TokenStream()
    stream.end("stop")
    stream.end("cancelled")
    assert (list(stream), stream.finish_reason) == ([], "stop")


def test_a_stream_whose_event_loop_is_gone_is_cancelled() -> None:
    stream = TokenStream()
    stream.put(1)

    async def read_one() -> None:
        async for _ in stream:
            return

    asyncio.run(read_one())
    assert not stream.cancelled
    stream.put(2)
    assert stream.cancelled


def test_a_sequence_counts_its_tokens() -> None:
    sequence = Sequence([5, 6, 7], max_tokens=10, sampler=None)
    sequence.ids.append(8)
    assert (sequence.max_total_tokens, sequence.completion_tokens) == (13, 1)
    assert sequence.unread_ids == [5, 6, 7, 8]
