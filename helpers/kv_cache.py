"""What the attention remembers, kept apart for each sequence, and one run of the model for all of them.

Only in its attention does a model look from one token at another. Everywhere else a row of tokens may
as well belong to many sequences, so `run` lays what each of them has to be read end to end, as one row,
and the attention gives each its own past: its keys and values. Nothing is padded, and a sequence that
joins or leaves moves none of the others.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import access
from .errors import ModelUnavailable

Ids = Sequence[int]


class KeyValues:
    """The keys and values of one sequence's first `length` tokens, with room for `capacity`.

    Both are stored for each layer, of shape (1, heads, capacity, size of a head), and never move: adding a
    token costs the same however many are there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Store the keys and the values, each (1, heads, n, size), that follow `length`; all up to them.

        `length` stays as it is until every layer has stored its own.
        """
        end = self.length + new[0].shape[2]
        if layer not in self._layers:
            self._layers[layer] = tuple(one.new_empty(*one.shape[:2], self.capacity, one.shape[3]) for one in new)
        for stored, one in zip(self._layers[layer], new):
            stored[:, :, self.length : end] = one
        return [stored[:, :, :end] for stored in self._layers[layer]]

    def beginning(self, length: int, *, capacity: int) -> KeyValues:
        """A copy of the first `length` tokens, with room for `capacity`."""
        copy = KeyValues(capacity)
        for layer, stored in self._layers.items():
            copy.add(layer, *(one[:, :, :length] for one in stored))
        copy.length = length
        return copy

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def bytes_per_token(self) -> int:
        return sum(one.nbytes for pair in self._layers.values() for one in pair) // self.capacity


class Kept:
    """Keys and values of sequences that have ended, for those that begin alike: the next turn of a
    conversation, another question under the same system prompt. The least recently used goes first."""

    def __init__(self) -> None:
        self._entries: list[tuple[Ids, KeyValues]] = []  # the latest used is the last

    def __iter__(self) -> Iterator[tuple[Ids, KeyValues]]:
        return iter(self._entries)

    @property
    def tokens(self) -> int:
        """For how many tokens memory is taken."""
        return sum(past.capacity for _, past in self._entries)

    def add(self, ids: Ids, past: KeyValues) -> None:
        """Keep `past`, of which `ids` are the tokens, in the place of all that are a beginning of it."""
        self._entries = [entry for entry in self._entries if common_beginning(entry[0], ids) < len(entry[0])]
        self._entries.append((ids, past))

    def used(self, past: KeyValues) -> None:
        self._entries.sort(key=lambda entry: entry[1] is past)  # stable: it alone moves, to the end

    def shrink(self, tokens: int) -> None:
        """Let go of as many as it takes to hold at most `tokens`."""
        while self._entries and self.tokens > tokens:
            del self._entries[0]


def common_beginning(some: Ids, others: Ids) -> int:
    """How many ids from the first on are the same in both."""
    shorter = min(len(some), len(others))
    if some[:shorter] == others[:shorter]:
        return shorter
    return next(i for i in range(shorter) if some[i] != others[i])


def spare_memory(device: torch.device) -> int:
    """Bytes to use for keys and values where nobody says how many: most of what is free on a GPU; of RAM,
    which other programs want too, half of it and at most 2 GiB, a full window of Llama-2-7b in 16 bit."""
    if device.type == "cuda":
        return sum(torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())) * 4 // 5
    return min(access.ram()[1] // 2, 2 * 2**30)


# --- One run of the model for many sequences ------------------------------------------------------


class _Part:
    """What one sequence feeds in a run: n tokens, after those whose keys and values it has."""

    def __init__(self, past: KeyValues, n: int) -> None:
        self.past, self.n = past, n
        self._masks: dict[int | None, Tensor | None] = {}

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """0 where a token may look and -inf where not, (1, 1, n, length + n), in a layer that looks back at most
        `window` tokens; None for one token that may look at all that was before."""
        if window not in self._masks:
            end = self.past.length + self.n
            narrow = window is not None and window < end
            if self.n == 1 and not narrow:
                self._masks[window] = None
            else:
                hidden = torch.ones(self.n, end, dtype=torch.bool, device=like.device).triu(self.past.length + 1)
                if narrow:
                    hidden |= torch.ones_like(hidden).tril(self.past.length - window)
                self._masks[window] = like.new_zeros(1, 1, self.n, end).masked_fill_(hidden, float("-inf"))
        return self._masks[window]


def _attend(
    attention: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    parts: list[_Part],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attention`, one of transformers' own, for each part by itself; (1, tokens, heads, size)."""
    sizes = [part.n for part in parts]
    outputs = []
    for part, q, *new in zip(parts, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)):
        keys, values = part.past.add(module.layer_idx, *new)
        mask = part.mask(sliding_window, q)
        outputs.append(attention(module, q, keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _eager(module: Any, *arguments: Any, **options: Any) -> Any:
    """The attention that a model's own file brings, for what no kernel can do."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


for _name, _attention in {"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"], "eager": _eager}.items():
    AttentionInterface.register(f"packed_{_name}", partial(_attend, _attention))


def prepare(model: Any) -> int:
    """Make `model`, a `transformers` causal language model, ready for `run`, and run it once.

    Returns the bytes that keys and values take for one token. Raises `ModelUnavailable` for a model whose
    layers do not all keep keys and values, or do it in a way of their own.
    """
    attention = model.config._attn_implementation.removeprefix("packed_")
    try:
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise TypeError("it takes no positions")
        if hasattr(model.config, "attention_chunk_size"):
            raise TypeError("it attends in chunks")
        model.set_attn_implementation(f"packed_{attention}")
        trial = KeyValues(1)
        run(model, [(trial, [0])])
        if trial.layers != model.config.get_text_config().num_hidden_layers:
            raise TypeError("it has layers that keep something else than keys and values")
    except Exception as error:
        raise ModelUnavailable(
            f"{type(model).__name__} cannot be served here ({type(error).__name__}: {error}). Choose a model of "
            "another kind, such as those of Llama, Mistral, Qwen, Gemma or Phi."
        ) from error
    return trial.bytes_per_token


@torch.inference_mode()
def run(model: Any, feeds: Sequence[tuple[KeyValues, Ids]]) -> Tensor:
    """Run the model once: each sequence reads its next ids, one or more, after those that it remembers.

    Returns the logits after the last id of each, of shape (sequences, vocabulary).
    """
    device = model.device
    parts = [_Part(past, len(ids)) for past, ids in feeds]
    positions = [position for past, ids in feeds for position in range(past.length, past.length + len(ids))]
    output = model(
        input_ids=torch.tensor([[token_id for _, ids in feeds for token_id in ids]], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor([part.n for part in parts]).cumsum(0) - 1,
        use_cache=False,
        parts=parts,
    )
    for part in parts:
        part.past.length += part.n
    return output.logits[0]
