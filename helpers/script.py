"""Be a script that deploys a service, such as the article's, and end with the program that started this one.

    python -m helpers.script SCRIPT [ARGUMENT ...] --parent PID --log FILE

is how `helpers.service.serve_script` starts one.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import psutil

from . import _jina  # noqa: F401  before the script imports jina: quietly
from .processes import kill, remove_log, wait_for_end_of_parent


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("script")
    parser.add_argument("--parent", type=int)
    parser.add_argument("--log", type=Path)
    options, arguments = parser.parse_known_args()

    def end(*_: object) -> None:
        """Jina would leave its own processes behind."""
        kill(psutil.Process().children(recursive=True))
        os._exit(1)

    def end_with_parent() -> None:
        wait_for_end_of_parent(options.parent)
        remove_log(options.log)
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = [options.script, *arguments]
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
