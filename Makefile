# `make` lists the tasks. scripts/dev.py does them, also without make: python scripts/dev.py help
#
#   make demo PYTHON=python3.12         use this Python (default: the first suitable one)
#   make demo TORCH_INDEX=URL           install torch from this index ("none": pip's usual one)
#   make test PYTEST_ARGS="-k prompts"  further arguments for pytest
#   make lab LAB_ARGS="--no-browser"    further arguments for JupyterLab
#   make notebooks NOTEBOOKS=FILE       only this notebook
#   make bench BENCH_ARGS="--quick"     further arguments for the benchmark
#   make media MEDIA="diagrams embed"   only these pictures
#   make links REPO=owner/name          the repository's new address on GitHub
#   make constraints UPGRADE="--upgrade-package NAME"

DEV = "$${PYTHON:-python3}" scripts/dev.py $${PYTHON:+--python "$$PYTHON"} $${TORCH_INDEX:+--torch-index "$$TORCH_INDEX"}

.PHONY: help demo test-fast test test-all lab notebooks bench media links colab constraints

help: ## List the tasks.
	@$(DEV) help
demo: ## Stream one answer, token by token, from a small model: no account, no GPU.
	@$(DEV) demo
test-fast: ## Check style and types, and run the tests that start no service and no browser.
	@$(DEV) test-fast $(PYTEST_ARGS)
test: ## Check style and types, and run the tests and the notebooks: at most ten minutes.
	@$(DEV) test $(PYTEST_ARGS)
test-all: ## Run what `test` runs, and the tests that take minutes.
	@$(DEV) test-all $(PYTEST_ARGS)
lab: ## Open the notebooks in JupyterLab.
	@$(DEV) lab $(LAB_ARGS)
notebooks: ## Run the notebooks, or those that you name, from top to bottom, and store their outputs.
	@$(DEV) notebooks $(NOTEBOOKS)
bench: ## Compare this service's speed with others, on this machine.
	@$(DEV) bench $(BENCH_ARGS)
media: ## Record the README's animation and the chat box, and draw the lessons' diagrams (needs Chromium).
	@$(DEV) media $(MEDIA)
links: ## Point badges, notebooks and docs to the repository OWNER/NAME.
	@$(DEV) links "$$REPO"
colab: ## Rebuild Colab's environment here, and run the notebooks in it (needs uv and 20 GB).
	@$(DEV) colab
constraints: ## Bring constraints.txt in line with pyproject.toml (needs uv).
	@$(DEV) constraints $(UPGRADE)
