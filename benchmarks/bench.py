"""How much of the model's speed does the service pass on? Side by side, in one run.

    python benchmarks/bench.py [--rounds N] [--tokens N] [--model NAME_OR_PATH] [--precision P]

Each round asks the article's question twice, once of a bare decode loop in this process and once of the
service over gRPC, with the same weights and the same greedy tokens. The machine's speed changes
while it runs, so read the medians of the rounds' ratios; seconds on their own mean little. Both hold the
model at the same time, so it needs its memory twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache

import helpers
from helpers import models, prompts

DIALOG = [
    {"role": "system", "content": prompts.SYSTEM_PROMPT},
    {"role": "user", "content": prompts.QUESTION},
]


@dataclass(frozen=True)
class Run:
    """One answer: seconds to its first token, and tokens per second after that."""

    first: float
    rate: float
    text: str


@torch.inference_mode()
def bare(chat_model: models.ChatModel, max_tokens: int) -> Run:
    """Prefill, then one token a step with the attention cache: the least that an answer takes."""
    started = time.perf_counter()
    ids = prompts.token_ids(DIALOG, chat_model.tokenizer)
    cache = DynamicCache(config=chat_model.model.config)
    step = torch.tensor([ids], device=chat_model.model.device)
    answer: list[int] = []
    first = 0.0
    while len(answer) < max_tokens:
        logits = chat_model.model(
            input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
        token_id = int(logits.argmax())
        if token_id in chat_model.eos_token_ids:
            break
        answer.append(token_id)
        first = first or time.perf_counter() - started
        step = torch.tensor([[token_id]], device=chat_model.model.device)
    rate = (len(answer) - 1) / (time.perf_counter() - started - first)
    return Run(first, rate, chat_model.tokenizer.decode(answer, skip_special_tokens=True))


def served(service: helpers.service.Service, max_tokens: int) -> Run:
    """The same through the wire, as a reader sees it."""
    answer = service.ask(DIALOG, max_tokens=max_tokens)
    return Run(answer.time_to_first_token, answer.tokens_per_second, answer.text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()

    chat_model = models.load(options.model, options.precision)
    with helpers.serve(chat_model.name, chat_model.precision, port=0) as service:
        pairs: list[tuple[Run, Run]] = []
        for n in range(options.rounds + 1):
            if n % 2:
                alone, through = bare(chat_model, options.tokens), served(service, options.tokens)
            else:
                through, alone = served(service, options.tokens), bare(chat_model, options.tokens)
            if alone.text != through.text:
                raise SystemExit(f"The two did not say the same:\n{alone.text}\n{through.text}")
            if n:  # the first round warms up
                pairs.append((alone, through))
                print(f"round {n}: {line(alone, through)}", flush=True)
    median = statistics.median
    print(
        f"\n{chat_model.name} at {chat_model.precision} on {chat_model.device} "
        f"({torch.get_num_threads()} threads), {options.tokens} tokens, {len(pairs)} rounds, medians:\n"
        f"  tokens/s            bare {median(b.rate for b, _ in pairs):6.1f}   "
        f"service {median(s.rate for _, s in pairs):6.1f}   "
        f"service / bare {median(s.rate / b.rate for b, s in pairs):.3f}\n"
        f"  first token, ms     bare {1000 * median(b.first for b, _ in pairs):6.1f}   "
        f"service {1000 * median(s.first for _, s in pairs):6.1f}   "
        f"service adds {1000 * median(s.first - b.first for b, s in pairs):.1f}"
    )


def line(bare: Run, served: Run) -> str:
    return (
        f"{served.rate:5.1f} / {bare.rate:5.1f} tokens/s = {served.rate / bare.rate:.3f}, "
        f"first token after {1000 * served.first:.0f} / {1000 * bare.first:.0f} ms"
    )


if __name__ == "__main__":
    main()
