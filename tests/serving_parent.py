"""A program that starts a service, prints where it is, and waits.

python serving_parent.py serve|serve_script MODEL_OR_SCRIPT PORT
"""

import signal
import sys

from helpers.service import serve, serve_script

kind, target, port = sys.argv[1:]
is_script = kind == "serve_script"
service = serve_script(target, "--port", port, port=int(port)) if is_script else serve(target, port=int(port))
print("PORT", service.port, service.log, flush=True)
signal.pause()
