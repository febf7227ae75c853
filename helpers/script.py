"""Run a user's script that deploys a service, such as the article's, and end with the program that started it.

`helpers.service.serve_script` calls `main` in a process of its own, with these arguments:

    --port PORT --parent PID --log FILE SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import psutil

from ._jina import prepare_service  # imports jina without its warnings, before the script does
from .options import HOST
from .processes import (
    call_when_parent_ends,
    end_forks_with_this_process,
    is_listening,
    kill,
    raise_file_limit,
    remove_log,
)
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
    end_forks_with_this_process()
    prepare_service()
    raise_file_limit()
    threading.Thread(target=announce_when_ready, name="announce", daemon=True).start()
    sys.argv = options.command
    run_as_python_does(sys.argv[0])


def run_as_python_does(script: str) -> None:
    """Run a script as ``python SCRIPT`` does: modules in its folder come first, even one named ``helpers``."""
    main = ModuleType("__main__")
    main.__file__ = os.path.abspath(script)
    own = [name for name in sys.modules if name.partition(".")[0] == __name__.partition(".")[0]]
    hidden = [sys.modules.pop(name) for name in own]
    sys.modules["__main__"] = main
    sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
    with io.open_code(main.__file__) as file:
        code = compile(file.read(), main.__file__, "exec", dont_inherit=True)
    exec(code, main.__dict__)
    del hidden  # kept alive until here, because threads run functions of these modules
