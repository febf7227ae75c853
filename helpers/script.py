"""Run a user's script that deploys a service, such as the article's, and end with the program that started it.

`helpers.service.serve_script` starts a script in this way:

    python -m helpers.script --port PORT --parent PID --log FILE SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from . import _jina  # noqa: F401  imports jina without its warnings, before the script does
from .options import HOST
from .processes import call_when_parent_ends, is_listening, kill, remove_log
from .service import announce
from .transport import is_ready


def main() -> None:
    """Run the script as ``__main__``, and print the ready line when the service on the port is ready."""
    parser = argparse.ArgumentParser(allow_abbrev=False)  # the script's arguments may begin like these
    parser.add_argument("--port", type=int)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--log", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    options = parser.parse_args()

    def end(*_: object) -> None:
        kill(psutil.Process().children(recursive=True))  # Jina leaves its own processes behind
        os._exit(1)

    def end_without_parent() -> None:
        remove_log(options.log)
        end()

    def announce_when_ready() -> None:
        # gRPC must not run in this process while Jina forks, so ask only when the forked gateway listens
        while not (is_listening(HOST, options.port) and is_ready(host=HOST, port=options.port)):
            time.sleep(0.05)
        announce(HOST, options.port)

    signal.signal(signal.SIGTERM, end)
    call_when_parent_ends(options.parent, end_without_parent)
    threading.Thread(target=announce_when_ready, name="announce", daemon=True).start()
    sys.argv = options.command
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
