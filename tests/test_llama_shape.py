"""The benchmark on a model of Llama-2-7B's shape: its steps on a tiny shape, and the process that runs them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from eventually import until

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("llama_shape")


@pytest.fixture
def steps(benchmark_module: Any) -> Any:
    return importlib.import_module("llama_shape_steps")


@pytest.fixture(scope="module")
def folder(torch: Any, llama2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a tiny shape, as the benchmark builds it."""
    folder = tmp_path_factory.mktemp("shape") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        assert list(importlib.import_module("llama_shape_steps").build(str(folder), SHAPE)) == []
    return folder


@pytest.fixture(autouse=True)
def switch_interval() -> Iterator[None]:
    """Undo what a step sets, because the tests run it in their own process."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_the_default_shape_is_that_of_llama_2_7b(benchmark_module: Any) -> None:
    options = benchmark_module.parse([])
    assert (options.hidden_size, options.intermediate_size, options.layers, options.heads) == (4096, 11008, 32, 32)


@pytest.mark.parametrize("option", ["--tokens=1", "--rounds=0", "--sequences=0"])
def test_a_size_that_measures_nothing_is_refused(benchmark_module: Any, option: str) -> None:
    with pytest.raises(SystemExit):
        benchmark_module.parse([option])


def test_the_model_is_complete_and_ends_no_answer_early(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE
    assert (config.eos_token_id, config.vocab_size) == (None, 32_000)
    assert len(AutoTokenizer.from_pretrained(folder)) == 32_000
    assert not folder.with_name("model.unfinished").exists()


def test_the_planted_dimensions_are_outliers_and_no_others(steps: Any, folder: Path) -> None:
    import torch

    model = steps.load(str(folder), "fp32")
    inputs: list[Any] = []
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.up_proj):
            linear.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
    with torch.inference_mode():
        model(torch.tensor([steps.random_prompt(60, seed=0)]))
    assert len(inputs) == 4
    for rows in inputs:
        (large,) = (rows.abs().amax(dim=0) > 6).nonzero(as_tuple=True)
        assert large.tolist() == list(range(steps.OUTLIERS))


@pytest.mark.parametrize("threshold", ["6.0", "0.0"])
def test_int8_is_loaded_with_its_threshold(steps: Any, folder: Path, threshold: str) -> None:
    pytest.importorskip("bitsandbytes")
    linear = steps.load(str(folder), f"int8-{threshold}").model.layers[0].self_attn.q_proj
    assert type(linear).__name__ == "Linear8bitLt" and linear.state.threshold == float(threshold)


@pytest.mark.long
def test_every_backend_answers_every_number_of_sequences_in_full(steps: Any, folder: Path) -> None:
    machine, *cells = steps.measure(str(folder), "fp32", steps.Scale([1, 3], 10, 5, 2))
    assert "torch" in machine["machine"]
    assert [(cell["backend"], cell["sequences"]) for cell in cells] == [
        ("generate", 1),
        ("generate", 3),
        ("this engine", 1),
        ("this engine", 3),
    ]
    for cell in cells:
        assert [[len(times) for times in run] for run in cell["runs"]] == [[5] * cell["sequences"]] * 2
        assert all(times[0] > 0 and times == sorted(times) for run in cell["runs"] for times in run)
        assert cell["memory"] > 0


def test_the_sequences_of_the_engine_decode_together(steps: Any, folder: Path) -> None:
    """The limit of its KV cache is exactly that of all sequences, so none may wait for another."""
    scale = steps.Scale([4], 10, 30, 1)
    engine = steps._engine_for(steps.load(str(folder), "fp32"), 4, scale)
    steps.engine_arrivals(engine, [steps.random_prompt(10, seed=n) for n in range(4)], 30)
    engine.close()
    assert engine.cache_capacity == 4 * 40
    assert engine.steps <= 30 + 4  # each joins within a step of the others


@pytest.mark.long
def test_a_number_of_sequences_that_fails_is_reported_and_the_next_is_measured(
    steps: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(model: Any, prompts: Any, tokens: int) -> Any:
        if len(prompts) == 2:
            raise MemoryError("too many")
        return [[1.0] * tokens for _ in prompts]

    monkeypatch.setattr(steps, "generate_arrivals", generate)
    records = list(steps.measure(str(folder), "fp32", steps.Scale([1, 2, 3], 10, 2, 1)))
    assert {"failure": "fp32, generate, 2 sequences: MemoryError: too many"} in records
    assert [record["sequences"] for record in records if "runs" in record] == [1, 3, 1, 2, 3]


def test_the_engine_agrees_with_generate(steps: Any, folder: Path) -> None:
    records = list(steps.check(str(folder), 2))
    assert [record["check"].split(",")[0] for record in records] == ["fp32", "fp16"]
    assert all(record["passed"] for record in records), records


def test_the_check_notices_a_token_that_is_only_seen_through_the_attention(
    steps: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy_answer = steps.greedy_answer
    monkeypatch.setattr(steps, "greedy_answer", lambda model, prompt: greedy_answer(model, [1, 99, *prompt[2:]]))
    assert not any(record["passed"] for record in steps.check(str(folder), 2))


class FakeVllm:
    """vLLM's interface as the step uses it. Each request gets a token in each step, and two in the first."""

    __version__ = "0.0"

    def __init__(self) -> None:
        self.LLMEngine = SimpleNamespace(from_engine_args=self._start)
        self.requests: dict[str, tuple[Any, Any, list[int]]] = {}

    def EngineArgs(self, **options: Any) -> dict[str, Any]:
        self.options = options
        return options

    def SamplingParams(self, **options: Any) -> SimpleNamespace:
        assert options["ignore_eos"] and options["temperature"] == 0
        return SimpleNamespace(**options)

    def _start(self, options: dict[str, Any]) -> Any:
        return self

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        assert name not in self.requests and len(prompt["prompt_token_ids"]) == 10
        self.requests[name] = prompt, params, [7]

    def has_unfinished_requests(self) -> bool:
        return any(len(ids) < params.max_tokens for _, params, ids in self.requests.values())

    def step(self) -> list[Any]:
        unfinished = {name: ids for name, (_, params, ids) in self.requests.items() if len(ids) < params.max_tokens}
        for ids in unfinished.values():
            ids.append(7)
        return [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=ids)])
            for name, ids in unfinished.items()
        ]


def test_vllm_is_asked_for_the_same_work(steps: Any, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    note, *cells = steps.measure_vllm("a/folder", "fp16", steps.Scale([1, 3], 10, 5, 2))
    assert "vLLM 0.0" in note["note"]
    assert (vllm.options["dtype"], vllm.options["max_model_len"], vllm.options["max_num_seqs"]) == ("float16", 15, 3)
    assert [(cell["backend"], cell["sequences"]) for cell in cells] == [("vLLM", 1), ("vLLM", 3)]
    assert all(list(map(len, run)) == [5] * cell["sequences"] for cell in cells for run in cell["runs"])


def cell(backend: str, gap: float, *, precision: str = "fp16", sequences: int = 8) -> dict[str, Any]:
    """Return the record of two runs: ten tokens of each sequence, one every `gap` seconds."""
    runs = [[[gap * (k + 1) for k in range(10)]] * sequences] * 2
    return {"precision": precision, "backend": backend, "sequences": sequences, "runs": runs, "memory": 13_500_000_000}


@pytest.fixture
def start(benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a benchmark whose steps are this Python code, with `report`, an open file."""

    def start(code: str, *, seconds: float = 600) -> Any:
        program = tmp_path / "steps.py"
        program.write_text(f"import sys\nreport = open(sys.argv[2], 'w')\n{code}", encoding="utf-8")
        monkeypatch.setattr(benchmark_module, "STEPS", program)
        deadline = time.monotonic() + seconds
        return benchmark_module.Benchmark(tmp_path / "new/results", deadline=deadline, settings="The settings.")

    return start


def reporting(*records: dict[str, Any]) -> str:
    return "".join(f"print({json.dumps(record)!r}, file=report, flush=True)\n" for record in records)


@pytest.mark.main
def test_the_results_are_a_table_the_checks_and_ratios(start: Any) -> None:
    records: list[dict[str, Any]] = [
        {"machine": "A machine."},
        {"check": "close", "passed": True},
        cell("generate", 0.5, precision="nf4"),
        cell("generate", 0.5),
        cell("this engine", 0.25),
        {"note": "A note."},
    ]
    benchmark = start(reporting(*records))
    benchmark.run("all", "anything")
    assert benchmark.passed
    text = benchmark.results.read_text(encoding="utf-8")
    assert text == benchmark.text()
    assert "A machine." in text and "The settings." in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "precision" not in line]
    assert rows == [
        "| fp16 | 8 | generate | 16.0 | 500.0 | 500.0 | 13.50 |",
        "| fp16 | 8 | this engine | 32.0 | 250.0 | 250.0 | 13.50 |",
        "| nf4 | 8 | generate | 16.0 | 500.0 | 500.0 | 13.50 |",
    ]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- passed: close",
        "- fp16, 8 sequence(s), tokens/s: this engine ÷ generate = 2.00",
        "- A note.",
    ]


@pytest.mark.main
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (reporting({"check": "far apart", "passed": False}), "- FAILED: far apart"),
        (reporting({"failure": "no memory"}), "- FAILED: no memory"),
        ("raise ImportError('bitsandbytes is missing')", "ImportError: bitsandbytes is missing"),
    ],
)
def test_what_failed_is_in_the_results(start: Any, code: str, sentence: str) -> None:
    benchmark = start(code)
    benchmark.run("int8-6.0", "measure")
    assert not benchmark.passed
    assert sentence in benchmark.results.read_text(encoding="utf-8")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.main
def test_a_step_that_takes_too_long_is_killed_and_its_results_are_kept(
    start: Any, benchmark_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children = tmp_path / "children"
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"{reporting(cell('generate', 0.5))}"
        "print('{half a li', end='', file=report, flush=True)\n"
        f"open({str(children)!r}, 'w').write(f'{{child.pid}}.')\n"
        "time.sleep(1000)"
    )

    class Popen(subprocess.Popen):
        """A process whose time is up as soon as it has reported."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            until(lambda: children.exists() and children.read_text().endswith("."), "the step reports")
            raise subprocess.TimeoutExpired(self.args, timeout)

    benchmark = start(code)
    monkeypatch.setattr(benchmark_module.subprocess, "Popen", Popen)
    benchmark.run("nf4", "measure")
    assert [kept.backend for kept in benchmark.cells] == ["generate"]
    assert benchmark.notes == ["nf4: stopped, because the time budget is spent."]
    assert benchmark.passed
    child = int(children.read_text()[:-1])
    until(lambda: not is_running(child), "the step's own child ends")


@pytest.mark.main
def test_a_step_without_any_time_left_does_not_start(start: Any) -> None:
    benchmark = start("raise SystemExit(3)", seconds=0)
    benchmark.run("bf16", "measure")
    assert benchmark.notes == ["bf16: left out, because the time budget is spent."]
    assert benchmark.passed and benchmark.results.exists()


def test_a_folder_is_used_again_only_for_its_own_shape(benchmark_module: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert not benchmark_module.is_built(folder, SHAPE)
    folder.mkdir()
    with pytest.raises(SystemExit, match="not a model of this shape"):
        benchmark_module.is_built(folder, SHAPE)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 32_000}), encoding="utf-8")
    assert benchmark_module.is_built(folder, SHAPE)
    with pytest.raises(SystemExit, match="another --folder"):
        benchmark_module.is_built(folder, {**SHAPE, "hidden_size": 4096})


@pytest.mark.long
def test_a_tiny_shape_is_measured_at_every_precision(torch: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip('bitsandbytes is not installed. Install it: pip install -c constraints.txt -e ".[model]"')
    precisions = ["fp32", "fp16", "bf16", "int8-6.0", "int8-0.0", "nf4"]
    command = [sys.executable, str(BENCHMARKS / "llama_shape.py"), "--output", str(tmp_path), "--precisions"]
    command += [*precisions, "--sequences", "1", "8", "32", "--tokens", "6", "--prompt-tokens", "12"]
    command += ["--hidden-size", "64", "--intermediate-size", "128", "--layers", "2", "--heads", "4"]
    command += ["--time-budget", "1500"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr + (tmp_path / "llama_shape.log").read_text()
    written = (tmp_path / "llama_shape.md").read_text(encoding="utf-8")
    assert result.stdout.endswith(written)
    for precision in precisions:
        for sequences in (1, 8, 32):
            for backend in ("generate", "this engine"):
                assert f"| {precision} | {sequences} | {backend} |" in written
            assert f"- {precision}, {sequences} sequence(s), tokens/s: this engine ÷ generate = " in written
    assert written.count("- passed: ") == 2
    if importlib.util.find_spec("vllm") is None:
        assert "vLLM was left out" in written
