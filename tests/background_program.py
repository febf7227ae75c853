"""Run a Python program in the background of a test, and wait for what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from eventually import until


class Program:
    """A program in a process of its own: `process`, and `log`, the file that holds what it has printed."""

    def __init__(self, *command: str, log: Path, **options: Any) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                **{"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, **options},
            )

    def wait_for(self, text: str) -> str:
        """Return the first line that contains `text`. Raise `AssertionError` if the program ends without one."""
        lines: list[str] = []

        def has_printed_or_ended() -> bool:
            has_ended = self.process.poll() is not None
            lines[:] = [line for line in self.log.read_text().splitlines() if text in line]
            return bool(lines) or has_ended

        until(has_printed_or_ended, f"{text!r} in the output of the program")
        assert lines, f"{text!r} was never printed:\n{self.log.read_text()}"
        return lines[0]

    def family(self) -> list[psutil.Process]:
        """Return the process and all that it has started."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def kill(self) -> None:
        """Kill the process and all that it has started, if they still run."""
        if self.process.poll() is None:
            for process in reversed(self.family()):
                process.kill()
            self.process.wait()
