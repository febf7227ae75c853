"""`benchmarks/load.py`: its arithmetic on a simulated service, its requests, and the service without a model."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import client
from helpers.simulation import Arrival, simulate
from helpers.sizing import StepTimes
from test_benchmarks import run_program

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("gguf", reason="the benchmarks need what the service needs")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("load")
    monkeypatch.setattr(module, "PAUSE", 0)
    return module


class Simulated:
    """`count` services that take the steps of `step_times`. A prompt has as many tokens as words."""

    row = "simulated"

    def __init__(self, count: int, step_times: StepTimes) -> None:
        self.count, self._step_times = count, step_times

    def prompt_tokens(self, dialog: Any) -> int:
        return sum(len(message["content"].split()) for message in dialog)

    def answer(self, dialogs: Sequence[Any], max_tokens: int) -> list[list[float]]:
        asked = [
            Arrival(seconds=0, prompt_tokens=self.prompt_tokens(dialog), completion_tokens=max_tokens)
            for dialog in dialogs
        ]
        seen = simulate(asked, replicas=self.count, step_times=self._step_times, overhead=0.004)
        # the first tokens come between the prompts of the others, and the rest one in each step for all
        step = self._step_times.seconds(len(dialogs) // self.count)
        return [[one.ttft, *(one.total - step * k for k in range(max_tokens - 2, -1, -1))] for one in seen]


def test_the_measured_step_times_are_those_of_the_service(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = StepTimes(decode={1: 0.02, 2: 0.03, 4: 0.04, 8: 0.06, 16: 0.1, 32: 0.2}, prompt_token=0.001)
    together = StepTimes(decode={n: 1.5 * seconds for n, seconds in alone.decode.items()}, prompt_token=0.002)

    def run(server: Simulated, arrivals: list[Arrival]) -> tuple[list[Arrival], list[float]]:
        seen = simulate(arrivals, replicas=server.count, step_times=alone, together=together, overhead=0.007)
        return arrivals, [one.ttft for one in seen]

    monkeypatch.setattr(load, "run", run)
    measured = load.measure(Simulated(1, alone), Simulated(2, together), rounds=1)
    for found, true in ((measured.alone, alone), (measured.together, together)):
        assert found.decode == pytest.approx(true.decode)
        assert found.prompt_token == pytest.approx(true.prompt_token)
    assert measured.overhead == pytest.approx(0.007)
    assert measured.prompt_tokens == 38
    titles, _, first, second = measured.table().splitlines()
    assert titles.endswith("| 32 decode | each prompt token |")
    assert first == "| one service | 20.0 | 30.0 | 40.0 | 60.0 | 100.0 | 200.0 | 1.00 |"
    assert second.endswith("| 300.0 | 2.00 |")


def test_requests_are_sent_when_they_arrive_and_their_tokens_are_counted(load: Any) -> None:
    asked: list[tuple[str, int]] = []

    class Server:
        def stream(self, dialog: Any, max_tokens: int) -> Iterator[None]:
            asked.append((dialog[0]["content"], max_tokens))
            yield from [None] * (max_tokens - 1)  # as if the model ended its answer early

    arrivals = [Arrival(seconds=0.01 * n, prompt_tokens=9, completion_tokens=n) for n in (2, 3, 4)]
    answered, ttfts = load.run(Server(), arrivals)
    assert [arrival.completion_tokens for arrival in answered] == [1, 2, 3]
    assert [arrival.seconds for arrival in answered] == [0.02, 0.03, 0.04]
    assert len(ttfts) == 3 and all(ttft >= 0 for ttft in ttfts)
    assert len(set(asked)) == 3 and sorted(max_tokens for _, max_tokens in asked) == [2, 3, 4]


@pytest.mark.main
def test_the_service_without_a_model_answers_as_a_service_does(load: Any) -> None:
    service = load.DummyService(load.Row("dummy", ""), (), project=load.PROJECT, model="")
    service.start()
    try:
        service.wait_until_ready()
        answer = client.stream("Hello", max_tokens=7, port=service.port)
        assert "".join(answer).split() == ["word"] * 7
        assert (answer.completion_tokens, answer.prompt_tokens, answer.finish_reason) == (7, 5, "length")
    finally:
        service.close()


@pytest.mark.long
def test_the_quick_load_test_writes_all_tables(tmp_path: Path) -> None:
    result = run_program("load.py", "--quick", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    written = (tmp_path / "load.md").read_text(encoding="utf-8")
    for line in (
        "| two services at once |",
        "| light |",
        "| near the knee |",
        "| 2 services with 1 thread each at int8 |",
        "- answers of 200 tokens:",
    ):
        assert line in written
