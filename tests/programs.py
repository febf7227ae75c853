"""Programs that run beside a test."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Script:
    """A program of ours in a process of its own, and what it has printed."""

    def __init__(self, *command: str, log: Path, **options: Any) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                **{"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, **options},
            )

    def wait_for(self, text: str, seconds: float = 180) -> str:
        """The first line that holds `text`, once it is there."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            for line in self.log.read_text().splitlines():
                if text in line:
                    return line
            if ended:
                break
            time.sleep(0.05)
        raise AssertionError(f"{text!r} was never printed:\n{self.log.read_text()}")
