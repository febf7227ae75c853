"""How a step of the engine shares out the reading of prompts.

`helpers.scheduler` runs by these rules, and `helpers.simulation` repeats them. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

BLOCK = 32
"""Prompts are read in blocks of 32 tokens, which begin at multiples of 32: a chunk of a prompt ends at one, unless it
is the last, and so does a prefix that is reused. So a model can compute the same for a prompt that is read alone and
for one that is read beside others. A reused answer was read token by token, which rounds differently."""
PREFILL_BUDGET = 128
"""Prompt tokens that one step reads, of all new prompts together. On a CPU, a larger budget would hardly be faster per
token, and the running sequences would wait longer between two tokens."""


def share_budget(unread: Sequence[int]) -> dict[int, int]:
    """Return how many tokens the next step reads of each prompt: its index → tokens, 0 for a prompt that waits.

    `unread` are the tokens that each prompt has left, the oldest prompt first. All but the last tokens of a prompt are
    read in whole blocks. The oldest prompt gets half of the budget, and the others get the rest, the shortest first:
    that is the order of the result. So a long prompt does not hold up a short one behind it.
    """
    shares, budget = dict[int, int](), PREFILL_BUDGET
    indices = range(len(unread))
    for index in [*indices[:1], *sorted(indices[1:], key=lambda index: unread[index])]:
        share = budget // 2 if index == 0 and len(unread) > 1 else budget
        shares[index] = unread[index] if unread[index] <= share else share // BLOCK * BLOCK
        budget -= shares[index]
    return shares
