"""Measure how well int8 predicts a text on a CPU, beside fp32: python benchmarks/quality.py [FILE ...]

Perplexity is e to the mean loss per token, in windows of 512 tokens. The agreement is the share of positions at which
both precisions find the same next token most likely.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from helpers import models
from helpers.catalog import BUNDLED
from helpers.kv_cache import KVCache
from helpers.packed import Chunk

WINDOW = 512
TEXTS = [Path(__file__).parents[1] / name for name in ("LICENSE", "CONTRIBUTING.md")]


@dataclass(frozen=True)
class Quality:
    """Perplexity of a text in fp32, that at int8 divided by it, and the share of tokens on which both agree."""

    perplexity: float
    ratio: float
    agreement: float


@torch.inference_mode()
def compare(text: str) -> Quality:
    """Return the quality of the bundled model at int8 on `text`."""
    losses, most_likely = [], []
    for precision in ("fp32", "int8"):
        chat_model = models.load(BUNDLED, precision)
        ids = torch.tensor(chat_model.tokenizer(text)["input_ids"])
        loss, found = _read(chat_model.model, ids)
        losses.append(loss)
        most_likely.append(found)
    agreement = (most_likely[0] == most_likely[1]).float().mean().item()
    return Quality(math.exp(losses[0]), math.exp(losses[1] - losses[0]), agreement)


def _read(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean loss of a `Llama` for the ids, and the most likely token at each position."""
    losses, most_likely = [], []
    for window in ids.split(WINDOW):
        logits = model.logits_of(model.hidden_states(window, [Chunk(KVCache(WINDOW), len(window))]))[:-1]
        losses.append(cross_entropy(logits, window[1:], reduction="none"))
        most_likely.append(logits.argmax(dim=-1))
    return torch.cat(losses).mean().item(), torch.cat(most_likely)


def main() -> None:
    """Print a table for the files that the command line names, or for two of this repository."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print("| text | perplexity in fp32 | int8 ÷ fp32 | next token agrees |\n|---|--:|--:|--:|")
    for path in map(Path, sys.argv[1:] or TEXTS):
        found = compare(path.read_text("utf-8"))
        print(f"| {path.name} | {found.perplexity:.2f} | {found.ratio:.3f} | {found.agreement:.3f} |", flush=True)


if __name__ == "__main__":
    main()
