"""Measure the engine on a model of Llama-2-7B's shape with random weights, beside `generate` and vLLM.

    python benchmarks/llama_shape.py --output FOLDER        on a GPU: at most nine minutes
    python benchmarks/llama_shape.py --output FOLDER --hidden-size 64 --intermediate-size 128 --layers 2 --heads 4

Random weights need no licence, and a token takes as long with them as with trained ones. First, the engine's answers
and logits are compared with those of `generate`. Then each backend answers 1, 8 and 32 prompts at once, at each
precision.

Prints a table, and writes it to ``llama_shape.md``, beside ``llama_shape.log``, in `--output`. Each step runs in a
process of its own, which is killed when `--time-budget` is spent; what was measured until then is in the table. Exits
with 1 if a step failed or a check did not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from llama_shape_steps import DTYPES, ENGINE, PRECISIONS, VOCABULARY, Record, Scale
from measurements import Run

STEPS = Path(__file__).with_name("llama_shape_steps.py")
DEFAULT_PRECISIONS = ["fp16", "int8-6.0", "int8-0.0", "nf4", "bf16"]


@dataclass(frozen=True)
class Cell:
    """The runs of one backend at one precision and number of sequences. `memory` is in bytes."""

    precision: str
    backend: str
    sequences: int
    runs: list[Run]
    memory: int

    @property
    def rate(self) -> float:
        """Return tokens/s of all sequences together: the median of the runs."""
        return median(run.rate for run in self.runs)

    @property
    def first_token(self) -> float:
        """Return the median TTFT, in seconds."""
        return median(first for run in self.runs for first in run.first_tokens)

    @property
    def gap(self) -> float:
        """Return the median ITL, in seconds."""
        return median(gap for run in self.runs for gap in run.gaps)


class Benchmark:
    """Runs steps one after the other, and writes what they report into the folder `output`.

    `deadline` is in seconds of `time.monotonic`. `settings` is a sentence for the results: what is measured.
    """

    def __init__(self, output: Path, *, deadline: float, settings: str) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.results, self.log = output / "llama_shape.md", output / "llama_shape.log"
        self.log.write_bytes(b"")
        self.deadline, self.settings = deadline, settings
        self.machine = "The machine is unknown: no measurement began."
        self.cells: list[Cell] = []
        self.checks: list[str] = []
        self.notes: list[str] = []
        self.passed = True
        """Whether no step has failed and every check has passed."""

    def run(self, title: str, step: str, *, python: str = sys.executable, **arguments: Any) -> None:
        """Run a step in a new process until the deadline at the latest, and write the results so far."""
        began = time.monotonic()
        if began >= self.deadline:
            self.add_note(f"{title}: left out, because the time budget is spent.")
            return
        print(f"{title} …", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report"
            report.touch()
            command = [python, str(STEPS), json.dumps([step, arguments]), str(report)]
            code = self._wait_for(command)
            for line in report.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else the step was killed while it wrote the line
                    self._keep(json.loads(line))
        if code is None:
            self.notes.append(f"{title}: stopped, because the time budget is spent.")
        elif code != 0:
            self.passed = False
            self.notes.append(f"FAILED: {title}, with code {code}: … {self._end_of_log()}")
        self.results.write_text(self.text(), encoding="utf-8")
        print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)

    def _wait_for(self, command: list[str]) -> int | None:
        """Return the exit status of `command`, or None if it was killed at the deadline, with all that it started."""
        with open(self.log, "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()

    def _keep(self, record: Record) -> None:
        if "machine" in record:
            self.machine = record["machine"]
        elif "note" in record:
            self.notes.append(record["note"])
        elif "failure" in record:
            self.notes.append(f"FAILED: {record['failure']}")
            self.passed = False
        elif "check" in record:
            self.checks.append(f"{'passed' if record['passed'] else 'FAILED'}: {record['check']}")
            self.passed &= record["passed"]
        else:
            self.cells.append(Cell(**{**record, "runs": list(map(Run, record["runs"]))}))

    def _end_of_log(self) -> str:
        return " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())[-300:]

    def add_note(self, note: str) -> None:
        """Add a sentence to the results, and write them."""
        self.notes.append(note)
        self.results.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the results as Markdown."""
        lists = [f"- {line}" for line in [*self.checks, *ratios(self.cells), *self.notes]]
        parts = ["# What `llama_shape.py` measured", self.machine, self.settings, table(self.cells), "\n".join(lists)]
        return "\n\n".join(parts) + "\n"


def table(cells: Sequence[Cell]) -> str:
    """Return a Markdown table, a row for each cell: by precision, then by sequences."""
    lines = [
        "| precision | sequences | | tokens/s | TTFT, ms | ITL, ms | memory, GB |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for cell in sorted(cells, key=lambda cell: (PRECISIONS.index(cell.precision), cell.sequences)):
        lines.append(
            f"| {cell.precision} | {cell.sequences} | {cell.backend} | {cell.rate:.1f} "
            f"| {1000 * cell.first_token:.1f} | {1000 * cell.gap:.1f} | {cell.memory / 1e9:.2f} |"
        )
    return "\n".join(lines)


def ratios(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for each comparison of the engine with another backend at its precision and number of sequences."""
    ours = {(cell.precision, cell.sequences): cell for cell in cells if cell.backend == ENGINE}
    for cell in cells:
        our = ours.get((cell.precision, cell.sequences))
        if our is not None and our is not cell:
            ratio = our.rate / cell.rate
            yield f"{cell.precision}, {cell.sequences} sequence(s), tokens/s: {ENGINE} ÷ {cell.backend} = {ratio:.2f}"


def is_built(folder: Path, shape: dict[str, int]) -> bool:
    """Return whether `folder` holds the model. Raise `SystemExit` if it exists and holds anything else."""
    if not folder.exists():
        return False
    config = folder / "config.json"
    built = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if {name: built.get(name) for name in shape} != shape:
        raise SystemExit(f"{folder} is not a model of this shape. Choose another --folder, or delete this one.")
    return True


def has_vllm(python: str) -> bool:
    """Return whether vLLM is installed for this Python."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", find]).returncode == 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path(), help="the folder for the results (default: the current one)")
    add("--folder", type=Path, help="where to keep the model for the next run (default: a temporary folder)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=DEFAULT_PRECISIONS, help="measured in this order")
    add("--sequences", nargs="+", type=int, default=[1, 8, 32], help="answered at once (default: 1 8 32)")
    add("--prompt-tokens", type=int, default=128, help="(default: 128)")
    add("--tokens", type=int, default=64, help="new tokens of each sequence, at least 2 (default: 64)")
    add("--rounds", type=int, default=2, help="measurements of each number of sequences (default: 2)")
    add("--check-layers", type=int, default=4, help="layers of the model that is compared (default: 4)")
    add("--time-budget", type=float, default=540, help="seconds after which no step goes on (default: 540)")
    add("--vllm-python", default=sys.executable, help="a Python that has vLLM (default: this one)")
    shape = parser.add_argument_group("shape", "The defaults are those of Llama-2-7b-chat-hf.")
    shape.add_argument("--hidden-size", type=int, default=4096)
    shape.add_argument("--intermediate-size", type=int, default=11008)
    shape.add_argument("--layers", type=int, default=32)
    shape.add_argument("--heads", type=int, default=32)
    shape.add_argument("--kv-heads", type=int, help="(default: as many as --heads)")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or min(options.prompt_tokens, options.rounds, *options.sequences) < 1:
        parser.error("--tokens must be at least 2; --prompt-tokens, --rounds and --sequences must be at least 1.")
    return options


def main(options: argparse.Namespace) -> int:
    """Run all steps, and print the results. Return 1 if a step failed or a check did not pass, else 0."""
    deadline = time.monotonic() + options.time_budget
    shape = {
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads or options.heads,
    }
    scale = Scale(options.sequences, options.prompt_tokens, options.tokens, options.rounds)
    settings = (
        f"Llama with random weights, a vocabulary of {VOCABULARY}, and "
        f"{', '.join(f'{name} {size}' for name, size in shape.items())}: {scale.tokens} new tokens for each sequence "
        f"after a prompt of {scale.prompt_tokens}, medians of {scale.rounds} rounds. tokens/s counts all sequences "
        "together, from the prompts to the last token. TTFT: time to the first token. ITL: time between two tokens. "
        "Memory: the most that torch allocated on the GPU; without a GPU, the memory of the process."
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "model"
        build_needed = not is_built(folder, shape)
        benchmark = Benchmark(options.output, deadline=deadline, settings=settings)
        if build_needed:
            benchmark.run("building the model", "build", folder=str(folder), shape=shape)
        if folder.exists():
            layers = min(options.check_layers, options.layers)
            benchmark.run("comparing with generate", "check", folder=str(folder), layers=layers)
            work: dict[str, Any] = {"folder": str(folder), "scale": scale}
            for precision in options.precisions:
                benchmark.run(precision, "measure", precision=precision, **work)
            if has_vllm(options.vllm_python):
                for precision in filter(DTYPES.get, options.precisions):
                    run = f"{precision}, vLLM"
                    benchmark.run(run, "measure_vllm", python=options.vllm_python, precision=precision, **work)
            else:
                benchmark.add_note(f"vLLM was left out: it is not installed for {options.vllm_python}.")
    print("\n" + benchmark.text(), end="")
    return 0 if benchmark.passed else 1


if __name__ == "__main__":
    sys.exit(main(parse()))
