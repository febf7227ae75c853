"""Cells of a notebook that show progress. Each waits until the test has made a file named "seen"."""

MEASURE = """
import time
from pathlib import Path
from helpers.progress import progress

with progress("Measuring", total=4) as show:
    show("with a cache", done=3)
    while not Path("seen").exists():  # and reports nothing more
        time.sleep(0.01)
"""

FAIL = """
try:
    with progress("Loading") as show:
        show("the weights")
        raise MemoryError("no room")
except MemoryError as error:
    print(error)
"""

WITHOUT_WIDGETS = "import sys; sys.modules['ipywidgets'] = None  # as if it were not installed"
